// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package erofs has what writers of EROFS images share: superblock, inodes, directories. It knows the subset of the
// format that docs/store.md, docs/tree.md and docs/hif.md describe: blocks of 4096 bytes, extended inodes, and compact ones
// for the data files of views. It mounts images too.
package erofs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// The on-disk format is that of fs/erofs/erofs_fs.h.
const (
	BlockSize  = 4096
	BlockBits  = 12
	SlotSize   = 32 // nids count slots of this size from the start of the metadata (Super.MetaBlock)
	InodeSize  = 64 // extended
	direntSize = 12

	SuperOffset = 1024
	SuperSize   = 128
	superMagic  = 0xE0F5E1E2

	compatSbChksum = 1 << 0
	compatMtime    = 1 << 1

	IncompatChunkedFile = 1 << 2
	IncompatDeviceTable = 1 << 3

	LayoutPlain  = 0
	LayoutInline = 2
	LayoutChunk  = 4

	XattrHeaderSize = 12

	// NullAddr is the block address of a hole.
	NullAddr = 1<<32 - 1

	// TailMax is the longest tail that is packed behind its inode. A longer one would cost more in skipped slots than
	// in a block of its own.
	TailMax = 3072
)

// Align rounds n up to a multiple of to, a power of two.
func Align[T int | int64 | uint64](n, to T) T { return (n + to - 1) &^ (to - 1) }

// FileType is the type in a directory entry, as in linux/fs_types.h.
func FileType(mode uint32) byte {
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

// Inode is an extended inode.
type Inode struct {
	Mode, UID, GID uint32
	Sec            int64
	Nsec           uint32
	Layout         byte
	XattrSize      int    // of the area behind the inode, header included
	Size           uint64 // i_size
	U              uint32 // first data block, device number or chunk format
	Ino, Nlink     uint32
}

// Append writes the inode behind b.
func (i *Inode) Append(b []byte) []byte {
	le := binary.LittleEndian
	b = le.AppendUint16(b, 1|uint16(i.Layout)<<1) // 1: extended
	b = le.AppendUint16(b, uint16(xattrCount(i.XattrSize)))
	b = le.AppendUint16(b, uint16(i.Mode))
	b = le.AppendUint16(b, 0)
	b = le.AppendUint64(b, i.Size)
	b = le.AppendUint32(b, i.U)
	b = le.AppendUint32(b, i.Ino)
	b = le.AppendUint32(b, i.UID)
	b = le.AppendUint32(b, i.GID)
	b = le.AppendUint64(b, uint64(i.Sec))
	b = le.AppendUint32(b, i.Nsec)
	b = le.AppendUint32(b, i.Nlink)
	return append(b, zeros[:16]...)
}

// CompactSize is the size of a compact inode.
const CompactSize = 32

// AppendCompact writes the inode in the compact form, which has no times and only 32 bits of size and 16 of owners and links.
// The caller sees to it that the values fit.
func (i *Inode) AppendCompact(b []byte) []byte {
	le := binary.LittleEndian
	b = le.AppendUint16(b, uint16(i.Layout)<<1)
	b = le.AppendUint16(b, uint16(xattrCount(i.XattrSize)))
	b = le.AppendUint16(b, uint16(i.Mode))
	b = le.AppendUint16(b, uint16(i.Nlink))
	b = le.AppendUint32(b, uint32(i.Size))
	b = le.AppendUint32(b, 0)
	b = le.AppendUint32(b, i.U)
	b = le.AppendUint32(b, i.Ino)
	b = le.AppendUint16(b, uint16(i.UID))
	b = le.AppendUint16(b, uint16(i.GID))
	return le.AppendUint32(b, 0)
}

// xattrCount is the size of the xattr area as inodes say it.
func xattrCount(size int) int {
	if size == 0 {
		return 0
	}
	return (size-XattrHeaderSize)/4 + 1
}

// ParseInode reads what [Inode.Append] wrote; ok is false for anything but an extended inode.
func ParseInode(b []byte) (i Inode, ok bool) {
	if len(b) < InodeSize {
		return i, false
	}
	le := binary.LittleEndian
	format := le.Uint16(b)
	i = Inode{
		Layout: byte(format >> 1), Mode: uint32(le.Uint16(b[4:])), Size: le.Uint64(b[8:]), U: le.Uint32(b[16:]), Ino: le.Uint32(b[20:]),
		UID: le.Uint32(b[24:]), GID: le.Uint32(b[28:]), Sec: int64(le.Uint64(b[32:])), Nsec: le.Uint32(b[40:]), Nlink: le.Uint32(b[44:]),
	}
	if icount := int(le.Uint16(b[2:])); icount > 0 {
		i.XattrSize = XattrHeaderSize + (icount-1)*4
	}
	return i, format&1 == 1 && format <= 0xf
}

// Super is the part of the superblock that is used.
type Super struct {
	// Volume tells our images from others, and its last character the version of what we expect of one; at most 15 bytes.
	Volume     string
	UUID       [16]byte
	RootNid    uint16
	Inos       uint64
	Blocks     uint32
	MetaBlock  uint32 // from which nids count
	XattrBlock uint32
	Incompat   uint32
	// Devices is the number of extra devices, DeviceTable where their slots begin, in units of [DeviceSlotSize].
	Devices, DeviceTable uint16
}

// Bytes is the superblock without its checksum, which a [Writer] puts in.
func (s *Super) Bytes() []byte {
	b := make([]byte, SuperSize)
	le := binary.LittleEndian
	le.PutUint32(b[0:], superMagic)
	le.PutUint32(b[8:], compatSbChksum|compatMtime)
	b[12] = BlockBits
	le.PutUint16(b[14:], s.RootNid)
	le.PutUint64(b[16:], s.Inos)
	le.PutUint32(b[36:], s.Blocks)
	le.PutUint32(b[40:], s.MetaBlock)
	le.PutUint32(b[44:], s.XattrBlock)
	copy(b[48:64], s.UUID[:])
	copy(b[64:79], s.Volume)
	le.PutUint32(b[80:], s.Incompat)
	le.PutUint16(b[86:], s.Devices)
	le.PutUint16(b[88:], s.DeviceTable)
	return b
}

// DeviceSlotSize is the size of an entry of the device table.
const DeviceSlotSize = 128

// AppendDeviceSlot appends the entry of a device without a tag, which so must be named when the image is mounted.
func AppendDeviceSlot(b []byte, blocks uint32) []byte { return AppendTaggedSlot(b, "", blocks) }

// DeviceTagSize is the size of the tag at the start of an entry of the device table.
const DeviceTagSize = 64

// AppendTaggedSlot appends the entry of a device with a tag of at most [DeviceTagSize] bytes. The kernel does not look at
// the tag of a device that is named when the image is mounted.
func AppendTaggedSlot(b []byte, tag string, blocks uint32) []byte {
	var slot [DeviceSlotSize]byte
	copy(slot[:DeviceTagSize], tag)
	binary.LittleEndian.PutUint32(slot[64:], blocks)
	return append(b, slot[:]...)
}

// ChunkIndexSize is the size of an entry of [AppendChunk].
const ChunkIndexSize = 8

// AppendChunk appends the index of one chunk. Device 0 is the image itself.
func AppendChunk(b []byte, device uint16, block uint32) []byte {
	b = binary.LittleEndian.AppendUint16(b, 0)
	b = binary.LittleEndian.AppendUint16(b, device)
	return binary.LittleEndian.AppendUint32(b, block)
}

// ChunkIndexes is set in the chunk format (Inode.U) of inodes with entries of [AppendChunk]; the rest of the format is the
// logarithm of the chunk size in blocks.
const ChunkIndexes = 0x20

// Checksum is the crc32c of the first block from the superblock on, the checksum itself taken as zero. The kernel
// seeds with ~0 and, unlike hash/crc32, does not invert the result.
func Checksum(block []byte) uint32 {
	tab := crc32.MakeTable(crc32.Castagnoli)
	crc := crc32.Update(0, tab, block[SuperOffset:SuperOffset+4])
	crc = crc32.Update(crc, tab, make([]byte, 4))
	return ^crc32.Update(crc, tab, block[SuperOffset+8:BlockSize])
}

// SetChecksum completes the superblock in the first block of an image.
func SetChecksum(block []byte) {
	binary.LittleEndian.PutUint32(block[SuperOffset+4:], Checksum(block))
}

// CheckSuper reads the first block of an image and checks superblock, checksum and volume name; it returns the bytes that
// the superblock claims. Errors are those of [ReadSuper].
func CheckSuper(f *os.File, kind, volume string) (size int64, err error) {
	block := make([]byte, BlockSize)
	n, err := f.ReadAt(block, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return 0, fmt.Errorf("read %s image %q: %w", kind, f.Name(), err)
	}
	s, err := ReadSuper(block[:n], f.Name(), kind, volume)
	return int64(s.Blocks) * BlockSize, err
}

// ReadSuper checks superblock, checksum and volume name in the first block of an image and returns the superblock. The
// error is of class errdefs.ErrDataLoss if the image is cut off or damaged, errdefs.ErrFailedPrecondition if another
// version wrote it, errdefs.ErrInvalidArgument if it is something else. Errors name the path; kind is what they call the
// image, volume as in [Super].
func ReadSuper(block []byte, path, kind, volume string) (Super, error) {
	if len(block) < BlockSize {
		return Super{}, fmt.Errorf("%s image %q is cut off before the end of its first block: %w", kind, path, errdefs.ErrDataLoss)
	}
	super, le := block[SuperOffset:], binary.LittleEndian
	if le.Uint32(super) != superMagic {
		return Super{}, fmt.Errorf("%q is not an EROFS image: %w", path, errdefs.ErrInvalidArgument)
	}
	if le.Uint32(super[4:]) != Checksum(block) {
		return Super{}, fmt.Errorf("%s image %q is damaged, the checksum of its superblock does not match: %w", kind, path, errdefs.ErrDataLoss)
	}
	name := string(bytes.TrimRight(super[64:80], "\x00"))
	if base := volume[:len(volume)-1]; len(name) < len(base) || name[:len(base)] != base {
		return Super{}, fmt.Errorf("%q is an EROFS image of another program or kind: %w", path, errdefs.ErrInvalidArgument)
	}
	if name != volume {
		return Super{}, fmt.Errorf("%s image %q is of another version (%s, this program reads %s): %w", kind, path, name, volume, errdefs.ErrFailedPrecondition)
	}
	return Super{
		Volume: name, UUID: [16]byte(super[48:64]), RootNid: le.Uint16(super[14:]), Inos: le.Uint64(super[16:]),
		Blocks: le.Uint32(super[36:]), MetaBlock: le.Uint32(super[40:]), XattrBlock: le.Uint32(super[44:]),
		Incompat: le.Uint32(super[80:]), Devices: le.Uint16(super[86:]), DeviceTable: le.Uint16(super[88:]),
	}, nil
}

// UUID reads the UUID of an image.
func UUID(f *os.File) (uuid [16]byte, err error) {
	if _, err := f.ReadAt(uuid[:], SuperOffset+48); err != nil {
		return uuid, fmt.Errorf("read UUID of %q: %w", f.Name(), err)
	}
	return uuid, nil
}

// DeviceTags reads the tags in the device table of an image whose superblock was checked.
func DeviceTags(f *os.File) ([]string, error) {
	var super [SuperSize]byte
	if _, err := f.ReadAt(super[:], SuperOffset); err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	tags := make([]string, le.Uint16(super[86:]))
	if len(tags) == 0 {
		return nil, nil
	}
	table := make([]byte, len(tags)*DeviceSlotSize)
	if _, err := f.ReadAt(table, int64(le.Uint16(super[88:]))*DeviceSlotSize); err != nil {
		return nil, err
	}
	for i := range tags {
		tags[i] = string(bytes.TrimRight(table[i*DeviceSlotSize:][:DeviceTagSize], "\x00"))
	}
	return tags, nil
}
