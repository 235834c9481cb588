// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package tree

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// The on-disk format is that of fs/erofs/erofs_fs.h; docs/tree.md says which part of it is used.
const (
	blockSize  = 4096
	blockBits  = 12
	slotSize   = 32 // nids count slots of this size from the start of the metadata, here the start of the image
	inodeSize  = 64 // extended
	direntSize = 12

	superOffset = 1024
	superSize   = 128
	superMagic  = 0xE0F5E1E2

	compatSbChksum      = 1 << 0
	compatMtime         = 1 << 1
	incompatChunkedFile = 1 << 2

	layoutPlain  = 0
	layoutInline = 2
	layoutChunk  = 4

	// The largest chunk that a chunk-based inode can have: 2^31 blocks, 8 TiB.
	chunkFormat = 31
	chunkBits   = blockBits + chunkFormat

	xattrHeaderSize = 12
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

func align[T int | uint64](n, to T) T { return (n + to - 1) &^ (to - 1) }

func xattrSize(suffix, value int) int { return align(xattrEntrySize+suffix+value, 4) }

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

// diskInode is an extended inode.
type diskInode struct {
	*inode
	layout byte
	xsize  int    // of the xattr area
	size   uint64 // i_size
	u      uint32 // first data block, device number or chunk format
	ino    uint32
	nlink  uint32
}

func (d *diskInode) append(b []byte) []byte {
	icount := 0
	if d.xsize > 0 {
		icount = (d.xsize-xattrHeaderSize)/4 + 1
	}
	le := binary.LittleEndian
	b = le.AppendUint16(b, 1|uint16(d.layout)<<1) // 1: extended
	b = le.AppendUint16(b, uint16(icount))
	b = le.AppendUint16(b, uint16(d.mode))
	b = le.AppendUint16(b, 0)
	b = le.AppendUint64(b, d.size)
	b = le.AppendUint32(b, d.u)
	b = le.AppendUint32(b, d.ino)
	b = le.AppendUint32(b, d.uid)
	b = le.AppendUint32(b, d.gid)
	b = le.AppendUint64(b, uint64(d.sec))
	b = le.AppendUint32(b, d.nsec)
	b = le.AppendUint32(b, d.nlink)
	return append(b, make([]byte, 16)...)
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

// fileType is the type in a directory entry, as in linux/fs_types.h.
func fileType(mode uint32) byte {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return 1
	case unix.S_IFDIR:
		return 2
	case unix.S_IFCHR:
		return 3
	case unix.S_IFBLK:
		return 4
	case unix.S_IFIFO:
		return 5
	case unix.S_IFSOCK:
		return 6
	}
	return 7 // symlink
}

// superblock is the part of it that is used.
type superblock struct {
	rootNid    uint16
	inos       uint64
	blocks     uint32
	xattrBlock uint32
	uuid       [16]byte
}

func (s *superblock) bytes() []byte {
	b := make([]byte, superSize)
	le := binary.LittleEndian
	le.PutUint32(b[0:], superMagic)
	le.PutUint32(b[8:], compatSbChksum|compatMtime)
	b[12] = blockBits
	le.PutUint16(b[14:], s.rootNid)
	le.PutUint64(b[16:], s.inos)
	le.PutUint32(b[36:], s.blocks)
	le.PutUint32(b[44:], s.xattrBlock)
	copy(b[48:64], s.uuid[:])
	copy(b[64:80], volumeName)
	le.PutUint32(b[80:], incompatChunkedFile)
	return b
}

// superChecksum is the crc32c of the first block from the superblock on, the checksum itself taken as zero. The kernel
// seeds with ~0 and, unlike hash/crc32, does not invert the result.
func superChecksum(block []byte) uint32 {
	tab := crc32.MakeTable(crc32.Castagnoli)
	crc := crc32.Update(0, tab, block[superOffset:superOffset+4])
	crc = crc32.Update(crc, tab, make([]byte, 4))
	return ^crc32.Update(crc, tab, block[superOffset+8:blockSize])
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
	block := make([]byte, blockSize)
	switch _, err := io.ReadFull(f, block); err {
	case nil:
	case io.EOF, io.ErrUnexpectedEOF:
		return fmt.Errorf("tree image %q is cut off before the end of its first block: %w", path, errdefs.ErrDataLoss)
	default:
		return fmt.Errorf("read tree image %q: %w", path, err)
	}
	super, le := block[superOffset:], binary.LittleEndian
	if le.Uint32(super) != superMagic {
		return fmt.Errorf("%q is not an EROFS image: %w", path, errdefs.ErrInvalidArgument)
	}
	if le.Uint32(super[4:]) != superChecksum(block) {
		return fmt.Errorf("tree image %q is damaged, the checksum of its superblock does not match: %w", path, errdefs.ErrDataLoss)
	}
	name := string(bytes.TrimRight(super[64:80], "\x00"))
	if base := volumeName[:len(volumeName)-1]; len(name) < len(base) || name[:len(base)] != base {
		return fmt.Errorf("%q is an EROFS image of another program: %w", path, errdefs.ErrInvalidArgument)
	}
	if name != volumeName {
		return fmt.Errorf("tree image %q is of another version (%s, this program reads %s): %w", path, name, volumeName, errdefs.ErrFailedPrecondition)
	}
	fi, err := f.Stat()
	if err != nil {
		return fmt.Errorf("stat tree image %q: %w", path, err)
	}
	if want := int64(le.Uint32(super[36:])) * blockSize; fi.Size() != want {
		return fmt.Errorf("tree image %q has %d bytes, its superblock says %d: %w", path, fi.Size(), want, errdefs.ErrDataLoss)
	}
	return nil
}
