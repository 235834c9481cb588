// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package tree

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/internal/erofs"
)

// Limits of what is written into a capture and accepted from one.
const (
	maxName   = 255     // NAME_MAX
	maxTarget = 4095    // PATH_MAX less the terminator
	maxPath   = 1 << 16 // of a path in a layer: depth, and with it the state of a merge, stays bounded
	maxValue  = 1<<16 - 1
)

// Flags of a record.
const (
	flagWhiteout = 1 << iota // the name is deleted from the layers below; nothing follows
	flagLink                 // a further name of the inode whose record starts at the offset that follows
	flagOpaque               // a directory that hides the layers below
	flagMulti                // there may be further names of this inode
	flagRedirect             // the data stand at a path of their own
	flagXattrs
	flagsKnown = 1<<iota - 1
)

// inode is the attributes of a file as they stand in a capture. Its byte slices point into the capture.
type inode struct {
	mode, uid, gid uint32
	nsec           uint32
	sec            int64
	size           uint64 // regular files and symlinks
	rdev           uint64
	multi          bool
	target         []byte
	redirect       []byte // explicit redirect, nil if it follows from the name
	xattrs         []byte // encoded list
}

// hasData tells whether the file has bytes that stand in a data root.
func (i *inode) hasData() bool { return isReg(i.mode) && i.size > 0 }

// eachXattr iterates over names and values. The list was checked when it was read.
func (i *inode) eachXattr(yield func(name, value []byte) bool) {
	r := reader{data: i.xattrs}
	for r.pos < len(r.data) && r.err == nil {
		name := r.bytes(maxName)
		if value := r.bytes(maxValue); r.err != nil || !yield(name, value) {
			return
		}
	}
}

// record is one entry of a capture.
type record struct {
	off    int // offset in the capture: what links and nodes refer to
	depth  int // number of components of the path
	flags  byte
	name   []byte
	linkTo int // with flagLink
	inode      // neither with flagWhiteout nor flagLink
}

func (r *record) is(flag byte) bool { return r.flags&flag != 0 }
func (r *record) isDir() bool       { return r.flags&(flagWhiteout|flagLink) == 0 && isDir(r.mode) }

// appendName begins a record.
func appendName(b []byte, depth int, flags byte, name string) []byte {
	b = binary.AppendUvarint(b, uint64(depth))
	b = append(b, flags)
	return appendString(b, name)
}

// inodeFlags are the flags that say which parts of the inode follow.
func inodeFlags(i *inode) (f byte) {
	if i.redirect != nil {
		f |= flagRedirect
	}
	if len(i.xattrs) > 0 {
		f |= flagXattrs
	}
	if i.multi {
		f |= flagMulti
	}
	return f
}

// appendInode ends a record whose flags hold inodeFlags(i).
func appendInode(b []byte, i *inode) []byte {
	b = binary.AppendUvarint(b, uint64(i.mode))
	b = binary.AppendUvarint(b, uint64(i.uid))
	b = binary.AppendUvarint(b, uint64(i.gid))
	b = binary.AppendVarint(b, i.sec)
	b = binary.AppendUvarint(b, uint64(i.nsec))
	switch i.mode & unix.S_IFMT {
	case unix.S_IFREG:
		b = binary.AppendUvarint(b, i.size)
	case unix.S_IFLNK:
		b = appendString(b, i.target)
	case unix.S_IFCHR, unix.S_IFBLK:
		b = binary.AppendUvarint(b, i.rdev)
	}
	if i.redirect != nil {
		b = appendString(b, i.redirect)
	}
	if len(i.xattrs) > 0 {
		b = appendString(b, i.xattrs)
	}
	return b
}

func appendString[T string | []byte](b []byte, s T) []byte {
	b = binary.AppendUvarint(b, uint64(len(s)))
	return append(b, s...)
}

// reader takes values from data; the first fault stays in err, and everything after it is zero.
type reader struct {
	data []byte
	pos  int
	err  error
}

func (r *reader) fail(format string, args ...any) {
	if r.err == nil {
		r.err = fmt.Errorf(format, args...)
	}
}

func (r *reader) byte() byte {
	if r.err != nil || r.pos >= len(r.data) {
		r.fail("ends in the middle of an entry")
		return 0
	}
	r.pos++
	return r.data[r.pos-1]
}

func (r *reader) uvarint() uint64 {
	if r.err != nil {
		return 0
	}
	// Most values are small; binary.Uvarint is not inlined.
	if r.pos < len(r.data) && r.data[r.pos] < 0x80 {
		r.pos++
		return uint64(r.data[r.pos-1])
	}
	v, n := binary.Uvarint(r.data[r.pos:])
	if n <= 0 {
		r.fail("holds a number that is cut off or too large")
		return 0
	}
	r.pos += n
	return v
}

func (r *reader) uint32() uint32 {
	v := r.uvarint()
	if v != uint64(uint32(v)) {
		r.fail("holds %d where 32 bits are the limit", v)
	}
	return uint32(v)
}

func (r *reader) varint() int64 {
	u := r.uvarint()
	v := int64(u >> 1)
	if u&1 != 0 {
		v = ^v
	}
	return v
}

func (r *reader) bytes(max int) []byte {
	n := r.uvarint()
	if r.err != nil {
		return nil
	}
	if n > uint64(max) || n > uint64(len(r.data)-r.pos) {
		r.fail("holds a string of %d bytes where %d are left and %d allowed", n, len(r.data)-r.pos, max)
		return nil
	}
	r.pos += int(n)
	return r.data[r.pos-int(n) : r.pos : r.pos]
}

// record reads one entry and checks everything about it that does not depend on others.
func (r *reader) record(rec *record) error {
	*rec = record{off: r.pos}
	depth := r.uvarint()
	rec.flags = r.byte()
	rec.name = r.bytes(maxName)
	if r.err != nil {
		return r.err
	}
	if depth > maxPath/2 {
		return fmt.Errorf("holds an entry at depth %d, the limit is %d", depth, maxPath/2)
	}
	rec.depth = int(depth)
	if rec.flags&^flagsKnown != 0 {
		return fmt.Errorf("holds an entry with unknown flags %#x", rec.flags)
	}
	if depth > 0 {
		if err := checkName(rec.name); err != nil {
			return err
		}
	} else if len(rec.name) != 0 {
		return fmt.Errorf("names its root %q", rec.name)
	}
	switch {
	case rec.is(flagWhiteout | flagLink):
		if rec.flags != flagWhiteout && rec.flags != flagLink {
			return fmt.Errorf("holds entry %q with contradictory flags %#x", rec.name, rec.flags)
		}
		if rec.is(flagLink) {
			to := r.uvarint()
			if to >= uint64(rec.off) {
				r.fail("holds a hard link %q that points ahead", rec.name)
			}
			rec.linkTo = int(to)
		}
	default:
		r.inode(rec)
	}
	return r.err
}

func (r *reader) inode(rec *record) {
	i := &rec.inode
	i.mode, i.uid, i.gid = r.uint32(), r.uint32(), r.uint32()
	i.sec, i.nsec = r.varint(), r.uint32()
	i.multi = rec.is(flagMulti)
	switch i.mode & unix.S_IFMT {
	case unix.S_IFREG:
		i.size = r.uvarint()
	case unix.S_IFLNK:
		i.target = r.bytes(maxTarget)
		i.size = uint64(len(i.target))
		if len(i.target) == 0 || bytes.IndexByte(i.target, 0) >= 0 {
			r.fail("holds symlink %q with an impossible target", rec.name)
		}
	case unix.S_IFCHR, unix.S_IFBLK:
		i.rdev = r.uvarint()
		if _, ok := erofs.EncodeDev(i.rdev); !ok {
			r.fail("holds device %q with an impossible number %#x", rec.name, i.rdev)
		}
	case unix.S_IFDIR, unix.S_IFIFO, unix.S_IFSOCK:
	default:
		r.fail("holds entry %q of unknown type %#o", rec.name, i.mode)
	}
	if i.mode > 0xffff || i.nsec > 999999999 || i.size > 1<<63-1 {
		r.fail("holds entry %q with an impossible mode, time or size", rec.name)
	}
	if rec.is(flagRedirect) {
		i.redirect = r.bytes(maxPath + maxName + 2)
		if r.err == nil && (!i.hasData() || !cleanRedirect(i.redirect)) {
			r.fail("holds entry %q with an impossible redirect", rec.name)
		}
	}
	if i.multi && i.hasData() && i.redirect == nil {
		r.fail("holds entry %q with hard links and no redirect", rec.name)
	}
	if rec.is(flagXattrs) {
		i.xattrs = r.bytes(len(r.data))
		r.xattrs(rec)
	}
	if isDir(i.mode) && i.multi || !isDir(i.mode) && rec.is(flagOpaque) {
		r.fail("holds entry %q with flags %#x that do not go with its type", rec.name, rec.flags)
	}
}

func (r *reader) xattrs(rec *record) {
	var last []byte
	x := reader{data: rec.xattrs}
	for x.pos < len(x.data) && x.err == nil {
		name, value := x.bytes(maxName), x.bytes(maxValue)
		_, _, known := splitXattr(name)
		if x.err == nil && (!known || bytes.IndexByte(name, 0) >= 0 || bytes.Compare(last, name) >= 0) {
			x.fail("holds entry %q with xattr %q, which is out of order or does not belong there", rec.name, name)
		}
		last, _ = name, value
	}
	if x.err != nil {
		r.fail("%w", x.err)
	}
}

func checkName(name []byte) error {
	switch {
	case len(name) == 0, string(name) == ".", string(name) == "..",
		bytes.IndexByte(name, '/') >= 0, bytes.IndexByte(name, 0) >= 0:
		return fmt.Errorf("holds an entry with the impossible name %q", name)
	}
	return nil
}

// checkLayerID refuses an id that could not be one directory below a data root.
func checkLayerID(id string) error {
	if len(id) > maxName || checkName([]byte(id)) != nil {
		return fmt.Errorf("layer id %q is not a plain name: %w", id, errdefs.ErrInvalidArgument)
	}
	return nil
}

// cleanRedirect tells whether p is absolute, has at least a layer and a name, and no empty or dotted components.
func cleanRedirect(p []byte) bool {
	parts := strings.Split(string(p), "/")
	if len(parts) < 3 || parts[0] != "" {
		return false
	}
	for _, c := range parts[1:] {
		if len(c) > maxName || checkName([]byte(c)) != nil {
			return false
		}
	}
	return true
}
