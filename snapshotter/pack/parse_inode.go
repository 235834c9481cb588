// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/internal/erofs"
)

// inode makes the inode of what was read; off is where it ends. A whiteout is nil.
func (p *parser) inode(raw *erofs.Inode, off int64) (*Inode, error) {
	typ := raw.Mode & unix.S_IFMT
	if typ == unix.S_IFCHR && raw.U == 0 {
		if raw.XattrSize > 0 {
			return nil, errors.New("is a whiteout with xattrs")
		}
		return nil, nil
	}
	if len(p.slab) == 0 {
		p.slab = make([]Inode, slabSize)
	}
	in := &p.slab[0]
	p.slab = p.slab[1:]
	*in = Inode{Mode: raw.Mode, UID: raw.UID, GID: raw.GID, Sec: raw.Sec, Nsec: raw.Nsec, Nlink: raw.Nlink}
	area, err := p.inodes.get(off, int64(raw.XattrSize))
	if err != nil {
		return nil, err
	}
	ref, err := p.xattrs(in, area)
	if err != nil {
		return nil, err
	}
	off += int64(raw.XattrSize)
	switch typ {
	case unix.S_IFREG:
		in.Size = int64(raw.Size)
		switch {
		case ref.Number > 0:
			err = p.reference(in, raw, ref, off)
		case raw.Layout == erofs.LayoutInline:
			err = p.inline(in, raw, off)
		case in.Size > 0:
			err = p.ownData(in, raw)
		}
	case unix.S_IFLNK:
		if raw.Size > targetMax {
			return nil, fmt.Errorf("is a symlink of %d bytes", raw.Size)
		}
		var t tail
		if t, err = p.tail(raw, off); err == nil {
			err = p.eachBlock(&t, &p.inodes, func(b []byte) error { in.Inline += string(b); return nil })
		}
	case unix.S_IFCHR, unix.S_IFBLK:
		in.Rdev = erofs.DecodeDev(raw.U)
	}
	if err != nil {
		return nil, err
	}
	if typ != unix.S_IFREG && ref.Number > 0 {
		return nil, errors.New("refers to a data file and is none")
	}
	return in, checkInode(in)
}

// reference completes an inode whose data are in another layer.
func (p *parser) reference(in *Inode, raw *erofs.Inode, ref Ref, off int64) error {
	if in.Size <= 0 || ref.Layer == p.layer || raw.Layout != erofs.LayoutChunk || raw.U != refChunkFormat {
		return errors.New("is an impossible reference")
	}
	size := (raw.Size-1)>>refChunkBits*4 + 4
	if err := p.take(size); err != nil {
		return err
	}
	b, err := p.inodes.get(off, int64(size))
	if err != nil {
		return err
	}
	for i := uint64(0); i < size; i += 4 {
		if binary.LittleEndian.Uint32(b[i:]) != erofs.NullAddr {
			return errors.New("is a reference and has data")
		}
	}
	in.Data = ref
	return nil
}

// inline completes a file whose bytes stand behind the inode, at off.
func (p *parser) inline(in *Inode, raw *erofs.Inode, off int64) error {
	if raw.Size == 0 || raw.Size > InlineMax || raw.U != 0 {
		return fmt.Errorf("has %d bytes inline and block %d", raw.Size, raw.U)
	}
	t, err := p.tail(raw, off)
	if err != nil {
		return err
	}
	b, err := p.inodes.get(t.inline, t.inlineSize)
	in.Inline = string(b)
	return err
}

// ownData completes an inode whose data are in this pack.
func (p *parser) ownData(in *Inode, raw *erofs.Inode) error {
	n := raw.Ino
	x, ok := p.index.At(n)
	if !ok || x.Size != in.Size || x.Block != raw.U || raw.Layout != erofs.LayoutPlain {
		return fmt.Errorf("is not file %d of the index", n)
	}
	bit := uint64(1) << ((n - 1) % 64)
	if p.used[(n-1)/64]&bit != 0 {
		return fmt.Errorf("has file %d, which another inode has", n)
	}
	p.used[(n-1)/64] |= bit
	p.files++
	in.Data, in.Block, in.Sum = Ref{p.layer, n}, x.Block, x.Sum
	return nil
}

// xattrs reads an xattr area. It returns the data file that the inode refers to, if any.
func (p *parser) xattrs(in *Inode, area []byte) (ref Ref, err error) {
	if len(area) == 0 {
		return ref, nil
	}
	if area[4] != 0 {
		return ref, errors.New("has shared xattrs")
	}
	metacopy := false
	var buf [2 * nameMax]byte
	for b := area[erofs.XattrHeaderSize:]; len(b) > 0; {
		index, suffix, value, rest, ok := erofs.CutXattr(b)
		prefix, known := erofs.XattrPrefix(index)
		if !ok || !known {
			return ref, errors.New("has xattrs that are cut off or of an unknown kind")
		}
		name := append(append(buf[:0], prefix...), suffix...)
		b = rest
		dup, want := false, mark
		switch string(name) {
		case XattrOpaque:
			dup, in.Opaque = in.Opaque, true
		case XattrImplied:
			dup, in.Implied = in.Implied, true
		case XattrMetacopy:
			dup, metacopy, want = metacopy, true, ""
		case XattrRedirect:
			dup, want = ref.Number > 0, string(value)
			if ref, err = ParseRedirect(want); err != nil {
				return ref, fmt.Errorf("has a redirect: %s", err.Error())
			}
		default:
			s, found := p.names[string(name)]
			if !found {
				s = string(name)
				p.names[s] = s
			}
			in.Xattrs, want = append(in.Xattrs, Xattr{s, string(value)}), string(value)
		}
		if dup || string(value) != want {
			return ref, fmt.Errorf("has xattr %q twice or with value %q", name, value)
		}
	}
	if metacopy != (ref.Number > 0) {
		return ref, errors.New("has one of metacopy and redirect")
	}
	return ref, nil
}
