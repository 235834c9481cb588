// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package tree

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
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

// synth makes captures of layers that are on no disk.
type synth struct {
	body  []byte
	count int64
}

func (s *synth) add(depth int, flags byte, name string, i inode) *synth {
	s.count++
	s.body = appendName(s.body, depth, flags|inodeFlags(&i), name)
	s.body = appendInode(s.body, &i)
	return s
}

func (s *synth) root() *synth { return s.add(0, 0, "", inode{mode: unix.S_IFDIR | 0o755}) }

// bytes are a whole capture file, with all checksums right.
func (s *synth) bytes(id string) []byte {
	var b bytes.Buffer
	head := append(appendHeader(nil, id), s.body...)
	b.Write(head)
	h := sha256.New()
	h.Write(head)
	if err := writeTrailer(&b, &Stats{Entries: s.count}, h); err != nil {
		panic(err) // a bytes.Buffer takes all
	}
	return b.Bytes()
}

func (s *synth) file(t testing.TB, id string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "m")
	must(t, os.WriteFile(name, s.bytes(id), 0o600))
	return name
}

// TestStats compares with what containerd counts.
func TestStats(t *testing.T) {
	requireRoot(t)
	seeded(t, func(t *testing.T, g *gen) {
		dir := t.TempDir()
		g.layer(dir)
		_, s := captureTo(t, dir, "1", nil)
		want, err := fs.DiskUsage(t.Context(), dir)
		must(t, err)
		if s.Bytes != want.Size || s.Inodes != want.Inodes {
			t.Errorf("%d bytes in %d inodes, continuity counts %d in %d", s.Bytes, s.Inodes, want.Size, want.Inodes)
		}
		var count Stats
		seen := map[uint64]bool{}
		must(t, filepath.Walk(dir, func(p string, fi os.FileInfo, err error) error {
			if err != nil {
				return err
			}
			var st unix.Stat_t
			must(t, unix.Lstat(p, &st))
			count.Entries++
			if fi.IsDir() {
				count.Dirs++
			}
			if fi.Mode().IsRegular() {
				count.Files++
				if !seen[st.Ino] {
					count.DataBytes += st.Size
				}
				seen[st.Ino] = true
			}
			return nil
		}))
		if s.Entries != count.Entries || s.Files != count.Files || s.Dirs != count.Dirs || s.DataBytes != count.DataBytes {
			t.Errorf("%+v, counted %+v", s, count)
		}
	})
}

// paths lists a chain briefly.
func paths(t testing.TB, c Chain) (p []string) {
	t.Helper()
	for e, err := range c.Entries(t.Context()) {
		must(t, err)
		p = append(p, e.Path)
	}
	return p
}

// TestXwhiteouts: whiteouts that are files with an xattr count only where their directory says so.
func TestXwhiteouts(t *testing.T) {
	requireRoot(t)
	base, upper := t.TempDir(), t.TempDir()
	for _, d := range []string{"x", "plain"} {
		for _, root := range []string{base, upper} {
			must(t, os.Mkdir(filepath.Join(root, d), 0o755))
			must(t, os.WriteFile(filepath.Join(root, d, "f"), nil, 0o644))
		}
		must(t, os.WriteFile(filepath.Join(base, d, "g"), nil, 0o644))
		must(t, unix.Setxattr(filepath.Join(upper, d, "f"), "trusted.overlay.whiteout", nil, 0))
	}
	must(t, os.WriteFile(filepath.Join(upper, "x/full"), []byte("not empty"), 0o644))
	must(t, unix.Setxattr(filepath.Join(upper, "x/full"), "trusted.overlay.whiteout", nil, 0))
	must(t, unix.Setxattr(filepath.Join(upper, "x"), "trusted.overlay.opaque", []byte("x"), 0))
	a, _ := captureTo(t, base, "1", nil)
	b, _ := captureTo(t, upper, "2", nil)
	want := []string{"/", "/plain", "/plain/f", "/plain/g", "/x", "/x/full", "/x/g"}
	if got := paths(t, Chain{a, b}); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// TestOpaqueRoot: ".wh..wh..opq" at the top of a layer hides all layers below, as the OCI image specification says.
func TestOpaqueRoot(t *testing.T) {
	requireRoot(t)
	base, upper := t.TempDir(), t.TempDir()
	must(t, os.WriteFile(filepath.Join(base, "old"), nil, 0o644))
	must(t, os.WriteFile(filepath.Join(upper, "new"), nil, 0o644))
	must(t, os.Chmod(base, 0o711))
	must(t, os.Chmod(upper, 0o750))
	must(t, unix.Setxattr(upper, "trusted.overlay.opaque", []byte("y"), 0))
	a, _ := captureTo(t, base, "1", nil)
	b, _ := captureTo(t, upper, "2", nil)
	if got, want := paths(t, Chain{a, b}), []string{"/", "/new"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	// The root's attributes are those of the topmost layer.
	dir := mountTree(t, writeTo(t, Chain{a, b}))
	fi, err := os.Stat(dir)
	must(t, err)
	if fi.Mode().Perm() != 0o750 {
		t.Errorf("root has mode %v", fi.Mode())
	}
}

// TestDeepDirectories: a tree of directories deeper than any path that the kernel takes in one piece.
func TestDeepDirectories(t *testing.T) {
	requireRoot(t)
	const depth, name = 40, 200
	dir := t.TempDir()
	fd, err := unix.Open(dir, unix.O_DIRECTORY, 0)
	must(t, err)
	down := func(i int) string { return strings.Repeat(string(rune('a'+i%26)), name) }
	for i := range depth {
		must(t, unix.Mkdirat(fd, down(i), 0o755))
		next, err := unix.Openat(fd, down(i), unix.O_DIRECTORY, 0)
		must(t, err)
		must(t, unix.Symlinkat("down", next, "link"))
		f, err := unix.Openat(next, "file", unix.O_CREAT|unix.O_WRONLY, 0o644)
		must(t, err)
		_, err = unix.Write(f, []byte("x"))
		must(t, err)
		unix.Close(f)
		unix.Close(fd)
		fd = next
	}
	unix.Close(fd)
	capture, s := captureTo(t, dir, "1", nil)
	if want := int64(3*depth + 1); s.Entries != want || s.Unreachable != depth-20 {
		t.Errorf("%d entries and %d unreachable, want %d and %d", s.Entries, s.Unreachable, want, depth-20)
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "img")) // fsck.erofs gives up on such paths
	must(t, err)
	defer f.Close()
	_, err = Write(t.Context(), Chain{capture}, f)
	must(t, err)
	r := newRoots(t)
	r.fill(t, Chain{capture}, map[string]string{"1": dir}, func() bool { return true })
	fd, err = unix.Open(r.mount(t, mountTree(t, f.Name())), unix.O_DIRECTORY, 0)
	must(t, err)
	defer func() { unix.Close(fd) }()
	for i := range depth {
		next, err := unix.Openat(fd, down(i), unix.O_DIRECTORY, 0)
		if err != nil {
			t.Fatalf("at depth %d: %v", i, err)
		}
		unix.Close(fd)
		fd = next
		var st unix.Stat_t
		must(t, unix.Fstatat(fd, "file", &st, 0))
		file, err := unix.Openat(fd, "file", unix.O_RDONLY, 0)
		unix.Close(file)
		if i < 20 && err != nil || i >= 20 && !errors.Is(err, unix.ENAMETOOLONG) {
			t.Errorf("file at depth %d: open: %v", i, err)
		}
	}
}

// TestCaptureIsDeterministic: neither the order of the threads nor that of the filesystem shows.
func TestCaptureIsDeterministic(t *testing.T) {
	requireRoot(t)
	dir := t.TempDir()
	g := &gen{Rand: newRand(7), t: t, below: map[string]bool{}}
	g.layer(dir)
	a, _ := captureTo(t, dir, "1", nil)
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(7))
	for range 5 {
		b, _ := captureTo(t, dir, "1", nil)
		if !bytes.Equal(read(t, a), read(t, b)) {
			t.Fatal("two captures differ")
		}
		x, y := writeTo(t, Chain{a}), writeTo(t, Chain{b})
		if !bytes.Equal(read(t, x), read(t, y)) {
			t.Fatal("two images differ")
		}
	}
}

func read(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(name)
	must(t, err)
	return b
}

// TestCaptureRefuses: each refusal has its class and names what is wrong.
func TestCaptureRefuses(t *testing.T) {
	requireRoot(t)
	dir := t.TempDir()
	for _, id := range []string{"", ".", "..", "a/b", "a\x00b", strings.Repeat("x", 256)} {
		if _, err := Capture(t.Context(), dir, id, nil, io.Discard); !errdefs.IsInvalidArgument(err) {
			t.Errorf("layer id %q: %v", id, err)
		}
	}
	if _, err := Capture(t.Context(), filepath.Join(dir, "none"), "1", nil, io.Discard); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Capture(ctx, dir, "1", nil, io.Discard); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if _, err := Capture(t.Context(), dir, "1", nil, failing{}); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("full: %v", err)
	}
}

// failing is a file on a full disk.
type failing struct{}

func (failing) Write([]byte) (int, error) { return 0, unix.ENOSPC }

// TestVerifyCapture damages a capture in every way.
func TestVerifyCapture(t *testing.T) {
	good := new(synth).root().add(1, 0, "f", inode{mode: unix.S_IFREG, size: 1}).bytes("17")
	name := filepath.Join(t.TempDir(), "m")
	check := func(what string, data []byte, is func(error) bool) {
		t.Helper()
		must(t, os.WriteFile(name, data, 0o600))
		err := VerifyCapture(name)
		if !is(err) {
			t.Errorf("%s: %v", what, err)
		}
		if err != nil && !strings.Contains(err.Error(), name) {
			t.Errorf("%s: the error does not name the file: %v", what, err)
		}
		if _, werr := Write(t.Context(), Chain{name}, io.Discard); (werr == nil) != (err == nil) {
			t.Errorf("%s: Write says %v, VerifyCapture %v", what, werr, err)
		}
	}
	check("whole", good, func(err error) bool { return err == nil })
	for n := range good {
		check(fmt.Sprintf("cut off at %d", n), good[:n], errdefs.IsDataLoss)
	}
	check("longer", append(slices.Clone(good), 0), errdefs.IsDataLoss)
	for i := len(captureMagic) + 2; i < len(good); i++ {
		bad := slices.Clone(good)
		bad[i] ^= 1 << (i % 8)
		check(fmt.Sprintf("bit flipped at %d", i), bad, errdefs.IsDataLoss)
	}
	newer := slices.Clone(good)
	newer[len(captureMagic)] = captureVersion + 1
	check("newer version", newer, func(err error) bool {
		return errdefs.IsFailedPrecondition(err) && strings.Contains(err.Error(), fmt.Sprint("version ", captureVersion+1))
	})
	check("foreign", append([]byte("#!/bin/sh\n"), good...), errdefs.IsInvalidArgument)
	if err := VerifyCapture(name + "x"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
}

// TestMalformedCaptures have right checksums and wrong contents.
func TestMalformedCaptures(t *testing.T) {
	file := inode{mode: unix.S_IFREG | 0o644, size: 1}
	dir := inode{mode: unix.S_IFDIR | 0o755}
	with := func(f func(i *inode)) inode { i := file; f(&i); return i }
	xattr := func(name string) []byte { return appendString(appendString([]byte(nil), name), "v") }
	link := func(to uint64) *synth {
		s := new(synth).root()
		s.add(1, 0, "a", with(func(i *inode) { i.multi, i.redirect = true, []byte("/1/a") }))
		s.body = append(appendName(s.body, 1, flagLink, "b"), byte(to))
		s.count++
		return s
	}
	at := uint64(len(appendHeader(nil, "1")) + len(new(synth).root().body))
	if err := VerifyCapture(link(at).file(t, "1")); err != nil {
		t.Fatalf("a right hard link: %v", err)
	}
	for what, s := range map[string]*synth{
		"nothing":                  new(synth),
		"no root":                  new(synth).add(1, 0, "a", file),
		"a file as root":           new(synth).add(0, 0, "", file),
		"two roots":                new(synth).root().root(),
		"a named root":             new(synth).add(0, 0, "x", dir),
		"no directory":             new(synth).root().add(2, 0, "a", file),
		"a file in a file":         new(synth).root().add(1, 0, "a", file).add(2, 0, "b", file),
		"a file in a whiteout":     {count: 3, body: appendInode(appendName(appendName(new(synth).root().body, 1, flagWhiteout, "a"), 2, 0, "b"), &dir)},
		"wrong order":              new(synth).root().add(1, 0, "b", file).add(1, 0, "a", file),
		"a name twice":             new(synth).root().add(1, 0, "a", file).add(1, 0, "a", file),
		"order after a directory":  new(synth).root().add(1, 0, "b", dir).add(2, 0, "x", file).add(1, 0, "a", file),
		"an empty name":            new(synth).root().add(1, 0, "", file),
		"a dot":                    new(synth).root().add(1, 0, ".", file),
		"two dots":                 new(synth).root().add(1, 0, "..", file),
		"a slash":                  new(synth).root().add(1, 0, "a/b", file),
		"a zero byte":              new(synth).root().add(1, 0, "a\x00", file),
		"a long name":              new(synth).root().add(1, 0, strings.Repeat("n", 256), file),
		"an unknown type":          new(synth).root().add(1, 0, "a", with(func(i *inode) { i.mode = 0o644 })),
		"an unknown flag":          new(synth).root().add(1, 0x80, "a", file),
		"an opaque file":           new(synth).root().add(1, flagOpaque, "a", file),
		"a negative size":          new(synth).root().add(1, 0, "a", with(func(i *inode) { i.size = 1 << 63 })),
		"too many nanoseconds":     new(synth).root().add(1, 0, "a", with(func(i *inode) { i.nsec = 1e9 })),
		"an empty symlink":         new(synth).root().add(1, 0, "a", inode{mode: unix.S_IFLNK}),
		"a redirect of nothing":    new(synth).root().add(1, 0, "a", with(func(i *inode) { i.size, i.redirect = 0, []byte("/1/a") })),
		"a relative redirect":      new(synth).root().add(1, 0, "a", with(func(i *inode) { i.redirect = []byte("1/a") })),
		"a redirect to a layer":    new(synth).root().add(1, 0, "a", with(func(i *inode) { i.redirect = []byte("/1") })),
		"a redirect upwards":       new(synth).root().add(1, 0, "a", with(func(i *inode) { i.redirect = []byte("/1/../2") })),
		"links without a redirect": new(synth).root().add(1, 0, "a", with(func(i *inode) { i.multi = true })),
		"a link to the root":       link(at - 1),
		"a link to itself":         link(at + 30),
		"overlay's own xattr":      new(synth).root().add(1, 0, "a", with(func(i *inode) { i.xattrs = xattr("trusted.overlay.redirect") })),
		"overlay's user xattr":     new(synth).root().add(1, 0, "a", with(func(i *inode) { i.xattrs = xattr("user.overlay.metacopy") })),
		"an unknown xattr":         new(synth).root().add(1, 0, "a", with(func(i *inode) { i.xattrs = xattr("system.x") })),
		"a nameless xattr":         new(synth).root().add(1, 0, "a", with(func(i *inode) { i.xattrs = xattr("user.") })),
		"xattrs out of order":      new(synth).root().add(1, 0, "a", with(func(i *inode) { i.xattrs = append(xattr("user.b"), xattr("user.a")...) })),
		"cut off xattrs":           new(synth).root().add(1, 0, "a", with(func(i *inode) { i.xattrs = xattr("user.b")[:7] })),
		"an impossible device":     new(synth).root().add(1, 0, "a", inode{mode: unix.S_IFBLK, rdev: 1 << 62}),
		"a wrong count":            {count: 9, body: new(synth).root().body},
		"half an entry":            {count: 1, body: new(synth).root().body[:4]},
	} {
		path := s.file(t, "1")
		if err := VerifyCapture(path); !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: VerifyCapture: %v", what, err)
		}
		if _, err := Write(t.Context(), Chain{path}, io.Discard); !errdefs.IsDataLoss(err) {
			t.Errorf("%s: Write: %v", what, err)
		}
		last := error(nil)
		for _, err := range (Chain{path}).Entries(t.Context()) {
			last = err
		}
		if !errdefs.IsDataLoss(last) {
			t.Errorf("%s: Entries: %v", what, last)
		}
	}
}
