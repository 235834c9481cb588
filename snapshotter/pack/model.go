// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package pack is the form of a layer (docs/store.md): one file that is an
// EROFS image of the layer with a footer behind it, and for a chain of layers
// the view, the EROFS image that containers mount.
//
// It knows formats and nothing of snapshots, tiers or containerd. It imports
// internal/erofs and internal/loop alone. Values are not safe for concurrent
// change; a [Meta] that is complete may be read by several goroutines.
package pack

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// BlockSize is the unit in which data files stand in a pack, in bytes.
const BlockSize = 4096

// InlineMax is the size in bytes up to which a regular file stands in the
// metadata, behind its inode, and has no data file. Up to some 144 bytes that
// takes less of a view than what refers to a data file; up to 256 the view of an
// image grows by 2 % at the most (docs/store.md).
const InlineMax = 256

// Names of xattrs with a meaning of their own in a pack. None of them reaches
// a container, and none is taken from a layer's author.
const (
	XattrOpaque   = "trusted.overlay.opaque"
	XattrMetacopy = "trusted.overlay.metacopy"
	XattrRedirect = "trusted.overlay.redirect"
	// XattrImplied marks a directory that the tar of a layer did not list: its
	// attributes are those of the directory below.
	XattrImplied = "trusted.nhybrid.implied"
)

// Ref names a data file. The zero Ref names none.
type Ref struct {
	Layer  uint64
	Number uint32 // from 1
}

// Redirect is the path of the file below a data root: "/<layer>/<hh>/<n>".
func (r Ref) Redirect() string { return string(r.AppendRedirect(nil)) }

// AppendRedirect appends [Ref.Redirect] to b.
func (r Ref) AppendRedirect(b []byte) []byte {
	const digits = "0123456789abcdef"
	b = append(b, '/')
	b = strconv.AppendUint(b, r.Layer, 10)
	b = append(b, '/', digits[r.Number>>4&0xf], digits[r.Number&0xf], '/')
	return strconv.AppendUint(b, uint64(r.Number), 10)
}

// ParseRedirect is the inverse of [Ref.Redirect]. Anything else is
// errdefs.ErrInvalidArgument: redirects may come from disks and registries.
func ParseRedirect(s string) (Ref, error) {
	p := strings.Split(s, "/")
	if len(p) == 4 {
		layer, err1 := strconv.ParseUint(p[1], 10, 64)
		n, err2 := strconv.ParseUint(p[3], 10, 32)
		if r := (Ref{layer, uint32(n)}); err1 == nil && err2 == nil && n > 0 && r.Redirect() == s {
			return r, nil
		}
	}
	return Ref{}, fmt.Errorf("%q is not of the form /<layer>/<hh>/<number>: %w", s, errdefs.ErrInvalidArgument)
}

// Xattr is one extended attribute. Lists are sorted by name and hold each name once.
type Xattr struct{ Name, Value string }

// Inode is a file beside its names. Names of one inode share a pointer.
type Inode struct {
	Mode     uint32 // type and permissions as in stat(2)
	UID, GID uint32
	Nsec     uint32
	Sec      int64  // mtime, with Nsec
	Size     int64  // bytes of a regular file
	Rdev     uint64 // of a device, as in stat(2)
	// Inline is what stands behind the inode: the target of a symlink, or all bytes
	// of a small regular file.
	Inline string
	Xattrs []Xattr
	Nlink  uint32 // names of the inode in its layer; for directories not maintained
	// Opaque directories hide what is below; Implied ones have the attributes of
	// the directory below.
	Opaque, Implied bool
	// Data says where the bytes of a regular file are that are not inline. Its layer
	// is another one only for what refers to the chain below (docs/store.md, References).
	Data  Ref
	Block uint32 // first block in the pack of Data.Layer; not known for references
	Sum   uint32 // CRC-32C of the bytes; not known for references
}

// Node is one name of a layer. A name without an inode is a whiteout.
type Node struct {
	Name     string // one component, any bytes but NUL and '/'; "" is the root
	Inode    *Inode
	Children []*Node // of a directory, in strict byte order of their names
}

// Whiteout reports whether the name is deleted from the layers below.
func (n *Node) Whiteout() bool { return n.Inode == nil }

// Dir reports whether the name is a directory.
func (n *Node) Dir() bool { return n.Inode != nil && n.Inode.Mode&0o170000 == 0o040000 }

// HasData reports whether the inode has bytes that stand in a data file.
func (i *Inode) HasData() bool { return i.Mode&0o170000 == 0o100000 && i.Size > 0 && i.Inline == "" }

// Meta is all metadata of one layer.
type Meta struct {
	Layer uint64
	Root  *Node
	// Numbers is the highest number of a data file; numbers of files that the
	// layer itself has replaced are among those below it and have no inode.
	Numbers uint32
}
