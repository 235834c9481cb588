// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/internal/erofs"
)

// Limits of what is written into a pack and accepted from one.
const (
	nameMax   = 255  // NAME_MAX, of names of xattrs too
	targetMax = 4095 // PATH_MAX less the terminator
	depthMax  = 1 << 15
	mark      = "y" // value of the xattrs opaque and implied
)

// ValidXattr reports whether an xattr that the author of a layer has set has a place in a pack. Those of overlayfs
// would redirect files at will of the author, trusted.nhybrid is ours, and others EROFS has no index for.
func ValidXattr(name string) bool {
	for _, p := range []string{"trusted.overlay.", "user.overlay.", "trusted.nhybrid."} {
		if strings.HasPrefix(name, p) {
			return false
		}
	}
	_, _, ok := erofs.SplitXattr(name)
	return ok && len(name) <= nameMax && strings.IndexByte(name, 0) < 0
}

// checkNodeName says what is wrong with the name of a file. The error has no class: that depends on where the name is from.
func checkNodeName(name string) error {
	if name == "" || name == "." || name == ".." || len(name) > nameMax || strings.IndexByte(name, '/') >= 0 || strings.IndexByte(name, 0) >= 0 {
		return errors.New("has an impossible name")
	}
	return nil
}

// checkInode says what is wrong with an inode, apart from what depends on its pack.
func checkInode(i *Inode) error {
	typ := i.Mode & unix.S_IFMT
	switch typ {
	case unix.S_IFREG:
		switch {
		case i.Size < 0 || i.HasData() && i.Data.Number == 0:
			return fmt.Errorf("has %d bytes in no data file", i.Size)
		case i.Inline != "" && (i.Size != int64(len(i.Inline)) || i.Data != Ref{}):
			return fmt.Errorf("has %d bytes, %d of them inline, and data file %d", i.Size, len(i.Inline), i.Data.Number)
		case len(i.Inline) > InlineMax:
			return fmt.Errorf("has %d bytes inline, the limit is %d", i.Size, InlineMax)
		}
	case unix.S_IFLNK:
		if i.Inline == "" || len(i.Inline) > targetMax || strings.IndexByte(i.Inline, 0) >= 0 {
			return errors.New("is a symlink with an impossible target")
		}
	case unix.S_IFCHR, unix.S_IFBLK:
		if _, ok := erofs.EncodeDev(i.Rdev); !ok {
			return fmt.Errorf("is a device with the impossible number %#x", i.Rdev)
		}
	case unix.S_IFDIR, unix.S_IFIFO, unix.S_IFSOCK:
	default:
		return fmt.Errorf("has the unknown type %#o", i.Mode)
	}
	if i.Inline != "" && typ != unix.S_IFREG && typ != unix.S_IFLNK {
		return errors.New("has bytes and is neither a file nor a symlink")
	}
	if i.Mode > 0xffff || i.Nsec > 999999999 {
		return errors.New("has an impossible mode or time")
	}
	if typ != unix.S_IFDIR && (i.Opaque || i.Implied) {
		return errors.New("is opaque or implied and no directory")
	}
	last := ""
	for _, x := range i.Xattrs {
		if !ValidXattr(x.Name) || x.Name <= last {
			return fmt.Errorf("has xattr %q, which is out of order or does not belong there", x.Name)
		}
		if len(x.Value) > erofs.XattrValueMax {
			return fmt.Errorf("has xattr %q of %d bytes, the limit is %d", x.Name, len(x.Value), erofs.XattrValueMax)
		}
		last = x.Name
	}
	return nil
}

// eachXattr iterates over the xattrs that an inode of a layer has in a pack.
func eachXattr(i *Inode, layer uint64) iter.Seq2[string, string] {
	return func(yield func(name, value string) bool) {
		if i.Opaque && !yield(XattrOpaque, mark) || i.Implied && !yield(XattrImplied, mark) {
			return
		}
		if i.HasData() && i.Data.Layer != layer && !(yield(XattrMetacopy, "") && yield(XattrRedirect, i.Data.Redirect())) {
			return
		}
		for _, x := range i.Xattrs {
			if !yield(x.Name, x.Value) {
				return
			}
		}
	}
}

// appendXattrs appends the xattr area of an inode, of the given size.
func appendXattrs(b []byte, i *Inode, layer uint64, size int) []byte {
	if size == 0 {
		return b
	}
	b = append(b, make([]byte, erofs.XattrHeaderSize)...)
	for name, value := range eachXattr(i, layer) {
		index, suffix, _ := erofs.SplitXattr(name)
		b = erofs.AppendXattr(b, index, suffix, value)
	}
	return b
}

// joinPath makes a path of its components, the last one first.
func joinPath(parts []string) string {
	slices.Reverse(parts)
	return "/" + strings.Join(parts, "/")
}
