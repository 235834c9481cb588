// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package parts

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/internal/erofs"
	"github.com/nhybrid/nhybrid/placement/tier"
)

const (
	volumeName = "nhybrid-parts-3"

	// copyPiece is how many bytes are copied between two calls of pace.
	copyPiece = 512 << 10
)

// Stats of an image.
type Stats struct {
	Bytes int64 // of the image file
	Hot   int64 // of them copied
	Whole int64 // bytes of the files that it stands for
}

// node is an inode to be.
type node struct {
	name   string
	file   *File // nil: a directory
	at     int   // of the file in the list
	parent *node
	sub    []*node
	size   uint64 // of a directory
	nid    uint64
	block  int64 // first data block, counted from the end of the metadata
}

type writer struct {
	*contents
	nodes []*node // in path order, the root first
	meta  int64   // bytes
	total int64   // blocks of data
	out   *erofs.Writer
}

// Write makes the image of a set, as [Choose] returns it, at path. What stood there is
// replaced once the new one is whole and synced; who has the old one mounted keeps it. The packs of all files must be whole,
// durably: cold chunks are read from them. Hot chunks are copied from the whole file below nvm, the data root there, if it
// stands, else from the pack. pace is called before each piece of at most 512 KiB with its size; it may sleep, and ends the
// work by an error.
//
// Errors: errdefs.ErrInvalidArgument for an impossible list, ErrNotFound for a file or a pack that is not there,
// ErrFailedPrecondition for one of another size.
func Write(ctx context.Context, path, nvm string, packs Packs, set Set, pace func(int) error) (Stats, error) {
	s := Stats{}
	if err := set.check(); err != nil {
		return s, fmt.Errorf("write parts image: %w", err)
	}
	for _, f := range set.Files {
		s.Hot += f.Bytes()
		s.Whole += f.Size
	}
	src, err := openSources(set, nvm, packs)
	if err != nil {
		return s, fmt.Errorf("write parts image: %w", err)
	}
	defer src.close()
	w := &writer{contents: src.contents}
	if err := w.layout(); err != nil {
		return s, fmt.Errorf("write parts image: %w", err)
	}
	err = tier.WriteFile(path, func(f *os.File) error {
		h := sha256.New()
		w.out = &erofs.Writer{W: f}
		meta := w.metadata()
		h.Write(meta)
		w.out.Write(meta)
		if err := w.data(ctx, src, pace); err != nil {
			return err
		}
		list := w.appendList(nil)
		footer := append([]byte(nil), footerMagic...)
		footer = binary.LittleEndian.AppendUint64(footer, uint64(len(list)))
		footer = binary.LittleEndian.AppendUint64(footer, uint64(len(meta)))
		h.Write(list)
		h.Write(footer)
		w.out.Write(list)
		w.out.Write(h.Sum(footer))
		s.Bytes = w.out.Pos
		return w.out.Flush()
	})
	if err != nil {
		return s, fmt.Errorf("write parts image %q: %w", path, err)
	}
	return s, nil
}

// layout makes the nodes and gives each its place.
func (w *writer) layout() error {
	root := &node{}
	w.nodes = []*node{root}
	for i := range w.Files {
		at := root
		names := strings.Split(w.Files[i].Redirect[1:], "/")
		for j, name := range names {
			// Redirects are in byte order, in which "a-b" stands before "a/b": the directory may not be the latest.
			k := slices.IndexFunc(at.sub, func(n *node) bool { return n.name == name })
			last := j == len(names)-1
			switch {
			case k >= 0 && (last || at.sub[k].file != nil):
				return fmt.Errorf("%q is both a file and a directory: %w", w.Files[i].Redirect, errdefs.ErrInvalidArgument)
			case k >= 0:
				at = at.sub[k]
				continue
			}
			n := &node{name: name, parent: at}
			if last {
				n.file, n.at = &w.Files[i], i
			}
			at.sub = append(at.sub, n)
			w.nodes = append(w.nodes, n)
			at = n
		}
	}
	pos := int64(erofs.SuperOffset + erofs.SuperSize + len(w.packs)*erofs.DeviceSlotSize)
	for _, n := range w.nodes {
		tail := int64(0)
		if n.file != nil {
			tail = chunks(n.file.Size) * 8
			n.block = w.total
			w.total += blocks(n.file.Bytes())
		} else {
			slices.SortFunc(n.sub, func(a, b *node) int { return strings.Compare(a.name, b.name) })
			n.size = n.measure()
			if n.inline() {
				tail = int64(n.size)
			} else {
				n.block = w.total
				w.total += blocks(int64(n.size))
			}
		}
		pos = erofs.Align(pos, erofs.SlotSize)
		// Neither an inode nor an inline directory crosses a block; chunk indexes are read one by one.
		for pos%erofs.BlockSize+erofs.InodeSize > erofs.BlockSize ||
			n.file == nil && pos%erofs.BlockSize+erofs.InodeSize+tail > erofs.BlockSize {
			pos += erofs.SlotSize
		}
		n.nid = uint64(pos / erofs.SlotSize)
		pos += erofs.InodeSize + tail
	}
	w.meta = erofs.Align(pos, erofs.BlockSize)
	if w.meta/erofs.BlockSize+w.total > 1<<32-1 {
		return fmt.Errorf("the image needs more than 2^32 blocks: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

func blocks(n int64) int64 { return (n + erofs.BlockSize - 1) / erofs.BlockSize }

func (n *node) inline() bool { return n.size <= erofs.TailMax }

func (n *node) measure() uint64 {
	var l erofs.DirLayout
	names := erofs.DirNames{Add: func(name []byte, _ int) { l.Add(len(name)) }}
	for _, c := range n.sub {
		names.Name([]byte(c.name))
	}
	names.End()
	return l.Size()
}

// appendDir appends the directory, its last block not padded.
func (n *node) appendDir(b []byte) []byte {
	var l erofs.DirLayout
	var entries []erofs.Dirent
	i := 0
	names := erofs.DirNames{Add: func(name []byte, dot int) {
		if l.Add(len(name)) {
			b = erofs.AppendDirBlock(b, entries, true)
			entries = entries[:0]
		}
		to := n
		switch {
		case dot == 0:
			to = n.sub[i]
		case dot == 2 && n.parent != nil:
			to = n.parent
		}
		entries = append(entries, erofs.Dirent{Nid: to.nid, Type: erofs.FileType(to.mode()), Name: name})
	}}
	for ; i < len(n.sub); i++ {
		names.Name([]byte(n.sub[i].name))
	}
	names.End()
	return erofs.AppendDirBlock(b, entries, false)
}

// mode is for the superuser alone: containers see the modes of their tree.
func (n *node) mode() uint32 {
	if n.file != nil {
		return unix.S_IFREG | 0o600
	}
	return unix.S_IFDIR | 0o700
}

// metadata is all up to the data blocks.
func (w *writer) metadata() []byte {
	super := erofs.Super{
		Volume: volumeName, RootNid: uint16(w.nodes[0].nid), Inos: uint64(len(w.nodes)),
		Blocks: uint32(w.meta/erofs.BlockSize + w.total), Incompat: erofs.IncompatChunkedFile | erofs.IncompatDeviceTable,
		Devices: uint16(len(w.packs)), DeviceTable: (erofs.SuperOffset + erofs.SuperSize) / erofs.DeviceSlotSize,
	}
	sum := sha256.Sum256(w.appendList([]byte(volumeName)))
	copy(super.UUID[:], sum[:])
	super.UUID[6], super.UUID[8] = super.UUID[6]&0x0f|0x80, super.UUID[8]&0x3f|0x80 // version 8: of a scheme of our own
	b := append(make([]byte, erofs.SuperOffset, w.meta), super.Bytes()...)
	for i := range w.packs {
		b = erofs.AppendDeviceSlot(b, uint32(w.size(uint16(i+1))))
	}
	base := w.meta / erofs.BlockSize
	for i, n := range w.nodes {
		b = append(b, make([]byte, int64(n.nid)*erofs.SlotSize-int64(len(b)))...)
		in := erofs.Inode{Mode: n.mode(), Ino: uint32(i + 1), Nlink: 1}
		if n.file != nil {
			in.Layout, in.U, in.Size = erofs.LayoutChunk, erofs.ChunkIndexes, uint64(n.file.Size)
			b = w.appendChunks(in.Append(b), n, base)
			continue
		}
		in.Size, in.Nlink = n.size, 2
		for _, c := range n.sub {
			if c.file == nil {
				in.Nlink++
			}
		}
		if n.inline() {
			in.Layout = erofs.LayoutInline
			b = n.appendDir(in.Append(b))
		} else {
			in.U = uint32(base + n.block)
			b = in.Append(b)
		}
	}
	b = append(b, make([]byte, w.meta-int64(len(b)))...)
	erofs.SetChecksum(b)
	return b
}

// appendChunks appends the index: device 0 is the image itself, where hot chunks stand one behind the other.
func (w *writer) appendChunks(b []byte, n *node, base int64) []byte {
	hot, next := n.file.Hot, base+n.block
	device, first := w.device(n.at), int64(w.blocks[n.at])
	for c := range chunks(n.file.Size) {
		for len(hot) > 0 && hot[0].end() <= c*Chunk {
			hot = hot[1:]
		}
		if len(hot) > 0 && hot[0].Offset <= c*Chunk {
			b = erofs.AppendChunk(b, 0, uint32(next))
			next++
		} else {
			b = erofs.AppendChunk(b, device, uint32(first+c))
		}
	}
	return b
}

// data writes the data blocks.
func (w *writer) data(ctx context.Context, src *sources, pace func(int) error) error {
	for _, n := range w.nodes {
		if n.file == nil {
			if !n.inline() {
				w.out.Write(n.appendDir(nil))
			}
		} else if err := w.copyHot(ctx, src, n.at, pace); err != nil {
			return err
		}
		w.out.Pad(erofs.Align(w.out.Pos, erofs.BlockSize))
		if w.out.Err != nil {
			return w.out.Err
		}
	}
	return nil
}

func (w *writer) copyHot(ctx context.Context, src *sources, file int, pace func(int) error) error {
	f := &w.Files[file]
	in, base, done, err := src.openFile(file)
	if err != nil {
		return err
	}
	defer done()
	// Without: read-ahead would fetch what is cold.
	if err := unix.Fadvise(int(in.Fd()), 0, 0, unix.FADV_RANDOM); err != nil {
		return fmt.Errorf("%q: advise: %w", f.Redirect, err)
	}
	buf := make([]byte, copyPiece)
	for _, r := range f.Hot {
		for off := r.Offset; off < r.end(); {
			if err := ctx.Err(); err != nil {
				return err
			}
			piece := buf[:min(copyPiece, r.end()-off)]
			if err := pace(len(piece)); err != nil {
				return err
			}
			if _, err := in.ReadAt(piece, base+off); err != nil {
				if errors.Is(err, io.EOF) {
					err = fmt.Errorf("it became shorter: %w", errdefs.ErrFailedPrecondition)
				}
				return fmt.Errorf("read %q: %w", f.Redirect, err)
			}
			if w.out.Write(piece); w.out.Err != nil {
				return w.out.Err
			}
			off += int64(len(piece))
		}
	}
	return nil
}
