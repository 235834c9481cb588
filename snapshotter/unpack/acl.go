// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"encoding/binary"
	"math"

	"golang.org/x/sys/unix"
)

// POSIX ACLs as the kernel takes them in xattrs: a header with the version, then
// entries of tag, permissions and ID (include/uapi/linux/posix_acl_xattr.h).
const (
	aclVersion = 2
	aclHeader  = 4
	aclEntry   = 8

	aclUserObj  = 0x01
	aclUser     = 0x02
	aclGroupObj = 0x04
	aclGroup    = 0x08
	aclMask     = 0x10
	aclOther    = 0x20
)

// parseACL returns the value as the kernel would give it back from a file of
// that type, whether setting it has an effect, and the error. An empty value
// removes the ACL. The checks come in the kernel's order (do_set_acl,
// set_posix_acl).
func parseACL(name, value string, kind uint32) (string, bool, error) {
	b := []byte(value)
	switch {
	case len(b) == 0:
	case len(b) < aclHeader:
		return "", false, unix.EINVAL
	case binary.LittleEndian.Uint32(b) != aclVersion:
		return "", false, nil // EOPNOTSUPP, which containerd ignores
	case (len(b)-aclHeader)%aclEntry != 0 || !wellFormedACL(b[aclHeader:]):
		return "", false, unix.EINVAL
	}
	dir := kind == unix.S_IFDIR
	switch {
	case kind == unix.S_IFLNK:
		return "", false, nil // EOPNOTSUPP
	case len(b) <= aclHeader:
		return "", name == xattrAccess || dir, nil
	case name == xattrDefault && !dir:
		return "", false, unix.EACCES
	case !validACL(b[aclHeader:]):
		return "", false, unix.EINVAL
	case name == xattrAccess && !aclExtended(value):
		return "", true, nil // it says no more than the mode, which is set after it
	}
	return string(b), true, nil
}

// wellFormedACL checks entries as posix_acl_from_xattr does, and clears the IDs
// of those that have none.
func wellFormedACL(entries []byte) bool {
	for ; len(entries) > 0; entries = entries[aclEntry:] {
		id := entries[4:aclEntry]
		switch binary.LittleEndian.Uint16(entries) {
		case aclUser, aclGroup:
			if binary.LittleEndian.Uint32(id) == math.MaxUint32 {
				return false
			}
		case aclUserObj, aclGroupObj, aclMask, aclOther:
			binary.LittleEndian.PutUint32(id, math.MaxUint32)
		default:
			return false
		}
	}
	return true
}

// validACL checks well-formed entries as posix_acl_valid does.
func validACL(entries []byte) bool {
	state, needsMask := aclUserObj, false
	for ; len(entries) > 0; entries = entries[aclEntry:] {
		tag, perm := int(binary.LittleEndian.Uint16(entries)), binary.LittleEndian.Uint16(entries[2:])
		if perm&^7 != 0 {
			return false
		}
		switch {
		case tag == aclUserObj && state == aclUserObj:
			state = aclUser
		case tag == aclUser && state == aclUser, tag == aclGroup && state == aclGroup:
			needsMask = true
		case tag == aclGroupObj && state == aclUser:
			state = aclGroup
		case tag == aclMask && state == aclGroup:
			state = aclOther
		case tag == aclOther && (state == aclOther || state == aclGroup && !needsMask):
			state = 0
		default:
			return false
		}
	}
	return state == 0
}

// aclExtended reports whether a valid ACL says more than a mode.
func aclExtended(value string) bool { return len(value) > aclHeader+3*aclEntry }

// aclWithMode returns a valid access ACL after a chmod (__posix_acl_chmod_masq).
// An extended one has a mask, or no named entries and then a mask too.
func aclWithMode(value string, perm uint32) string {
	b := []byte(value)
	var group []byte
	for e := b[aclHeader:]; len(e) > 0; e = e[aclEntry:] {
		switch binary.LittleEndian.Uint16(e) {
		case aclUserObj:
			binary.LittleEndian.PutUint16(e[2:], uint16(perm>>6&7))
		case aclGroupObj, aclMask:
			group = e // the mask comes after the group
		case aclOther:
			binary.LittleEndian.PutUint16(e[2:], uint16(perm&7))
		}
	}
	binary.LittleEndian.PutUint16(group[2:], uint16(perm>>3&7))
	return string(b)
}
