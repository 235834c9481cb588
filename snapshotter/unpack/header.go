// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"strings"
	"time"
	"unsafe"
)

const tarBlock = 512

// tarReader reads a tar as [tar.Reader] does, with the same results and errors. It reads plain headers itself: those of
// ustar or GNU tar for files, directories and links, with nothing extended about them and numbers in octal. A layer may
// have a million, and tar.Reader takes 1.5 µs and ten allocations for each. All others it leaves to a tar.Reader, which
// it also asks whenever something looks wrong.
type tarReader struct {
	r     counted
	block [tarBlock]byte
	hdr   tar.Header         // of a plain entry
	names [2 * tarBlock]byte // what its strings are made of
	left  int64              // bytes of its data that were not read

	other *tar.Reader // of the entry that is not plain, nil for one that is
	stay  bool        // other reads the rest: its position does not follow from what it has read
}

// counted counts what was read.
type counted struct {
	io.Reader
	n int64
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	c.n += int64(n)
	return n, err
}

func newTarReader(r io.Reader) *tarReader { return &tarReader{r: counted{Reader: r}} }

// Next goes on to the next entry, as [tar.Reader.Next] does. The header and its strings are valid until the next call.
func (t *tarReader) Next() (*tar.Header, error) {
	if t.stay {
		return t.other.Next()
	}
	if err := t.skip(); err != nil {
		return nil, err
	}
	if n, err := io.ReadFull(&t.r, t.block[:]); err != nil || !t.plain() {
		if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			return nil, err
		}
		t.other = tar.NewReader(io.MultiReader(bytes.NewReader(bytes.Clone(t.block[:n])), &t.r))
		hdr, err := t.other.Next()
		t.stay = err != nil || hdr.Typeflag == tar.TypeGNUSparse || sparse(hdr.PAXRecords)
		return hdr, err
	}
	t.other = nil
	return &t.hdr, nil
}

// sparse reports whether the data of an entry stand in the tar in another size.
func sparse(records map[string]string) bool {
	for k := range records {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return true
		}
	}
	return false
}

// skip goes behind the current entry.
func (t *tarReader) skip() error {
	if t.other != nil {
		if _, err := io.Copy(io.Discard, t.other); err != nil {
			return err
		}
	} else if t.left > 0 {
		n, err := io.CopyN(io.Discard, &t.r, t.left)
		if t.left -= n; errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return err
		}
	}
	// A tar that ends in the padding ends there.
	for pad := int(-t.r.n & (tarBlock - 1)); pad > 0; {
		n, err := t.r.Read(t.block[:pad])
		if pad -= n; err != nil && (pad > 0 || !errors.Is(err, io.EOF)) {
			return err
		}
	}
	return nil
}

// Read reads the data of the entry.
func (t *tarReader) Read(p []byte) (int, error) {
	if t.other != nil {
		return t.other.Read(p)
	}
	if t.left == 0 {
		return 0, io.EOF
	}
	n, err := t.r.Read(p[:min(int64(len(p)), t.left)])
	t.left -= int64(n)
	switch {
	case err == nil && t.left == 0:
		err = io.EOF
	case errors.Is(err, io.EOF) && t.left > 0:
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// plain reads the header in the block. It reports whether that is a plain one.
func (t *tarReader) plain() bool {
	b := &t.block
	var prefix []byte
	switch {
	case string(b[257:263]) == "ustar\x00" && string(b[508:]) != "tar\x00": // which would be star
		prefix = cString(b[345:500])
	case string(b[257:265]) == "ustar  \x00" && allZero(b[345:]):
	default:
		return false
	}
	if sum, ok := octalField(b[148:156]); !ok || sum != blockSum(b) {
		return false
	}
	h := &t.hdr
	*h = tar.Header{Typeflag: b[156]}
	var mtime, uid, gid int64
	for _, f := range [...]struct {
		value      *int64
		begin, end int
	}{
		{&h.Mode, 100, 108}, {&uid, 108, 116}, {&gid, 116, 124}, {&h.Size, 124, 136}, {&mtime, 136, 148},
		{&h.Devmajor, 329, 337}, {&h.Devminor, 337, 345},
	} {
		var ok bool
		if *f.value, ok = octalField(b[f.begin:f.end]); !ok {
			return false
		}
	}
	switch h.Typeflag {
	case tar.TypeReg:
		t.left = h.Size
	case tar.TypeLink, tar.TypeSymlink, tar.TypeDir: // have no data, whatever their size says
		t.left = 0
	default:
		return false
	}
	h.Uid, h.Gid, h.ModTime = int(uid), int(gid), time.Unix(mtime, 0)
	text := t.names[:0]
	if text = append(text, prefix...); len(text) > 0 {
		text = append(text, '/')
	}
	text = append(text, cString(b[:100])...)
	name := len(text)
	text = append(text, cString(b[157:257])...)
	h.Name, h.Linkname = view(text[:name]), view(text[name:])
	return true
}

func cString(b []byte) []byte {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return b
}

// view is the string of b without a copy.
func view(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// octalField reads a number between spaces and NULs. ok is false for all else, which need not be wrong.
func octalField(b []byte) (v int64, ok bool) {
	i := 0
	for i < len(b) && (b[i] == ' ' || b[i] == 0) {
		i++
	}
	for ; i < len(b) && b[i] >= '0' && b[i] <= '7'; i++ {
		v = v<<3 | int64(b[i]-'0')
	}
	for ; i < len(b); i++ {
		if b[i] != ' ' && b[i] != 0 {
			return 0, false
		}
	}
	return v, true
}

// blockSum is the checksum of a header: the sum of its bytes, with spaces where it stands itself. It adds eight bytes at
// a time, in four lanes of 16 bits, which hold the sum of a block.
func blockSum(b *[tarBlock]byte) int64 {
	const lanes, spaces = 0x00ff00ff00ff00ff, 0x20202020
	var sum uint64
	for i := 0; i < tarBlock; i += 8 {
		x := binary.LittleEndian.Uint64(b[i:])
		switch i { // the checksum is the end of one word and the beginning of the next
		case 144:
			x = x&(1<<32-1) | spaces<<32
		case 152:
			x = x>>32<<32 | spaces
		}
		sum += x&lanes + x>>8&lanes
	}
	return int64(sum&0xffff + sum>>16&0xffff + sum>>32&0xffff + sum>>48)
}
