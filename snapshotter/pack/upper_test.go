// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// stack is a chain on which containers run one after the other, each on what the
// last one left.
type stack struct {
	t      testing.TB
	nvm    string
	layers []*testLayer
	pick   func() bool
	loop   bool
}

func newStack(t testing.TB, pick func() bool) *stack {
	return &stack{t: t, nvm: newNVM(t), pick: pick}
}

// add packs dir as the topmost layer.
func (s *stack) add(dir string) {
	s.t.Helper()
	l, _ := store(s.t, dir, uint64(10+len(s.layers)), chainOf(s.layers), s.nvm, s.pick)
	s.layers = append(s.layers, l)
}

func (s *stack) mount() string {
	s.t.Helper()
	image, stats := writeTo(s.t, s.layers)
	return mountView(s.t, image, stats.Devices, s.layers, s.loop)
}

// container mounts the chain with an upper directory, runs f in it, and returns
// the upper and what was seen at the end.
func (s *stack) container(f func(root string), options ...string) (upper string, seen map[string]file) {
	s.t.Helper()
	upper, work := s.t.TempDir(), s.t.TempDir()
	noError(s.t, os.Chmod(upper, 0o755))
	options = append(options, "upperdir="+upper, "workdir="+work)
	root := mountContainer(s.t, s.mount(), s.nvm, options...)
	f(root)
	return upper, list(s.t, root)
}

// view lists what a container on the chain sees.
func (s *stack) view() map[string]file {
	s.t.Helper()
	return listView(s.t, mountContainer(s.t, s.mount(), s.nvm))
}

// unlinked removes the link groups: overlayfs keeps those of lower files over a rename of their directory, a layer
// cannot.
func unlinked(files map[string]file) map[string]file {
	out := map[string]file{}
	for name, f := range files {
		f.Names = ""
		out[name] = f
	}
	return out
}

// TestUpperTrial holds down what the kernel leaves behind with metacopy=on, on which the resolution rests, and that
// the layer shows what the container showed.
func TestUpperTrial(t *testing.T) {
	asRoot(t)
	for what, size := range map[string]int{"inline": 0, "data files": InlineMax} {
		t.Run(what, func(t *testing.T) { upperTrial(t, strings.Repeat("x", size)) })
	}
}

func upperTrial(t *testing.T, more string) {
	s := newStack(t, func() bool { return false })
	base := t.TempDir()
	for _, name := range []string{"changed", "moved", "linked", "dir/a", "dir/sub/b", "dir/sub/deep/c", "other/x", "far/y/z", "whole", "gone"} {
		noError(t, os.MkdirAll(filepath.Dir(filepath.Join(base, name)), 0o755))
		noError(t, os.WriteFile(filepath.Join(base, name), []byte("data of "+name+more), 0o644))
	}
	noError(t, os.WriteFile(filepath.Join(base, "empty"), nil, 0o644))
	noError(t, os.Link(filepath.Join(base, "dir/a"), filepath.Join(base, "dir/a2")))
	s.add(base)

	upper, seen := s.container(func(root string) {
		at := func(p string) string { return filepath.Join(root, p) }
		noError(t, os.Chmod(at("changed"), 0o600))
		noError(t, os.Chown(at("empty"), 3, 4))
		noError(t, os.Rename(at("moved"), at("moved1")))
		noError(t, os.Rename(at("moved1"), at("dir/moved2")))
		noError(t, os.Link(at("linked"), at("linked2")))
		noError(t, os.Link(at("linked"), at("other/linked3")))
		noError(t, os.Rename(at("dir"), at("dir1"))) // by name
		noError(t, os.Rename(at("dir1"), at("dir2")))
		noError(t, os.Rename(at("dir2/sub"), at("dir2/sub2"))) // within a renamed one
		noError(t, os.Chmod(at("dir2/sub2/b"), 0o640))
		noError(t, os.Mkdir(at("new"), 0o700))
		noError(t, os.Rename(at("dir2/sub2/deep"), at("new/deep"))) // out of it, by path
		noError(t, os.Rename(at("far/y"), at("new/y")))
		noError(t, os.WriteFile(at("new/y/added"), []byte("added"), 0o644))
		noError(t, os.Remove(at("gone")))
		noError(t, os.WriteFile(at("whole"), []byte("rewritten"), 0o644))
		noError(t, os.Remove(at("other/x")))
		noError(t, os.Rename(at("other"), at("another"))) // with a whiteout in it
	}, "metacopy=on")

	for path, want := range map[string]string{"dir2": "dir", "new/deep": "/dir/sub/deep", "new/y": "/far/y", "dir2/moved2": "/moved", "linked": "/linked"} {
		buf := make([]byte, 4096)
		n, err := unix.Lgetxattr(filepath.Join(upper, path), XattrRedirect, buf)
		if err != nil || string(buf[:n]) != want {
			t.Errorf("the kernel left redirect %q, %v at %q, expected %q", buf[:max(n, 0)], err, path, want)
		}
	}
	if _, err := unix.Lgetxattr(filepath.Join(upper, "changed"), XattrMetacopy, nil); err != nil {
		t.Errorf("chmod did not leave a file without data: %v", err)
	}
	s.add(upper)
	got := s.view()
	same(t, "committed", unlinked(seen), unlinked(got))
	for name, want := range map[string]string{
		"/linked":   `["/another/linked3" "/linked" "/linked2"]`,
		"/dir2/a":   `["/dir2/a" "/dir2/a2"]`,
		"/dir2/sub": "",
	} {
		if got[name].Names != want {
			t.Errorf("names of %q are %s, want %s", name, got[name].Names, want)
		}
	}

	// Without its parent such a layer cannot be understood.
	for _, parent := range []Chain{nil, {tree(9)}} {
		if _, _, _, err := Scan(t.Context(), upper, 12, parent); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("scan over %d foreign layers: %v", len(parent), err)
		}
	}
}

// TestUpperDataRedirect: an upper may also name the data themselves.
func TestUpperDataRedirect(t *testing.T) {
	asRoot(t)
	s := newStack(t, func() bool { return true })
	base := t.TempDir()
	noError(t, os.WriteFile(filepath.Join(base, "f"), bytes.Repeat([]byte("data"), InlineMax), 0o644))
	s.add(base)
	upper := t.TempDir()
	f := filepath.Join(upper, "g")
	noError(t, os.WriteFile(f, nil, 0o600))
	noError(t, os.Truncate(f, 4*InlineMax))
	noError(t, unix.Setxattr(f, XattrMetacopy, nil, 0))
	noError(t, unix.Setxattr(f, XattrRedirect, []byte("/10/01/1"), 0))
	s.add(upper)
	if got, want := s.view()["/g"].Sum, sumOf(t, filepath.Join(base, "f")); got != want {
		t.Errorf("content of /g is %s, want %s", got, want)
	}
	// What is not in the chain is not for an upper to name.
	for _, redirect := range []string{"/99/01/1", "/10/02/2", "/10/01/01", "/10/01", "nothing"} {
		noError(t, unix.Setxattr(f, XattrRedirect, []byte(redirect), 0))
		if _, _, _, err := Scan(t.Context(), upper, 12, chainOf(s.layers)); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("redirect to %q: %v", redirect, err)
		}
	}
}

// TestUpperRandom lets random containers run on random chains, commits them, and compares.
func TestUpperRandom(t *testing.T) {
	asRoot(t)
	seeded(t, func(t *testing.T, g *gen) {
		s := newStack(t, func() bool { return g.IntN(2) == 0 })
		for range 1 + g.IntN(3) {
			dir := t.TempDir()
			g.layer(dir)
			s.add(dir)
		}
		for range 1 + g.IntN(3) {
			var options []string
			if g.IntN(4) > 0 {
				options = []string{"metacopy=on"}
			}
			upper, seen := s.container(func(root string) {
				for range g.IntN(40) {
					g.operate(root)
				}
			}, options...)
			s.add(upper)
			same(t, "committed", unlinked(seen), unlinked(s.view()))
		}
	})
}

// operate does one random thing to a random file below root. What the kernel refuses is left.
func (g *gen) operate(root string) {
	var paths []string
	noError(g.t, filepath.WalkDir(root, func(p string, d os.DirEntry, err error) error {
		if err == nil && p != root {
			paths = append(paths, p)
		}
		return nil
	}))
	var dirs []string
	for _, p := range append([]string{root}, paths...) {
		if fi, err := os.Lstat(p); err == nil && fi.IsDir() {
			dirs = append(dirs, p)
		}
	}
	fresh := filepath.Join(dirs[g.IntN(len(dirs))], fmt.Sprintf("n%d", g.IntN(1000)))
	if len(paths) == 0 {
		create(fresh)
		return
	}
	p := paths[g.IntN(len(paths))]
	fi, err := os.Lstat(p)
	if err != nil {
		return
	}
	switch g.IntN(14) {
	case 0, 1:
		if fi.Mode()&os.ModeSymlink == 0 {
			_ = os.Chmod(p, os.FileMode(g.IntN(0o1000)))
		}
	case 2:
		_ = os.Lchown(p, g.IntN(70000), g.IntN(70000))
	case 3, 4, 5:
		_ = os.Rename(p, fresh)
	case 6:
		_ = os.Rename(p, paths[g.IntN(len(paths))])
	case 7:
		d := dirs[g.IntN(len(dirs))]
		if d != root {
			_ = os.Rename(d, fresh)
		}
	case 8:
		if !fi.IsDir() {
			_ = os.Link(p, fresh)
		}
	case 9:
		os.Remove(p)
	case 10:
		if g.IntN(3) == 0 {
			os.RemoveAll(p)
		}
	case 11:
		_ = os.Mkdir(fresh, 0o755)
	case 12:
		if fi.Mode().IsRegular() {
			if f, err := os.OpenFile(p, os.O_WRONLY|os.O_APPEND, 0); err == nil {
				_, _ = f.WriteString("more")
				f.Close()
			}
		} else {
			create(fresh)
		}
	case 13:
		_ = unix.Lsetxattr(p, "trusted.set", []byte{byte(g.IntN(256))}, 0)
	}
}

// create makes a new file. It opens nothing that exists: that could be a FIFO, and wait for ever.
func create(path string) {
	if f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644); err == nil {
		_, _ = f.WriteString(path)
		f.Close()
	}
}
