// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package tree

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"os"

	"github.com/containerd/errdefs"

	"github.com/nhybrid/nhybrid/internal/erofs"
)

// The on-disk format is that of fs/erofs/erofs_fs.h, its primitives are in internal/erofs; docs/tree.md says which part of it
// is used.
const (
	// The largest chunk that a chunk-based inode can have: 2^31 blocks, 8 TiB.
	chunkFormat = 31
	chunkBits   = erofs.BlockBits + chunkFormat

	xattrHeaderSize = erofs.XattrHeaderSize

	metacopyName = "trusted.overlay.metacopy"
	redirectName = "trusted.overlay.redirect"

	// volumeName tells our images from others, and its last digit the version of what we expect of one.
	volumeName = "nhybrid-tree-1"
)

// splitXattr takes the name of an xattr apart; ok is false for names that have no place in a tree: those of overlayfs
// itself, which would redirect files at will of whoever wrote the layer, and those that EROFS has no index for.
func splitXattr(name []byte) (index byte, suffix []byte, ok bool) {
	if bytes.HasPrefix(name, []byte("trusted.overlay.")) || bytes.HasPrefix(name, []byte("user.overlay.")) {
		return 0, nil, false
	}
	index, rest, ok := erofs.SplitXattr(string(name))
	return index, name[len(name)-len(rest):], ok
}

// xattrArea returns the size of the xattrs that follow the inode, for a redirect of the given length (0: none).
func xattrArea(i *inode, redirect int) int {
	n := 0
	if redirect > 0 {
		n += 4 + erofs.XattrSize(len(redirectName)-len("trusted."), redirect)
	}
	for name, value := range i.eachXattr {
		_, suffix, _ := splitXattr(name)
		n += erofs.XattrSize(len(suffix), len(value))
	}
	if n > 0 {
		n += xattrHeaderSize
	}
	return n
}

// appendXattrArea appends what xattrArea measured; sharedID is the id of the shared metacopy xattr.
func appendXattrArea(b []byte, i *inode, redirect []byte, sharedID uint32) []byte {
	if len(redirect) == 0 && len(i.xattrs) == 0 {
		return b
	}
	head := len(b)
	b = append(b, make([]byte, xattrHeaderSize)...)
	if len(redirect) > 0 {
		b[head+4] = 1 // h_shared_count
		b = binary.LittleEndian.AppendUint32(b, sharedID)
		b = erofs.AppendXattr(b, 4, redirectName[len("trusted."):], redirect)
	}
	for name, value := range i.eachXattr {
		index, suffix, _ := splitXattr(name)
		b = erofs.AppendXattr(b, index, string(suffix), value)
	}
	return b
}

// imageUUID follows from the captures, so that the same chain gives the same image.
func imageUUID(layers []*layer) (uuid [16]byte) {
	h := sha256.New()
	h.Write([]byte(volumeName))
	for _, l := range layers {
		h.Write(l.sum[:])
	}
	copy(uuid[:], h.Sum(nil))
	uuid[6] = uuid[6]&0x0f | 0x80 // version 8: made by a scheme of our own
	uuid[8] = uuid[8]&0x3f | 0x80
	return uuid
}

// VerifyImage checks that the file at path is a whole image of ours: superblock, its checksum, and the size. It does
// not read the rest. The error is of class errdefs.ErrDataLoss if the file is cut off or damaged,
// errdefs.ErrFailedPrecondition if another version wrote it, errdefs.ErrInvalidArgument if it is something else.
func VerifyImage(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open tree image: %w", err)
	}
	defer f.Close()
	want, err := erofs.CheckSuper(f, "tree", volumeName)
	if err != nil {
		return err
	}
	fi, err := f.Stat()
	if err != nil {
		return fmt.Errorf("stat tree image %q: %w", path, err)
	}
	if fi.Size() != want {
		return fmt.Errorf("tree image %q has %d bytes, its superblock says %d: %w", path, fi.Size(), want, errdefs.ErrDataLoss)
	}
	return nil
}
