// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package tree

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/containerd/errdefs"
)

const (
	captureMagic   = "nhybcap\n"
	captureVersion = 1
	headerFixed    = len(captureMagic) + 2 + 1
	trailerSize    = 7*8 + sha256.Size
)

// header is {magic, version, length of the layer id, layer id}; version is little endian.
func appendHeader(b []byte, layerID string) []byte {
	b = append(b, captureMagic...)
	b = binary.LittleEndian.AppendUint16(b, captureVersion)
	b = append(b, byte(len(layerID)))
	return append(b, layerID...)
}

func (s *Stats) fields() [7]*int64 {
	return [7]*int64{&s.Entries, &s.Files, &s.Dirs, &s.Inodes, &s.Bytes, &s.DataBytes, &s.Unreachable}
}

// layer is a capture in memory, with the position of a reader in it.
type layer struct {
	file  string
	id    string
	index int
	stats Stats
	sum   [sha256.Size]byte
	start int // of the first record

	r     reader
	cur   record
	ok    bool     // cur is valid: the end is not reached
	count int64    // records read
	last  [][]byte // names on the path to cur
	size  int      // length of that path
	multi []int    // offsets of records that may have further names, ascending
}

// open reads the captures and checks them as a whole: version, length and checksum. They are read into memory, not
// mapped: a fault of the disk is to be an error here, not a signal in the daemon.
func (c Chain) open() ([]*layer, error) {
	if len(c) == 0 {
		return nil, fmt.Errorf("open chain: it has no layers: %w", errdefs.ErrInvalidArgument)
	}
	layers := make([]*layer, len(c))
	for i, file := range c {
		l, err := openLayer(file)
		if err != nil {
			return nil, err
		}
		l.index = i
		layers[i] = l
	}
	return layers, nil
}

func openLayer(file string) (*layer, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read capture: %w", err)
	}
	l, err := parseLayer(data)
	if err != nil {
		return nil, fmt.Errorf("capture %q %w", file, err)
	}
	l.file = file
	return l, nil
}

func parseLayer(data []byte) (*layer, error) {
	if len(data) < headerFixed {
		return nil, fmt.Errorf("is cut off after %d bytes: %w", len(data), errdefs.ErrDataLoss)
	}
	if string(data[:len(captureMagic)]) != captureMagic {
		return nil, fmt.Errorf("is not a capture: %w", errdefs.ErrInvalidArgument)
	}
	version := binary.LittleEndian.Uint16(data[len(captureMagic):])
	if version != captureVersion {
		return nil, fmt.Errorf("has version %d, this program reads version %d: %w", version, captureVersion,
			errdefs.ErrFailedPrecondition)
	}
	start := headerFixed + int(data[headerFixed-1])
	end := len(data) - trailerSize
	if end < start {
		return nil, fmt.Errorf("is cut off after %d bytes: %w", len(data), errdefs.ErrDataLoss)
	}
	l := &layer{id: string(data[headerFixed:start]), start: start}
	sum := sha256.Sum256(data[:len(data)-sha256.Size])
	if copy(l.sum[:], data[len(data)-sha256.Size:]); l.sum != sum {
		return nil, fmt.Errorf("is cut off or damaged, its checksum does not match: %w", errdefs.ErrDataLoss)
	}
	for i, f := range l.stats.fields() {
		*f = int64(binary.LittleEndian.Uint64(data[end+i*8:]))
	}
	if err := checkLayerID(l.id); err != nil {
		return nil, err
	}
	l.r.data = data[:end:end]
	return l, nil
}

// rewind goes to the first record, the root.
func (l *layer) rewind() error {
	l.r.pos, l.r.err = l.start, nil
	l.last, l.size, l.count, l.multi = l.last[:0], 0, 0, l.multi[:0]
	l.ok = false
	return l.next()
}

// next goes to the next record, or sets ok to false at the end. It refuses what would break the order or the bounds
// that the merge and the writer rely on.
func (l *layer) next() error {
	first := l.r.pos == l.start
	if l.r.pos == len(l.r.data) {
		l.ok = false
		if first || l.count != l.stats.Entries {
			return l.errorf("holds %d entries, its trailer says %d", l.count, l.stats.Entries)
		}
		return nil
	}
	wasDir := l.ok && l.cur.isDir()
	depth := l.cur.depth
	if err := l.r.record(&l.cur); err != nil {
		return l.errorf("%w", err)
	}
	l.ok = true
	l.count++
	cur := &l.cur
	if first {
		if cur.depth != 0 || !cur.isDir() {
			return l.errorf("does not begin with its root directory")
		}
		return nil
	}
	switch {
	case cur.depth == 0:
		return l.errorf("has a second root")
	case cur.depth > depth+1 || cur.depth == depth+1 && !wasDir:
		return l.errorf("holds %q without its directory", cur.name)
	}
	if cur.depth <= len(l.last) {
		if bytes.Compare(l.last[cur.depth-1], cur.name) >= 0 {
			return l.errorf("is out of order at %q", cur.name)
		}
		for _, name := range l.last[cur.depth-1:] {
			l.size -= len(name) + 1
		}
		l.last = l.last[:cur.depth-1]
	}
	l.last = append(l.last, cur.name)
	if l.size += len(cur.name) + 1; l.size > maxPath {
		return l.errorf("holds a path longer than %d bytes", maxPath)
	}
	if cur.is(flagLink) {
		if _, found := slices.BinarySearch(l.multi, cur.linkTo); !found {
			return l.errorf("holds hard link %q to nothing", cur.name)
		}
	} else if cur.multi {
		l.multi = append(l.multi, cur.off)
	}
	return nil
}

// skip goes past cur and everything below it.
func (l *layer) skip() error {
	depth := l.cur.depth
	for {
		if err := l.next(); err != nil || !l.ok || l.cur.depth <= depth {
			return err
		}
	}
}

// at reads again the record at an offset that was read before.
func (l *layer) at(off int, rec *record) error {
	r := reader{data: l.r.data, pos: off}
	if err := r.record(rec); err != nil {
		return l.errorf("%w", err)
	}
	return nil
}

func (l *layer) errorf(format string, args ...any) error {
	return fmt.Errorf("capture %q of layer %s is malformed: it %w: %w", l.file, l.id, fmt.Errorf(format, args...), errdefs.ErrDataLoss)
}

// VerifyCapture reads the capture at path and checks all of it: version, length, checksum, order and bounds. The
// error is of class errdefs.ErrDataLoss if the file is cut off or damaged, errdefs.ErrFailedPrecondition if another
// version wrote it, errdefs.ErrInvalidArgument if it is something else.
func VerifyCapture(path string) error {
	_, _, err := ReadStats(path)
	return err
}

// ReadStats checks the capture at path like [VerifyCapture] and returns the id of its layer and what [Capture]
// returned when it was written.
func ReadStats(path string) (layerID string, s Stats, err error) {
	l, err := openLayer(path)
	if err != nil {
		return "", Stats{}, err
	}
	if err = l.rewind(); err != nil {
		return "", Stats{}, err
	}
	for l.ok {
		if err = l.next(); err != nil {
			return "", Stats{}, err
		}
	}
	return l.id, l.stats, nil
}

// writeTrailer ends a capture whose bytes so far were hashed by h.
func writeTrailer(w io.Writer, s *Stats, h interface {
	io.Writer
	Sum([]byte) []byte
}) error {
	var b []byte
	for _, f := range s.fields() {
		b = binary.LittleEndian.AppendUint64(b, uint64(*f))
	}
	if _, err := h.Write(b); err != nil {
		return err
	}
	_, err := w.Write(h.Sum(b))
	return err
}
