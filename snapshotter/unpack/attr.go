// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"archive/tar"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

const (
	paxXattr = "SCHILY.xattr."

	xattrCapability = "security.capability"
	xattrAccess     = "system.posix_acl_access"
	xattrDefault    = "system.posix_acl_default"

	maxXattrName  = 255       // XATTR_NAME_MAX
	maxXattrValue = 1<<16 - 1 // XATTR_SIZE_MAX less one byte: EROFS has 16 bits for it
	// maxXattrs bounds names and values of one inode together. EROFS has 256 KiB,
	// with headers and prefixes; ext4 has 4 KiB.
	maxXattrs = 128 << 10
)

// setAttributes gives an inode the attributes of an entry. A hard link and a
// second entry of a directory change an inode that exists, as chown, setxattr,
// chmod and utimensat do in this order.
func (a *applier) setAttributes(i *pack.Inode, hdr *tar.Header) error {
	chown(i, hdr.Uid, hdr.Gid)
	before := xattrSize(i)
	if err := setXattrs(i, hdr.PAXRecords); err != nil {
		return bad(err)
	}
	chmod(i, uint32(hdr.Mode)&0o7777)
	setTime(i, hdr.ModTime)
	return a.spend(max(0, xattrSize(i)-before))
}

// chown sets the owner. An ID of -1 means not to change it. For all but
// directories the kernel takes away capabilities, whoever the new owner is.
func chown(i *pack.Inode, uid, gid int) {
	if id := uint32(uid); id != math.MaxUint32 {
		i.UID = id
	}
	if id := uint32(gid); id != math.MaxUint32 {
		i.GID = id
	}
	if i.Mode&unix.S_IFMT != unix.S_IFDIR {
		i.Xattrs = slices.DeleteFunc(i.Xattrs, func(x pack.Xattr) bool { return x.Name == xattrCapability })
	}
}

// chmod sets the permissions. Symlinks have none of their own.
func chmod(i *pack.Inode, perm uint32) {
	if i.Mode&unix.S_IFMT == unix.S_IFLNK {
		return
	}
	i.Mode = i.Mode&unix.S_IFMT | perm
	for k, x := range i.Xattrs {
		if x.Name == xattrAccess {
			i.Xattrs[k].Value = aclWithMode(x.Value, perm)
		}
	}
}

// setTime sets the modification time. containerd replaces times that do not fit
// into nanoseconds since 1970 by the beginning of 1970.
func setTime(i *pack.Inode, t time.Time) {
	if first := time.Unix(0, 0); t.Before(first) || t.After(time.Unix(0, math.MaxInt64)) {
		t = first
	}
	i.Sec, i.Nsec = t.Unix(), uint32(t.Nanosecond())
}

// inherit gives a new inode what it gets from its directory before it has
// attributes of its own. What an implied directory has from the layer below is
// not known here and not passed on.
func inherit(dir, i *pack.Inode) {
	if dir.Mode&unix.S_ISGID != 0 {
		i.GID = dir.GID
	}
	if i.Mode&unix.S_IFMT == unix.S_IFLNK {
		return
	}
	for _, x := range dir.Xattrs {
		if x.Name != xattrDefault {
			continue
		}
		if aclExtended(x.Value) {
			i.Xattrs = append(i.Xattrs, pack.Xattr{Name: xattrAccess, Value: x.Value})
		}
		if i.Mode&unix.S_IFMT == unix.S_IFDIR {
			i.Xattrs = append(i.Xattrs, x)
		}
	}
}

// setXattrs sets the xattrs among the PAX records of an entry.
func setXattrs(i *pack.Inode, records map[string]string) error {
	if len(records) == 0 {
		return nil
	}
	changed := false
	set := map[string]string{}
	for _, key := range slices.Sorted(maps.Keys(records)) {
		name, ok := strings.CutPrefix(key, paxXattr)
		if !ok {
			continue
		}
		value, keep, err := xattr(i, name, records[key])
		if err != nil {
			return fmt.Errorf("xattr %.300q: %w", name, err)
		}
		if !keep {
			continue
		}
		if !changed {
			changed = true
			for _, x := range i.Xattrs {
				set[x.Name] = x.Value
			}
		}
		if isACL(name) && value == "" {
			delete(set, name)
			continue
		}
		set[strings.Clone(name)] = strings.Clone(value)
	}
	if !changed {
		return nil
	}
	list := make([]pack.Xattr, 0, len(set))
	for _, name := range slices.Sorted(maps.Keys(set)) {
		list = append(list, pack.Xattr{Name: name, Value: set[name]})
	}
	i.Xattrs = list
	if n := xattrSize(i); n > maxXattrs {
		return fmt.Errorf("xattrs take %d bytes and not %d at most: %w", n, maxXattrs, unix.ENOSPC)
	}
	return nil
}

func xattrSize(i *pack.Inode) int {
	n := 0
	for _, x := range i.Xattrs {
		n += len(x.Name) + len(x.Value) + 16
	}
	return n
}

// xattr returns what setxattr makes of a name and a value on i, and whether it
// keeps them. What containerd ignores is not kept, nor is what has a meaning for
// overlayfs.
func xattr(i *pack.Inode, name, value string) (string, bool, error) {
	prefix, suffix, _ := strings.Cut(name, ".")
	switch {
	case prefix == "trusted" && len(name) > len(prefix):
		return "", false, nil
	case name == "":
		return "", false, unix.ERANGE
	case len(name) > maxXattrName:
		return "", false, unix.ERANGE
	case len(value) > maxXattrValue:
		return "", false, unix.E2BIG
	}
	kind := i.Mode & unix.S_IFMT
	switch {
	case isACL(name):
		return parseACL(name, value, kind)
	case prefix == "user" && strings.Contains(name, "."):
		if kind != unix.S_IFREG && kind != unix.S_IFDIR {
			return "", false, nil
		}
		if strings.HasPrefix(suffix, "overlay.") {
			return "", false, nil
		}
	case prefix == "security" && strings.Contains(name, "."):
		if name == xattrCapability && value != "" {
			if !validCapability(value) {
				return "", false, unix.EINVAL
			}
		}
	default:
		return "", false, nil // a name space that filesystems do not have
	}
	if suffix == "" {
		return "", false, unix.EINVAL
	}
	return value, true, nil
}

func isACL(name string) bool { return name == xattrAccess || name == xattrDefault }

// validCapability reports whether the kernel takes value for file capabilities
// (validheader in its security/commoncap.c).
func validCapability(value string) bool {
	if len(value) < 4 {
		return false
	}
	// The revision stands in the highest byte of a little-endian word, flags in
	// the lowest; there is one flag.
	if value[0]&^1 != 0 || value[1] != 0 || value[2] != 0 {
		return false
	}
	return value[3] == 2 && len(value) == 20 ||
		value[3] == 3 && len(value) == 24 && value[20:] != "\xff\xff\xff\xff" // the root user of the namespace
}
