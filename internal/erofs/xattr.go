// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package erofs

import (
	"encoding/binary"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	xattrEntrySize = 4
	// XattrAreaMax is the largest xattr area that an inode can have, header included.
	XattrAreaMax = XattrHeaderSize + (1<<16-2)*4
	// XattrValueMax is the longest value of an xattr.
	XattrValueMax = 1<<16 - 1
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

// SplitXattr takes the name of an xattr apart; ok is false for names that EROFS has no index for.
func SplitXattr(name string) (index byte, suffix string, ok bool) {
	for _, p := range xattrPrefixes {
		if suffix, found := strings.CutPrefix(name, p.prefix); found {
			return p.index, suffix, p.whole == (len(suffix) == 0)
		}
	}
	return 0, "", false
}

// XattrPrefix is the prefix of names with this index; ok is false for an index that [SplitXattr] does not return.
func XattrPrefix(index byte) (prefix string, ok bool) {
	for _, p := range xattrPrefixes {
		if p.index == index {
			return p.prefix, true
		}
	}
	return "", false
}

// XattrSize is the size of an entry in an xattr list, from the lengths of suffix and value.
func XattrSize(suffix, value int) int { return Align(xattrEntrySize+suffix+value, 4) }

// AppendXattr appends one entry of an xattr list.
func AppendXattr[T string | []byte](b []byte, index byte, suffix string, value T) []byte {
	size := len(b) + XattrSize(len(suffix), len(value))
	b = append(b, byte(len(suffix)), index)
	b = binary.LittleEndian.AppendUint16(b, uint16(len(value)))
	b = append(append(b, suffix...), value...)
	for len(b) < size {
		b = append(b, 0)
	}
	return b
}

// CutXattr takes the first entry off an xattr list; ok is false if it is cut off.
func CutXattr(b []byte) (index byte, suffix, value, rest []byte, ok bool) {
	if len(b) < xattrEntrySize {
		return 0, nil, nil, nil, false
	}
	suffixEnd := xattrEntrySize + int(b[0])
	end := suffixEnd + int(binary.LittleEndian.Uint16(b[2:]))
	if Align(end, 4) > len(b) {
		return 0, nil, nil, nil, false
	}
	return b[1], b[xattrEntrySize:suffixEnd], b[suffixEnd:end], b[Align(end, 4):], true
}

// EncodeDev is the number of a device as it stands in an inode, the kernel's new_encode_dev; ok is false if rdev is not a
// device number of Linux: 12 bits of major, 20 of minor.
func EncodeDev(rdev uint64) (dev uint32, ok bool) {
	maj, minor := unix.Major(rdev), unix.Minor(rdev)
	ok = maj < 1<<12 && minor < 1<<20 && rdev == unix.Mkdev(maj, minor)
	return minor&0xff | maj<<8 | (minor&^0xff)<<12, ok
}

// DecodeDev is the inverse of [EncodeDev].
func DecodeDev(dev uint32) (rdev uint64) {
	return unix.Mkdev(dev>>8&0xfff, dev&0xff|dev>>12&0xfff00)
}
