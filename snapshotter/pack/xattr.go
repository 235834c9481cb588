// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"encoding/binary"

	"github.com/nhybrid/nhybrid/internal/erofs"
)

const (
	trusted     = "trusted."
	trustedType = 4 // EROFS_XATTR_INDEX_TRUSTED
)

// xattrArea returns the size of the xattrs that follow an inode in t/, for a
// redirect of the given length (0: none).
func xattrArea(i *Inode, redirect int) int {
	n := 0
	if redirect > 0 {
		n += 4 + erofs.XattrSize(len(XattrRedirect)-len(trusted), redirect)
	}
	for x := range i.Xattrs {
		_, suffix, _ := erofs.SplitXattr(i.Xattrs[x].Name)
		n += erofs.XattrSize(len(suffix), len(i.Xattrs[x].Value))
	}
	if n > 0 {
		n += erofs.XattrHeaderSize
	}
	return n
}

// appendXattrArea appends what xattrArea measured; shared is the id of the
// shared metacopy xattr.
func appendXattrArea(b []byte, i *Inode, redirect string, shared uint32) []byte {
	if redirect == "" && len(i.Xattrs) == 0 {
		return b
	}
	head := len(b)
	b = append(b, zeros[:erofs.XattrHeaderSize]...)
	if redirect != "" {
		b[head+4] = 1 // h_shared_count
		b = binary.LittleEndian.AppendUint32(b, shared)
		b = erofs.AppendXattr(b, trustedType, XattrRedirect[len(trusted):], redirect)
	}
	for x := range i.Xattrs {
		index, suffix, _ := erofs.SplitXattr(i.Xattrs[x].Name)
		b = erofs.AppendXattr(b, index, suffix, i.Xattrs[x].Value)
	}
	return b
}
