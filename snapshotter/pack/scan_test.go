// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// TestScanStats compares with what containerd counts.
func TestScanStats(t *testing.T) {
	asRoot(t)
	seeded(t, func(t *testing.T, g *gen) {
		dir := t.TempDir()
		g.layer(dir)
		l, s := store(t, dir, 1, nil, newNVM(t), func() bool { return true })
		want, err := fs.DiskUsage(t.Context(), dir)
		noError(t, err)
		if s.Bytes != want.Size || s.Inodes != want.Inodes {
			t.Errorf("%d bytes in %d inodes, continuity counts %d in %d", s.Bytes, s.Inodes, want.Size, want.Inodes)
		}
		var count ScanStats
		var files []string
		seen := map[uint64]bool{}
		// WalkDir goes in the order of names, as numbers do.
		noError(t, filepath.Walk(dir, func(p string, fi os.FileInfo, err error) error {
			if err != nil {
				return err
			}
			var st unix.Stat_t
			noError(t, unix.Lstat(p, &st))
			count.Entries++
			if fi.IsDir() {
				count.Dirs++
			}
			if fi.Mode().IsRegular() {
				count.Files++
				if !seen[st.Ino] {
					count.DataBytes += st.Size
					if st.Size > InlineMax {
						files = append(files, p[len(dir)+1:])
					}
				}
				seen[st.Ino] = true
			}
			return nil
		}))
		if s.Entries != count.Entries || s.Files != count.Files || s.Dirs != count.Dirs || s.DataBytes != count.DataBytes {
			t.Errorf("%+v, counted %+v", s, count)
		}
		if !slices.Equal(files, l.files) {
			t.Errorf("data files are %q, want %q", l.files, files)
		}
	})
}

// paths lists a chain briefly.
func paths(t testing.TB, c Chain) (p []string) {
	t.Helper()
	for e, err := range c.Entries(t.Context()) {
		noError(t, err)
		p = append(p, e.Path)
	}
	return p
}

// scanned is the metadata of a directory.
func scanned(t testing.TB, dir string, layer uint64) *Meta {
	t.Helper()
	m, _, _, err := Scan(t.Context(), dir, layer, nil)
	noError(t, err)
	return m
}

// TestXwhiteouts: whiteouts that are files with an xattr count only where their
// directory says so.
func TestXwhiteouts(t *testing.T) {
	asRoot(t)
	base, upper := t.TempDir(), t.TempDir()
	for _, d := range []string{"x", "plain"} {
		for _, root := range []string{base, upper} {
			noError(t, os.Mkdir(filepath.Join(root, d), 0o755))
			noError(t, os.WriteFile(filepath.Join(root, d, "f"), nil, 0o644))
		}
		noError(t, os.WriteFile(filepath.Join(base, d, "g"), nil, 0o644))
		noError(t, unix.Setxattr(filepath.Join(upper, d, "f"), "trusted.overlay.whiteout", nil, 0))
	}
	// The same inode is no whiteout in another directory.
	noError(t, os.Link(filepath.Join(upper, "x/f"), filepath.Join(upper, "y")))
	noError(t, os.Link(filepath.Join(upper, "x/f"), filepath.Join(upper, "z")))
	noError(t, os.WriteFile(filepath.Join(upper, "x/full"), []byte("not empty"), 0o644))
	noError(t, unix.Setxattr(filepath.Join(upper, "x/full"), "trusted.overlay.whiteout", nil, 0))
	noError(t, unix.Setxattr(filepath.Join(upper, "x"), XattrOpaque, []byte("x"), 0))
	want := []string{"/", "/plain", "/plain/f", "/plain/g", "/x", "/x/full", "/x/g", "/y", "/z"}
	c := Chain{scanned(t, base, 1), scanned(t, upper, 2)}
	if got := paths(t, c); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	for e, err := range c.Entries(t.Context()) {
		noError(t, err)
		if linked := e.Path == "/y" || e.Path == "/z"; linked && e.Nlink != 2 {
			t.Errorf("%q has %d names", e.Path, e.Nlink)
		}
	}
}

// TestOpaqueRoot: ".wh..wh..opq" at the top of a layer hides all layers below, as
// the OCI image specification says.
func TestOpaqueRoot(t *testing.T) {
	asRoot(t)
	base, upper := t.TempDir(), t.TempDir()
	noError(t, os.WriteFile(filepath.Join(base, "old"), nil, 0o644))
	noError(t, os.WriteFile(filepath.Join(upper, "new"), nil, 0o644))
	noError(t, os.Chmod(upper, 0o750))
	noError(t, unix.Setxattr(upper, XattrOpaque, []byte("y"), 0))
	c := Chain{scanned(t, base, 1), scanned(t, upper, 2)}
	if got, want := paths(t, c), []string{"/", "/new"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	for e, err := range c.Entries(t.Context()) {
		noError(t, err)
		if e.Path == "/" && e.Mode != unix.S_IFDIR|0o750 {
			t.Errorf("root has mode %#o", e.Mode)
		}
	}
}

// TestDeepDirectories: 3000 directories in each other, with names that make their
// path longer than any that the kernel takes in one piece, and that are no UTF-8.
func TestDeepDirectories(t *testing.T) {
	asRoot(t)
	for _, test := range []struct{ depth, name int }{{3000, 4}, {60, 250}} {
		t.Run(fmt.Sprintf("%d names of %d bytes", test.depth, test.name), func(t *testing.T) {
			dir := filepath.Join(tmpfs(t), "layer") // removing such a tree takes long, unmounting does not
			noError(t, os.Mkdir(dir, 0o755))
			down := func(i int) string { return "\xff" + strings.Repeat(string(rune('a'+i%26)), test.name-1) }
			fd, err := unix.Open(dir, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
			noError(t, err)
			for i := range test.depth {
				noError(t, unix.Mkdirat(fd, down(i), 0o755))
				next, err := unix.Openat(fd, down(i), unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
				noError(t, err)
				if i%50 == 49 {
					noError(t, unix.Symlinkat("down", next, "link"))
					f, err := unix.Openat(next, "file", unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
					noError(t, err)
					_, err = unix.Write(f, []byte(fmt.Sprint(i)))
					noError(t, err)
					unix.Close(f)
				}
				unix.Close(fd)
				fd = next
			}
			unix.Close(fd)
			nvm := newNVM(t)
			l, s := store(t, dir, 1, nil, nvm, func() bool { return false })
			if want := int64(test.depth + 2*(test.depth/50) + 1); s.Entries != want {
				t.Errorf("%d entries, want %d", s.Entries, want)
			}
			f, err := os.Create(filepath.Join(t.TempDir(), "img")) // fsck.erofs gives up on such paths
			noError(t, err)
			defer f.Close()
			stats, err := WriteView(t.Context(), Chain{l.Meta}, blocksOf([]*testLayer{l}), f)
			noError(t, err)
			view := mountView(t, f.Name(), stats.Devices, []*testLayer{l}, false)
			fd, err = unix.Open(mountContainer(t, view, nvm), unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
			noError(t, err)
			defer func() { unix.Close(fd) }()
			for i := range test.depth {
				next, err := unix.Openat(fd, down(i), unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
				if err != nil {
					t.Fatalf("at depth %d: %v", i, err)
				}
				unix.Close(fd)
				fd = next
				if i%50 != 49 {
					continue
				}
				file, err := unix.Openat(fd, "file", unix.O_RDONLY|unix.O_CLOEXEC, 0)
				noError(t, err)
				b := make([]byte, 9)
				n, err := unix.Read(file, b)
				unix.Close(file)
				if err != nil || string(b[:n]) != fmt.Sprint(i) {
					t.Fatalf("the file at depth %d is %q, %v", i, b[:n], err)
				}
			}
		})
	}
}

// TestScanIsDeterministic: neither the order of the threads nor that of the
// filesystem shows.
func TestScanIsDeterministic(t *testing.T) {
	asRoot(t)
	dir := t.TempDir()
	g := &gen{Rand: newRand(7), t: t, below: map[string]bool{}}
	g.layer(dir)
	once := func() (*Meta, []string, []byte) {
		m, files, _, err := Scan(t.Context(), dir, 1, nil)
		noError(t, err)
		for _, in := range m.dataFiles() {
			in.Block = in.Data.Number
		}
		var b bytes.Buffer
		_, err = WriteView(t.Context(), Chain{m}, map[uint64]uint32{1: 1 << 20}, &b)
		noError(t, err)
		return m, files, b.Bytes()
	}
	m, files, view := once()
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(7))
	for range 5 {
		m2, files2, view2 := once()
		sameMeta(t, m, m2)
		if !slices.Equal(files, files2) {
			t.Fatalf("files are %q and %q", files, files2)
		}
		if !bytes.Equal(view, view2) {
			t.Fatal("two views differ")
		}
	}
}

// TestScanRefuses: each refusal has its class.
func TestScanRefuses(t *testing.T) {
	asRoot(t)
	dir := t.TempDir()
	if _, _, _, err := Scan(t.Context(), filepath.Join(dir, "none"), 1, nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
	if _, _, _, err := Scan(t.Context(), dir, 1, Chain{tree(1)}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a layer above itself: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, _, err := Scan(ctx, dir, 1, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// TestAuthorsXattrs: what has a meaning for overlayfs or the store is not taken
// from a layer.
func TestAuthorsXattrs(t *testing.T) {
	asRoot(t)
	dir := t.TempDir()
	noError(t, os.MkdirAll(filepath.Join(dir, "d"), 0o700))
	for _, name := range []string{"user.overlay.opaque", "user.overlay.redirect", "trusted.overlay.origin", XattrImplied, "trusted.nhybrid.x", "user.kept"} {
		noError(t, unix.Setxattr(filepath.Join(dir, "d"), name, []byte("y"), 0))
	}
	in := scanned(t, dir, 1).Root.Children[0].Inode
	if in.Implied || in.Opaque || !slices.Equal(in.Xattrs, []Xattr{{"user.kept", "y"}}) {
		t.Errorf("directory is %+v", in)
	}
}

// TestOpenBeneath: no symlink is followed, and paths are of any length.
func TestOpenBeneath(t *testing.T) {
	dir := t.TempDir()
	root, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	noError(t, err)
	defer unix.Close(root)
	noError(t, os.Mkdir(filepath.Join(dir, "d"), 0o755))
	noError(t, os.WriteFile(filepath.Join(dir, "d/f"), nil, 0o644))
	noError(t, os.Symlink("d", filepath.Join(dir, "l")))
	noError(t, os.Symlink("/", filepath.Join(dir, "d/out")))
	for path, want := range map[string]error{
		"": nil, "d": nil, "d/f": nil, "l": unix.ELOOP, "l/f": unix.ELOOP, "d/out/etc": unix.ELOOP, "../x": unix.EXDEV, "d/none": unix.ENOENT,
		"d/" + strings.Repeat("x", 5000): unix.ENAMETOOLONG, strings.Repeat("x", 5000): unix.ENAMETOOLONG,
	} {
		fd, err := OpenBeneath(root, path, unix.O_RDONLY)
		if err == nil {
			unix.Close(fd)
		}
		if !errors.Is(err, want) {
			t.Errorf("%.20q: %v, want %v", path, err, want)
		}
	}
}

// TestScanLeavesDirectory: no thread stays behind with its working directory in
// the layer, which could then not be unmounted. The main thread lives on when a
// goroutine that was locked to it ends.
func TestScanLeavesDirectory(t *testing.T) {
	asRoot(t)
	dir := t.TempDir()
	noError(t, os.Mkdir(filepath.Join(dir, "d"), 0o755))
	for range 20 {
		scanned(t, dir, 1)
		tasks, err := filepath.Glob("/proc/self/task/*/cwd")
		noError(t, err)
		for _, task := range tasks {
			if cwd, err := os.Readlink(task); err == nil && strings.HasPrefix(cwd, dir) {
				t.Fatalf("%s is %q", task, cwd)
			}
		}
	}
}
