// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/internal/erofs"
)

func isRegular(mode uint32) bool { return mode&unix.S_IFMT == unix.S_IFREG }

// statInode sets the attributes of i.
func statInode(i *Inode, st *unix.Stat_t) {
	*i = Inode{Mode: st.Mode, UID: st.Uid, GID: st.Gid, Sec: st.Mtim.Sec, Nsec: uint32(st.Mtim.Nsec), Nlink: 1}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		i.Size = st.Size
	case unix.S_IFCHR, unix.S_IFBLK:
		i.Rdev = st.Rdev
	}
}

// overlayAttrs are the xattrs by which overlayfs marks files of an upper
// directory.
type overlayAttrs struct {
	opaque   byte // first byte of the value
	whiteout bool
	metacopy bool
	redirect string
}

// dirAttr is what they say of a directory.
type dirAttr struct {
	opaque    bool   // hides the layers below
	xwhiteout bool   // whiteouts in it may be files with an xattr
	redirect  string // a renamed lower directory: where it was
}

// dir reads them as those of a directory (ovl_get_opaquedir_val in
// fs/overlayfs/util.c).
func (o *overlayAttrs) dir() dirAttr {
	a := dirAttr{opaque: o.opaque == 'y', xwhiteout: o.opaque == 'x'}
	if !a.opaque {
		a.redirect = o.redirect
	}
	return a
}

// xattrs reads the xattrs of a file in the working directory: those that a
// container is to see, sorted by name, and those of overlayfs.
func (t *scanThread) xattrs(name string) (list []Xattr, o overlayAttrs, err error) {
	n, err := unix.Llistxattr(name, t.buf)
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		return nil, o, fmt.Errorf("list xattrs: %w", err)
	}
	if n <= 0 {
		return nil, o, nil
	}
	t.attrs = t.attrs[:0]
	for attr := range strings.SplitSeq(strings.TrimSuffix(string(t.buf[:n]), "\x00"), "\x00") {
		t.attrs = append(t.attrs, attr)
	}
	slices.Sort(t.attrs)
	for _, attr := range t.attrs {
		keep := ValidXattr(attr)
		if !keep && !strings.HasPrefix(attr, "trusted.overlay.") {
			continue
		}
		n, err := unix.Lgetxattr(name, attr, t.buf)
		if errors.Is(err, unix.ENODATA) {
			continue
		}
		if err != nil {
			return nil, o, fmt.Errorf("read xattr %q: %w", attr, err)
		}
		value := t.buf[:n]
		if keep {
			if n > erofs.XattrValueMax {
				return nil, o, fmt.Errorf("xattr %q has %d bytes, the limit is %d: %w", attr, n, erofs.XattrValueMax, errdefs.ErrInvalidArgument)
			}
			list = append(list, Xattr{Name: attr, Value: string(value)})
			continue
		}
		switch attr {
		case XattrOpaque:
			if n > 0 {
				o.opaque = value[0]
			}
		case "trusted.overlay.whiteout":
			o.whiteout = true
		case XattrMetacopy:
			o.metacopy = true
		case XattrRedirect:
			o.redirect = string(value)
		}
	}
	return list, o, nil
}
