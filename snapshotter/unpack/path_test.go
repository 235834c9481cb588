// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"

	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// TestRootPath holds paths through trees of directories, files and symlinks
// against fs.RootPath on the same tree on disk.
func TestRootPath(t *testing.T) {
	g := &generator{Rand: rand.New(rand.NewPCG(3, 1)), t: t, names: strings.Split("abcdefgh", "")}
	links, top := 0, scratch(t)
	for k := range 60 {
		root := filepath.Join(top, strconv.Itoa(k))
		must(t, os.Mkdir(root, 0o755))
		var entries []entry
		for range 40 {
			p := g.path()
			full := filepath.Join(root, filepath.Join("/", p))
			if parent, err := os.Lstat(filepath.Dir(full)); err != nil || !parent.IsDir() || full == root {
				continue
			}
			h := tar.Header{Name: p, Mode: 0o755, Typeflag: tar.TypeDir}
			var err error
			switch g.IntN(6) {
			case 0, 1:
				err = os.Mkdir(full, 0o755)
			case 2:
				h.Typeflag = tar.TypeReg
				var f *os.File
				if f, err = os.OpenFile(full, os.O_CREATE|os.O_EXCL, 0o644); err == nil {
					f.Close()
				}
			default:
				h.Typeflag, h.Linkname = tar.TypeSymlink, g.target()
				err = os.Symlink(h.Linkname, full)
				links++
			}
			// Where the way to it has a symlink the tar would lead elsewhere.
			if err == nil {
				if at, err := fs.RootPath(root, filepath.Dir(filepath.Join("/", p))); err != nil || at != filepath.Dir(full) {
					must(t, os.Remove(full))
					continue
				}
				entries = append(entries, entry{Header: h})
			}
		}
		a := newApplier(t.Context(), &memoryPack{}, Options{}.withDefaults())
		must(t, a.run(bytes.NewReader(tarOf(t, entries...))))
		for range 30 {
			p := g.path() + g.one("", "/", "/..", "/.", "/../"+g.one(g.names...))
			want, wantErr := fs.RootPath(root, p)
			got, err := a.tree.rootPath(p)
			if (err == nil) != (wantErr == nil) {
				t.Fatalf("%q: error %v, want %v", p, err, wantErr)
			}
			if err == nil && filepath.Join(root, got) != want {
				t.Fatalf("%q is at %q, want %q", p, got, want)
			}
		}
	}
	if links < 200 {
		t.Errorf("%d symlinks were tried", links)
	}
}

func TestImplied(t *testing.T) {
	dir := func(name string) entry {
		return entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o700}}
	}
	m, _, p, err := unpackBytes(t.Context(), tarOf(t,
		reg("a/b/c/file", "x"), dir("a/b"), // listed after what is in it
		dir("d"), reg("d/e/file", "x"), dir("d"),
		reg("f/"+whiteoutOpaque, ""), reg("g/.wh.x", ""),
		reg("h/file", "x"), reg("h", "x"), reg("i", "x"), dir("i"),
	), Options{})
	must(t, err)
	got := ofMeta(t, m, p.data)
	var implied []string
	for _, p := range slices.Sorted(maps.Keys(got)) {
		if got[p].implied {
			implied = append(implied, p)
			if got[p].mode&0o7777 != 0o755 {
				t.Errorf("%s has mode %o", p, got[p].mode)
			}
		}
	}
	if want := []string{"/", "/a", "/a/b/c", "/d/e", "/f", "/g"}; !slices.Equal(implied, want) {
		t.Errorf("implied are %v, want %v", implied, want)
	}
	if !got["/f"].opaque || !got["/g/x"].whiteout() || got["/a/b"].mode&0o7777 != 0o700 {
		t.Errorf("got %+v", got)
	}
}

// An opaque mark of the root, and one behind what stands in the directory.
func TestOpaque(t *testing.T) {
	m, _, p, err := unpackBytes(t.Context(), tarOf(t, reg("d/file", "x"), reg("d/"+whiteoutOpaque, ""), reg(whiteoutOpaque, "")), Options{})
	must(t, err)
	got := ofMeta(t, m, p.data)
	if !got["/"].opaque || !got["/d"].opaque || got["/d/file"].data != "x" || len(got) != 3 {
		t.Errorf("got %+v", got)
	}
}

func TestLongestNames(t *testing.T) {
	long := strings.Repeat("n", 255)
	m, _, p, err := unpackBytes(t.Context(), tarOf(t, reg(long, "x"), reg(whiteoutPrefix+strings.Repeat("w", 255), ""), reg(strings.Repeat("d/", 2046)+"ab", "x")), Options{})
	must(t, err)
	got := ofMeta(t, m, p.data)
	if got["/"+long].data != "x" || !got["/"+strings.Repeat("w", 255)].whiteout() {
		t.Error("names are missing")
	}
	var n *pack.Node
	for n = m.Root; len(n.Children) > 0; n = n.Children[0] {
	}
	if n.Name != "ab" {
		t.Errorf("the deepest is %q", n.Name)
	}
}

// Symlinks that lead through each other may take very long to resolve.
func TestStepsAreBounded(t *testing.T) {
	var entries []entry
	for k := range 3000 {
		entries = append(entries, reg("l/"+strings.Repeat("d/", 1000-k%2)+strconv.Itoa(k), "")) // never the same directory twice
	}
	symlink := entry{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: "l", Linkname: "r"}}
	a := newApplier(t.Context(), &memoryPack{}, Options{}.withDefaults())
	a.tree.steps = maxSteps - 10_000_000
	err := a.run(bytes.NewReader(tarOf(t, append([]entry{symlink}, entries...)...)))
	if !errors.Is(err, errTooManyLinks) || !errdefs.IsInvalidArgument(err) {
		t.Errorf("error is %v", err)
	}
	// So many are no harm where the way is short.
	entries = entries[:0]
	for k := range 50_000 {
		entries = append(entries, reg(fmt.Sprintf("l/usr/lib/python3/dist-packages/%d/%d", k%2, k), ""))
	}
	_, _, _, err = unpackBytes(t.Context(), tarOf(t, append([]entry{symlink}, entries...)...), Options{})
	must(t, err)
}
