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
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/internal/erofs"
)

// The on-disk format is that of fs/erofs/erofs_fs.h, its primitives are in internal/erofs; docs/tree.md says which part of it
// is used.
const (
	// The largest chunk that a chunk-based inode can have: 2^31 blocks, 8 TiB.
	chunkFormat = 31
	chunkBits   = erofs.BlockBits + chunkFormat

	xattrHeaderSize = erofs.XattrHeaderSize
	xattrEntrySize  = 4

	metacopyName = "trusted.overlay.metacopy"
	redirectName = "trusted.overlay.redirect"

	// volumeName tells our images from others, and its last digit the version of what we expect of one.
	volumeName = "nhybrid-tree-1"
)

// xattrPrefixes are the name prefixes that EROFS knows, with their indexes. The ACL names have no suffix.
var xattrPrefixes = []struct {
	prefix string
	index  byte
	whole  bool
}{
	{"user.", 1, false},
	{"system.posix_acl_access", 2, true},
	{"system.posix_acl_default", 3, true},
	{"trusted.", 4, false},
	{"security.", 6, false},
}

// splitXattr takes the name of an xattr apart; ok is false for names that have no place in a tree: those of overlayfs
// itself, which would redirect files at will of whoever wrote the layer, and those that EROFS has no index for.
func splitXattr(name []byte) (index byte, suffix []byte, ok bool) {
	if bytes.HasPrefix(name, []byte("trusted.overlay.")) || bytes.HasPrefix(name, []byte("user.overlay.")) {
		return 0, nil, false
	}
	for _, p := range xattrPrefixes {
		if suffix, found := bytes.CutPrefix(name, []byte(p.prefix)); found {
			return p.index, suffix, p.whole == (len(suffix) == 0)
		}
	}
	return 0, nil, false
}

func xattrSize(suffix, value int) int { return erofs.Align(xattrEntrySize+suffix+value, 4) }

// appendXattr appends one entry of an xattr list.
func appendXattr(b []byte, index byte, suffix, value []byte) []byte {
	size := len(b) + xattrSize(len(suffix), len(value))
	b = append(b, byte(len(suffix)), index)
	b = binary.LittleEndian.AppendUint16(b, uint16(len(value)))
	b = append(append(b, suffix...), value...)
	for len(b) < size {
		b = append(b, 0)
	}
	return b
}

// xattrArea returns the size of the xattrs that follow the inode, for a redirect of the given length (0: none).
func xattrArea(i *inode, redirect int) int {
	n := 0
	if redirect > 0 {
		n += 4 + xattrSize(len(redirectName)-len("trusted."), redirect)
	}
	for name, value := range i.eachXattr {
		_, suffix, _ := splitXattr(name)
		n += xattrSize(len(suffix), len(value))
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
		b = appendXattr(b, 4, []byte(redirectName[len("trusted."):]), redirect)
	}
	for name, value := range i.eachXattr {
		index, suffix, _ := splitXattr(name)
		b = appendXattr(b, index, suffix, value)
	}
	return b
}

// encodeDev is the kernel's new_encode_dev.
func encodeDev(rdev uint64) uint32 {
	maj, min := unix.Major(rdev), unix.Minor(rdev)
	return min&0xff | maj<<8 | (min&^0xff)<<12
}

// devFits tells whether rdev is a device number of Linux: 12 bits of major, 20 of minor.
func devFits(rdev uint64) bool {
	maj, min := unix.Major(rdev), unix.Minor(rdev)
	return maj < 1<<12 && min < 1<<20 && rdev == unix.Mkdev(maj, min)
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
