// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package tree

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func statInode(st *unix.Stat_t) inode {
	i := inode{mode: st.Mode, uid: st.Uid, gid: st.Gid, sec: st.Mtim.Sec, nsec: uint32(st.Mtim.Nsec)}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		i.size = uint64(st.Size)
	case unix.S_IFCHR, unix.S_IFBLK:
		i.rdev = st.Rdev
	}
	return i
}

// overlayAttrs are the xattrs by which overlayfs marks files of an upper directory.
type overlayAttrs struct {
	opaque   byte // first byte of the value
	whiteout bool
	metacopy bool
	redirect string
}

// dir reads them as those of a directory (ovl_get_opaquedir_val in fs/overlayfs/util.c).
func (o *overlayAttrs) dir() dirAttr {
	a := dirAttr{opaque: o.opaque == 'y', xwhiteout: o.opaque == 'x'}
	if !a.opaque {
		a.redirect = o.redirect
	}
	return a
}

// xattrs reads the xattrs of a file in the working directory: those that belong into the tree go to t.list, sorted by
// name.
func (t *thread) xattrs(name string) (o overlayAttrs, err error) {
	t.list = t.list[:0]
	n, err := unix.Llistxattr(name, t.buf)
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		return o, fmt.Errorf("list xattrs: %w", err)
	}
	if n <= 0 {
		return o, nil
	}
	t.attrs = t.attrs[:0]
	for attr := range strings.SplitSeq(strings.TrimSuffix(string(t.buf[:n]), "\x00"), "\x00") {
		t.attrs = append(t.attrs, attr)
	}
	slices.Sort(t.attrs)
	for _, attr := range t.attrs {
		_, _, keep := splitXattr([]byte(attr))
		if !keep && !strings.HasPrefix(attr, "trusted.overlay.") {
			continue
		}
		n, err := unix.Lgetxattr(name, attr, t.buf)
		if errors.Is(err, unix.ENODATA) {
			continue
		}
		if err != nil {
			return o, fmt.Errorf("read xattr %q: %w", attr, err)
		}
		value := t.buf[:n]
		if keep {
			if n > maxValue {
				return o, fmt.Errorf("xattr %q has %d bytes, the limit is %d: %w", attr, n, maxValue, errdefs.ErrInvalidArgument)
			}
			t.list = appendString(appendString(t.list, attr), value)
			continue
		}
		switch strings.TrimPrefix(attr, "trusted.overlay.") {
		case "opaque":
			if n > 0 {
				o.opaque = value[0]
			}
		case "whiteout":
			o.whiteout = true
		case "metacopy":
			o.metacopy = true
		case "redirect":
			o.redirect = string(value)
		}
	}
	return o, nil
}
