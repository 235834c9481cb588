// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"errors"
	"io"
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

// testLayer is a layer of a test: its metadata, and its data in a pack or on NVM.
type testLayer struct {
	*Meta
	dir    string // where it was scanned
	files  []string
	pack   string
	blocks uint32
}

// largeFile is where store does not write the bytes one after the other.
const largeFile = 1 << 30

// store scans dir, packs it, and returns what the pack says. Data files go below
// nvm, and leave a hole, where pick says so.
func store(t testing.TB, dir string, layer uint64, below Chain, nvm string, pick func() bool) (*testLayer, ScanStats) {
	t.Helper()
	m, files, stats, err := Scan(t.Context(), dir, layer, below)
	noError(t, err)
	if len(files) != int(m.Numbers) {
		t.Fatalf("%d files and %d numbers", len(files), m.Numbers)
	}
	l := &testLayer{Meta: m, dir: dir, files: files, pack: filepath.Join(t.TempDir(), "pack")}
	w, err := Create(l.pack, WriterOptions{})
	noError(t, err)
	defer w.Close()
	index := m.dataFiles()
	for i, name := range files {
		in := index[uint32(i+1)]
		n, block, err := w.Begin(in.Size)
		noError(t, err)
		if n != in.Data.Number {
			t.Fatalf("%q has number %d in the metadata and %d in the pack", name, in.Data.Number, n)
		}
		switch to := nvm + "/d" + in.Data.Redirect(); {
		case pick():
			noError(t, os.MkdirAll(filepath.Dir(to), 0o755))
			f, err := os.Create(to)
			noError(t, err)
			copyAt(t, dir, name, f, 0)
			f.Close()
			noError(t, w.Hole(0))
		case in.Size > largeFile:
			noError(t, w.Hole(0))
			copyAt(t, dir, name, w.File(), int64(block)*BlockSize)
		default:
			f := openIn(t, dir, name)
			_, err := io.Copy(w, f)
			f.Close()
			noError(t, err)
		}
		_, err = w.End()
		noError(t, err)
	}
	_, err = w.Finish(m, Identity{Layer: layer})
	noError(t, err)
	p, err := Open(l.pack)
	noError(t, err)
	defer p.Close()
	l.blocks = p.Blocks()
	l.Meta, err = p.Meta(t.Context())
	noError(t, err)
	sameMeta(t, m, l.Meta)
	return l, stats
}

func openIn(t testing.TB, dir, name string) *os.File {
	t.Helper()
	root, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	noError(t, err)
	defer unix.Close(root)
	fd, err := OpenBeneath(root, name, unix.O_RDONLY|unix.O_NOFOLLOW)
	if err != nil {
		t.Fatalf("open %q: %v", name, err)
	}
	return os.NewFile(uintptr(fd), name)
}

// copyAt copies the extents of a file that are not holes.
func copyAt(t testing.TB, dir, name string, to *os.File, off int64) {
	t.Helper()
	f := openIn(t, dir, name)
	defer f.Close()
	end := int64(0)
	for {
		begin, err := unix.Seek(int(f.Fd()), end, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break
		}
		noError(t, err)
		end, err = unix.Seek(int(f.Fd()), begin, unix.SEEK_HOLE)
		noError(t, err)
		_, err = io.Copy(io.NewOffsetWriter(to, off+begin), io.NewSectionReader(f, begin, end-begin))
		noError(t, err)
	}
	fi, err := f.Stat()
	noError(t, err)
	if at, err := to.Stat(); err != nil || at.Size() < off+fi.Size() {
		noError(t, to.Truncate(off+fi.Size()))
	}
}

// blocksOf are the sizes of the packs.
func blocksOf(layers []*testLayer) map[uint64]uint32 {
	blocks := map[uint64]uint32{}
	for _, l := range layers {
		blocks[l.Layer] = l.blocks
	}
	return blocks
}

func chainOf(layers []*testLayer) (c Chain) {
	for _, l := range layers {
		c = append(c, l.Meta)
	}
	return c
}

// packsOf are the paths of the packs of the devices of a view.
func packsOf(layers []*testLayer, devices []uint64) (packs []string) {
	for _, d := range devices {
		for _, l := range layers {
			if l.Layer == d {
				packs = append(packs, l.pack)
			}
		}
	}
	return packs
}

// synthetic makes layers of metadata alone, with packs that are holes.
func synthetic(t testing.TB, metas ...*Meta) (layers []*testLayer) {
	t.Helper()
	for _, m := range metas {
		l := &testLayer{Meta: m, pack: filepath.Join(t.TempDir(), "pack"), blocks: 1 << 20}
		noError(t, os.WriteFile(l.pack, nil, 0o600))
		noError(t, os.Truncate(l.pack, int64(l.blocks)*BlockSize))
		layers = append(layers, l)
	}
	return layers
}

// writeTo writes the view of the chain into a new file and puts it before the
// judges.
func writeTo(t testing.TB, layers []*testLayer) (string, ViewStats) {
	t.Helper()
	c := chainOf(layers)
	f, err := os.Create(filepath.Join(t.TempDir(), "view.erofs"))
	noError(t, err)
	defer f.Close()
	s, err := WriteView(t.Context(), c, blocksOf(layers), f)
	noError(t, err)
	fi, err := f.Stat()
	noError(t, err)
	if fi.Size() != s.Bytes {
		t.Fatalf("image has %d bytes, WriteView said %d", fi.Size(), s.Bytes)
	}
	devices, err := ViewDevices(f.Name())
	noError(t, err)
	if !slices.Equal(devices, s.Devices) {
		t.Fatalf("image has devices %d, WriteView said %d", devices, s.Devices)
	}
	judgeView(t, c, f.Name(), s, packsOf(layers, s.Devices))
	return f.Name(), s
}

// judgeView has the image checked by our own check, fsck.erofs, and go-erofs's reader,
// which must see in t/ what Entries says. The third judge is the kernel, wherever
// the image is mounted.
func judgeView(t testing.TB, c Chain, image string, s ViewStats, packs []string) {
	t.Helper()
	noError(t, VerifyView(image))
	noError(t, VerifyViewDeep(image))
	fsck(t, image, packs)
	want := map[string]Entry{}
	inodes := map[*Inode]bool{}
	for e, err := range c.Entries(t.Context()) {
		noError(t, err)
		if _, twice := want[e.Path]; twice {
			t.Fatalf("%q is listed twice", e.Path)
		}
		want[e.Path] = e
		inodes[e.Inode] = true
	}
	if int64(len(want)) != s.Entries {
		t.Fatalf("WriteView says %d entries, Entries has %d", s.Entries, len(want))
	}
	if int64(len(inodes)) != s.Inodes {
		t.Fatalf("WriteView says %d inodes, Entries has %d", s.Inodes, len(inodes))
	}
	f, err := os.Open(image)
	noError(t, err)
	defer f.Close()
	var devices []io.ReaderAt
	for _, p := range packs {
		d, err := os.Open(p)
		noError(t, err)
		defer d.Close()
		devices = append(devices, d)
	}
	img, err := erofs.Open(f, erofs.WithExtraDevices(devices...))
	noError(t, err)
	seen := 0
	var visit func(path string, d fs.DirEntry)
	visit = func(path string, d fs.DirEntry) {
		seen++
		fi, err := d.Info()
		noError(t, err)
		e, ok := want[path]
		if !ok {
			t.Fatalf("go-erofs sees %q, which is not in the chain", path)
		}
		checkErofsStat(t, e, fi.Sys().(*erofs.Stat))
		if !d.IsDir() {
			return
		}
		entries, err := fs.ReadDir(img, "t"+strings.TrimSuffix(path, "/"))
		noError(t, err)
		for _, child := range entries {
			visit(strings.TrimSuffix(path, "/")+"/"+child.Name(), child)
		}
	}
	root, err := fs.Stat(img, "t")
	noError(t, err)
	visit("/", fs.FileInfoToDirEntry(root))
	if seen != len(want) {
		t.Fatalf("go-erofs sees %d entries, the chain has %d", seen, len(want))
	}
}

func fsck(t testing.TB, image string, packs []string) {
	t.Helper()
	var args []string
	for _, p := range packs {
		args = append(args, "--device="+p)
	}
	switch path, err := exec.LookPath("fsck.erofs"); {
	case err == nil:
		if out, err := exec.Command(path, append(args, image)...).CombinedOutput(); err != nil {
			t.Fatalf("fsck.erofs: %v\n%s", err, out)
		}
	case os.Getenv("CI") != "":
		t.Fatal("fsck.erofs is missing: install erofs-utils")
	}
}

func checkErofsStat(t testing.TB, e Entry, st *erofs.Stat) {
	t.Helper()
	want := map[string]string{}
	for _, x := range e.Xattrs {
		want[x.Name] = x.Value
	}
	if e.HasData() {
		want[XattrRedirect], want[XattrMetacopy] = e.Data.Redirect(), ""
	}
	got := map[string]string{}
	for k, v := range st.Xattrs {
		got[strings.TrimSuffix(k, ".")] = v // go-erofs puts a dot behind the names of ACLs
	}
	if !maps.Equal(want, got) {
		t.Fatalf("%q: go-erofs sees xattrs %q, want %q", e.Path, got, want)
	}
	size := e.Size
	if e.Mode&unix.S_IFMT == unix.S_IFLNK {
		size = int64(len(e.Inline))
	}
	if int64(st.Mtime) != e.Sec || st.MtimeNs != e.Nsec || st.UID != e.UID || st.GID != e.GID ||
		e.Mode&unix.S_IFMT != unix.S_IFDIR && (st.Size != size || st.Nlink != int(e.Nlink)) || uint32(st.Mode.Perm()) != e.Mode&0o777 {
		t.Fatalf("%q: go-erofs sees %+v, want %+v", e.Path, *st, e)
	}
}

// mountView mounts the view of the layers.
func mountView(t testing.TB, image string, devices []uint64, layers []*testLayer, useLoop bool) string {
	t.Helper()
	point := filepath.Join(t.TempDir(), "view")
	_, err := MountView(image, point, packsOf(layers, devices), useLoop)
	noError(t, err)
	t.Cleanup(func() {
		if Mounted(point) {
			unmount(t, point)
		}
	})
	if !Mounted(point) {
		t.Fatalf("nothing is mounted on %q", point)
	}
	return point
}

// unmount waits for children of other tests that are being made: until they
// execute something they have all files open.
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

// mountOverlay mounts an overlay by the mount API, which has no limit on the
// length of the options.
func mountOverlay(t testing.TB, options ...string) string {
	t.Helper()
	fd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	noError(t, err)
	defer unix.Close(fd)
	for _, o := range options {
		key, value, _ := strings.Cut(o, "=")
		if err := unix.FsconfigSetString(fd, key, value); err != nil {
			t.Fatalf("overlay option %q: %v", o, err)
		}
	}
	noError(t, unix.FsconfigCreate(fd))
	mnt, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, 0)
	noError(t, err)
	defer unix.Close(mnt)
	dir := t.TempDir()
	noError(t, unix.MoveMount(mnt, "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH))
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

// containerOptions are the mount options of a container, in the form that goes
// through mount(2).
func containerOptions(view, nvm string, more ...string) string {
	return strings.Join(append([]string{"lowerdir=" + view + "/t::" + nvm + "/d::" + view + "/h"}, more...), ",")
}

// mountContainer mounts a container on a view.
func mountContainer(t testing.TB, view, nvm string, more ...string) string {
	t.Helper()
	dir := t.TempDir()
	noError(t, unix.Mount("overlay", dir, "overlay", 0, containerOptions(view, nvm, more...)))
	t.Cleanup(func() { unmount(t, dir) })
	return dir
}

// newNVM is an NVM root.
func newNVM(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	noError(t, os.Mkdir(filepath.Join(dir, "d"), 0o755))
	return dir
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
