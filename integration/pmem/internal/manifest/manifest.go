// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package manifest describes every file below a directory, so that a root filesystem can be compared with what it ought to be.
// The package is pure but for Read.
package manifest

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// File is all that a program in a container can tell about a file.
type File struct {
	Mode   uint32            `json:"mode"` // as in stat(2): type and permissions
	UID    uint32            `json:"uid"`
	GID    uint32            `json:"gid"`
	Size   int64             `json:"size"` // regular files only
	Mtime  int64             `json:"mtime"`
	Links  uint32            `json:"links"` // not for directories
	Rdev   uint64            `json:"rdev"`
	Digest string            `json:"digest"` // SHA-256 in hex, regular files only
	Target string            `json:"target"` // symlinks only
	Xattrs map[string]string `json:"xattrs"`
}

// Tree maps a path, relative and clean, to its file. The root itself is not part of it.
type Tree map[string]File

// Clone returns a tree that can be changed without changing t.
func (t Tree) Clone() Tree { return maps.Clone(t) }

// Remove takes a path and everything below it out of t.
func (t Tree) Remove(name string) {
	delete(t, name)
	maps.DeleteFunc(t, func(p string, _ File) bool { return strings.HasPrefix(p, name+"/") })
}

// Rename moves a path and everything below it.
func (t Tree) Rename(from, to string) {
	for p, f := range t.Clone() {
		if p == from || strings.HasPrefix(p, from+"/") {
			delete(t, p)
			t[path.Join(to, strings.TrimPrefix(p, from))] = f
		}
	}
}

// Read describes what stands below dir. Extended attributes are read from the namespaces that images may carry.
func Read(dir string) (Tree, error) {
	tree := Tree{}
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, name)
		if err != nil || rel == "." {
			return err
		}
		f, err := read(name)
		if err != nil {
			return fmt.Errorf("describe %q: %w", rel, err)
		}
		tree[rel] = f
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read tree %q: %w", dir, err)
	}
	return tree, nil
}

func read(name string) (File, error) {
	var st unix.Stat_t
	if err := unix.Lstat(name, &st); err != nil {
		return File{}, err
	}
	f := File{Mode: st.Mode, UID: st.Uid, GID: st.Gid, Mtime: st.Mtim.Nano(), Rdev: st.Rdev, Links: uint32(st.Nlink)}
	var err error
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		f.Links = 0
	case unix.S_IFREG:
		f.Size = st.Size
		f.Digest, err = digest(name)
	case unix.S_IFLNK:
		f.Target, err = os.Readlink(name)
	}
	if err != nil {
		return File{}, err
	}
	f.Xattrs, err = xattrs(name)
	return f, err
}

func digest(name string) (string, error) {
	data, err := os.ReadFile(name)
	if err != nil {
		return "", err
	}
	return Digest(data), nil
}

// Digest is the form in which File holds the content of a regular file.
func Digest(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

func xattrs(name string) (map[string]string, error) {
	buf := make([]byte, 4096)
	n, err := unix.Llistxattr(name, buf)
	if err != nil {
		return nil, fmt.Errorf("list attributes: %w", err)
	}
	var attrs map[string]string
	for key := range strings.SplitSeq(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		if !strings.HasPrefix(key, "user.") && !strings.HasPrefix(key, "security.") && !strings.HasPrefix(key, "trusted.") {
			continue
		}
		value := make([]byte, 4096)
		n, err := unix.Lgetxattr(name, key, value)
		if errors.Is(err, unix.ENODATA) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read attribute %q: %w", key, err)
		}
		if attrs == nil {
			attrs = map[string]string{}
		}
		attrs[key] = hex.EncodeToString(value[:n])
	}
	return attrs, nil
}

// Seconds returns a copy of t with the times cut to whole seconds, which is all that containerd's own layers of a commit hold.
func (t Tree) Seconds() Tree {
	cut := t.Clone()
	for name, f := range cut {
		f.Mtime -= f.Mtime % 1e9
		cut[name] = f
	}
	return cut
}

// Differences says in one line each how got differs from want, in the order of paths; none when they are equal.
func Differences(want, got Tree) []string {
	var diffs []string
	for _, p := range slices.Sorted(maps.Keys(want)) {
		g, ok := got[p]
		if !ok {
			diffs = append(diffs, fmt.Sprintf("%s: is missing", p))
			continue
		}
		if d := want[p].differences(g); len(d) > 0 {
			diffs = append(diffs, p+": "+strings.Join(d, ", "))
		}
	}
	for _, p := range slices.Sorted(maps.Keys(got)) {
		if _, ok := want[p]; !ok {
			diffs = append(diffs, fmt.Sprintf("%s: should not be there", p))
		}
	}
	return diffs
}

func (f File) differences(got File) []string {
	var diffs []string
	for _, field := range []struct {
		name      string
		want, got any
	}{
		{"mode", fmt.Sprintf("%#o", f.Mode), fmt.Sprintf("%#o", got.Mode)}, {"uid", f.UID, got.UID}, {"gid", f.GID, got.GID},
		{"size", f.Size, got.Size}, {"mtime", f.Mtime, got.Mtime}, {"links", f.Links, got.Links}, {"rdev", f.Rdev, got.Rdev},
		{"digest", f.Digest, got.Digest}, {"target", f.Target, got.Target},
	} {
		if field.want != field.got {
			diffs = append(diffs, fmt.Sprintf("%s is %v, want %v", field.name, field.got, field.want))
		}
	}
	if !maps.Equal(f.Xattrs, got.Xattrs) {
		diffs = append(diffs, fmt.Sprintf("attributes are %v, want %v", got.Xattrs, f.Xattrs))
	}
	return diffs
}
