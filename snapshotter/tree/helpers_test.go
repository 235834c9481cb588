// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package tree

import (
	"errors"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/erofs/go-erofs"
	"golang.org/x/sys/unix"
)

func requireRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: mounts, device nodes, trusted xattrs")
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// captureTo captures dir into a new file and checks the file.
func captureTo(t testing.TB, dir, id string, parent Chain) (string, Stats) {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "m"))
	must(t, err)
	defer f.Close()
	s, err := Capture(t.Context(), dir, id, parent, f)
	must(t, err)
	gotID, gotStats, err := ReadStats(f.Name())
	must(t, err)
	if gotID != id || gotStats != s {
		t.Fatalf("capture of layer %s says layer %s with %+v, Capture said %+v", id, gotID, gotStats, s)
	}
	return f.Name(), s
}

// writeTo writes the tree of the chain into a new file and puts it before the judges.
func writeTo(t testing.TB, c Chain) string {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "tree.erofs"))
	must(t, err)
	defer f.Close()
	s, err := Write(t.Context(), c, f)
	must(t, err)
	fi, err := f.Stat()
	must(t, err)
	if fi.Size() != s.Bytes {
		t.Fatalf("image has %d bytes, Write said %d", fi.Size(), s.Bytes)
	}
	judge(t, c, f.Name(), s)
	return f.Name()
}

// judge has the image checked by our own check, fsck.erofs, and go-erofs's reader, which must see what Entries says.
// The third judge is the kernel, wherever the image is mounted.
func judge(t testing.TB, c Chain, image string, s TreeStats) {
	t.Helper()
	must(t, VerifyImage(image))
	switch path, err := exec.LookPath("fsck.erofs"); {
	case err == nil:
		if out, err := exec.Command(path, image).CombinedOutput(); err != nil {
			t.Fatalf("fsck.erofs: %v\n%s", err, out)
		}
	case os.Getenv("CI") != "":
		t.Fatal("fsck.erofs is missing: install erofs-utils")
	}
	want := map[string]Entry{}
	inodes := map[uint64]bool{}
	for e, err := range c.Entries(t.Context()) {
		must(t, err)
		if _, twice := want[e.Path]; twice {
			t.Fatalf("%q is listed twice", e.Path)
		}
		want[e.Path] = e
		inodes[e.Inode] = true
	}
	if int64(len(want)) != s.Entries || int64(len(inodes)) != s.Inodes {
		t.Fatalf("Write says %d entries and %d inodes, Entries has %d and %d", s.Entries, s.Inodes, len(want), len(inodes))
	}
	f, err := os.Open(image)
	must(t, err)
	defer f.Close()
	img, err := erofs.Open(f)
	must(t, err)
	seen := 0
	var visit func(path string, d fs.DirEntry)
	visit = func(path string, d fs.DirEntry) {
		seen++
		fi, err := d.Info()
		must(t, err)
		e, ok := want[path]
		if !ok {
			t.Fatalf("go-erofs sees %q, which is not in the chain", path)
		}
		st := fi.Sys().(*erofs.Stat)
		checkErofsStat(t, e, st)
		if !d.IsDir() {
			return
		}
		entries, err := fs.ReadDir(img, strings.TrimPrefix(path, "/")+map[bool]string{true: "."}[path == "/"])
		must(t, err)
		for _, child := range entries {
			visit(strings.TrimSuffix(path, "/")+"/"+child.Name(), child)
		}
	}
	root, err := fs.Stat(img, ".")
	must(t, err)
	visit("/", fs.FileInfoToDirEntry(root))
	if seen != len(want) {
		t.Fatalf("go-erofs sees %d entries, the chain has %d", seen, len(want))
	}
}

func checkErofsStat(t testing.TB, e Entry, st *erofs.Stat) {
	t.Helper()
	want := map[string]string{}
	for k, v := range e.Xattrs {
		want[k] = string(v)
	}
	if e.Redirect != "" {
		want[redirectName], want[metacopyName] = e.Redirect, ""
	}
	got := map[string]string{}
	for k, v := range st.Xattrs {
		got[strings.TrimSuffix(k, ".")] = v // go-erofs puts a dot behind the names of ACLs
	}
	if !maps.Equal(want, got) {
		t.Fatalf("%q: go-erofs sees xattrs %q, want %q", e.Path, got, want)
	}
	if int64(st.Mtime) != e.Sec || st.MtimeNs != e.Nsec || st.UID != e.UID || st.GID != e.GID ||
		!isDir(e.Mode) && (st.Size != e.Size || st.Nlink != int(e.Nlink)) || uint32(st.Mode.Perm()) != e.Mode&0o777 {
		t.Fatalf("%q: go-erofs sees %+v, want %+v", e.Path, *st, e)
	}
}

// mountTree mounts an image, from the file or, on kernels that cannot, through a loop device.
func mountTree(t testing.TB, image string) string {
	t.Helper()
	dir := t.TempDir()
	err := unix.Mount(image, dir, "erofs", unix.MS_RDONLY, "")
	if errors.Is(err, unix.ENOTBLK) || errors.Is(err, unix.EINVAL) {
		if out, lerr := exec.Command("mount", "-t", "erofs", "-o", "ro,loop", image, dir).CombinedOutput(); lerr != nil {
			t.Fatalf("mount %s: %v, by loop: %v\n%s", image, err, lerr, out)
		}
	} else {
		must(t, err)
	}
	t.Cleanup(func() { unmount(t, dir) })
	return dir
}

// unmount waits for children of other tests that are being made: until they execute something they have all files open.
func unmount(t testing.TB, dir string) {
	err := unix.Unmount(dir, 0)
	for end := time.Now().Add(10 * time.Second); errors.Is(err, unix.EBUSY) && time.Now().Before(end); err = unix.Unmount(dir, 0) {
		time.Sleep(time.Millisecond)
	}
	if err != nil {
		t.Errorf("unmount %s: %v", dir, err)
		_ = unix.Unmount(dir, unix.MNT_DETACH)
	}
}

// mountOverlay mounts an overlay by the mount API, which has no limit on the length of the options.
func mountOverlay(t testing.TB, options ...string) string {
	t.Helper()
	fd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	must(t, err)
	defer unix.Close(fd)
	for _, o := range options {
		key, value, _ := strings.Cut(o, "=")
		if err := unix.FsconfigSetString(fd, key, value); err != nil {
			t.Fatalf("overlay option %q: %v", o, err)
		}
	}
	must(t, unix.FsconfigCreate(fd))
	mnt, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(mnt)
	dir := t.TempDir()
	must(t, unix.MoveMount(mnt, "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH))
	t.Cleanup(func() { unmount(t, dir) })
	return dir
}

// overlayLayers mounts layers as overlayfs does it for everybody: the reference.
func overlayLayers(t testing.TB, dirs []string, options ...string) string {
	t.Helper()
	var o []string
	for _, d := range slices.Backward(dirs) {
		o = append(o, "lowerdir+="+d)
	}
	if len(dirs) == 1 && len(options) == 0 { // one lower alone needs a second
		o = append(o, "lowerdir+="+t.TempDir())
	}
	return mountOverlay(t, append(o, options...)...)
}

// roots are two data roots.
type roots struct{ nvm, hdd string }

func newRoots(t testing.TB) roots {
	r := roots{t.TempDir(), t.TempDir()}
	return r
}

// options are the mount options of a container, in the form that goes through mount(2).
func (r roots) options(tree string, more ...string) string {
	o := []string{"lowerdir+=" + tree, "datadir+=" + r.nvm, "datadir+=" + r.hdd}
	return strings.Join(append(o, more...), ",")
}

func (r roots) mount(t testing.TB, tree string, more ...string) string {
	t.Helper()
	dir := t.TempDir()
	must(t, unix.Mount("overlay", dir, "overlay", 0, r.options(tree, more...)))
	t.Cleanup(func() { unmount(t, dir) })
	return dir
}

// fill puts the data of the layer in dir below the roots, where pick chooses. The files are linked, not copied.
func (r roots) fill(t testing.TB, c Chain, dirs map[string]string, pick func() bool) {
	t.Helper()
	for e, err := range c.Entries(t.Context()) {
		must(t, err)
		if e.Redirect == "" || len(e.Redirect) > maxTarget {
			continue
		}
		if exists(r.nvm+e.Redirect) || exists(r.hdd+e.Redirect) {
			continue
		}
		to := r.hdd
		if pick() {
			to = r.nvm
		}
		id, path, _ := strings.Cut(e.Redirect[1:], "/")
		must(t, os.MkdirAll(filepath.Dir(to+e.Redirect), 0o755))
		must(t, os.Link(filepath.Join(dirs[id], path), to+e.Redirect))
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func epoch(sec int64) time.Time { return time.Unix(sec, 0) }
