// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// file is all that can be seen of a file.
type file struct {
	Mode, UID, GID uint32
	Size           int64
	Sec, Nsec      int64
	Rdev           uint64
	Target, Sum    string
	Xattrs         string
	Names          string // of all names of the inode, if there are several
}

// list lists everything below root, the root as "". Names that a directory lists and that cannot be looked up are left
// out: overlayfs lists the whiteouts of a directory that only one layer has.
func list(t testing.TB, root string) map[string]file {
	t.Helper()
	files, _ := listLinks(t, root)
	return files
}

// listView is list, and checks that link counts are the visible names. Over the layers themselves they are not:
// there they count hidden names too.
func listView(t testing.TB, root string) map[string]file {
	t.Helper()
	files, wrong := listLinks(t, root)
	for _, w := range wrong {
		t.Errorf("wrong link count: %s", w)
	}
	return files
}

func listLinks(t testing.TB, root string) (_ map[string]file, wrong []string) {
	t.Helper()
	files := map[string]file{}
	type id struct{ dev, ino uint64 }
	names := map[id][]string{}
	nlinks := map[id]int{}
	var visit func(rel string)
	visit = func(rel string) {
		path := root + rel
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			if errors.Is(err, unix.ENOENT) {
				return
			}
			t.Fatalf("stat %q: %v", path, err)
		}
		f := file{Mode: st.Mode, UID: st.Uid, GID: st.Gid, Sec: st.Mtim.Sec, Nsec: st.Mtim.Nsec, Xattrs: xattrsOf(t, path)}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			f.Size = st.Size
			f.Sum = sumOf(t, path)
		case unix.S_IFLNK:
			f.Size = st.Size
			var err error
			f.Target, err = os.Readlink(path)
			noError(t, err)
		case unix.S_IFCHR, unix.S_IFBLK:
			f.Rdev = st.Rdev
		case unix.S_IFDIR:
			dir, err := os.Open(path)
			noError(t, err)
			entries, err := dir.Readdirnames(-1)
			dir.Close()
			noError(t, err)
			for _, e := range entries {
				visit(rel + "/" + e)
			}
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			k := id{st.Dev, st.Ino}
			names[k] = append(names[k], rel)
			nlinks[k] = int(st.Nlink)
		}
		files[rel] = f
	}
	visit("")
	for k, group := range names {
		if nlinks[k] != len(group) {
			wrong = append(wrong, fmt.Sprintf("%d for %q", nlinks[k], group))
		}
		if len(group) > 1 {
			slices.Sort(group)
			for _, name := range group {
				f := files[name]
				f.Names = fmt.Sprintf("%q", group)
				files[name] = f
			}
		}
	}
	return files, wrong
}

func xattrsOf(t testing.TB, path string) string {
	t.Helper()
	buf := make([]byte, 1<<16)
	n, err := unix.Llistxattr(path, buf)
	noError(t, err)
	var all []string
	for _, name := range strings.Split(string(buf[:n]), "\x00") {
		if name == "" || strings.HasPrefix(name, "user.overlay.") || strings.HasPrefix(name, "trusted.overlay.") ||
			name == XattrImplied {
			continue // never in a view; judgeView sees to it
		}
		v := make([]byte, 1<<16)
		n, err := unix.Lgetxattr(path, name, v)
		if err != nil {
			t.Fatalf("%q: xattr %q: %v", path, name, err)
		}
		all = append(all, fmt.Sprintf("%q=%x", name, sha256.Sum256(v[:n])))
	}
	slices.Sort(all)
	return strings.Join(all, " ")
}

func sumOf(t testing.TB, path string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatalf("open %q: %v", path, err)
	}
	defer f.Close()
	h := sha256.New()
	_, err = io.Copy(h, f)
	noError(t, err)
	return fmt.Sprintf("%x", h.Sum(nil))
}

// same compares two listings.
func same(t testing.TB, what string, want, got map[string]file) {
	t.Helper()
	bad := 0
	for name, w := range want {
		g, ok := got[name]
		switch {
		case !ok:
			t.Errorf("%s: %q is missing", what, name)
		case g != w:
			t.Errorf("%s: %q is\n%+v, want\n%+v", what, name, g, w)
		default:
			continue
		}
		bad++
	}
	for name := range got {
		if _, ok := want[name]; !ok {
			t.Errorf("%s: %q should not be there", what, name)
			bad++
		}
	}
	if bad > 0 {
		t.Fatalf("%s: %d of %d names differ", what, bad, len(want))
	}
}
