// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/pkg/archive"
	"golang.org/x/sys/unix"
)

// tarLayer makes a tar with directories that it does not list, and the list of
// those it does.
func (g *gen) tarLayer() (_ []byte, listed map[string]bool) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	kind := map[string]byte{} // of each path in the layer, implied ones too
	listed = map[string]bool{}
	for range 1 + g.IntN(12) {
		var path string
		free := true
		for range 1 + g.IntN(4) {
			path = strings.TrimPrefix(path+"/"+string(rune('a'+g.IntN(3))), "/")
			if k := kind[path]; k != 0 && k != tar.TypeDir {
				free = false
			}
		}
		if _, there := kind[path]; there || !free {
			continue
		}
		for p := filepath.Dir(path); p != "."; p = filepath.Dir(p) {
			kind[p] = tar.TypeDir
		}
		h := &tar.Header{Name: path, Uid: g.IntN(1000), Gid: g.IntN(1000), Mode: g.Int64N(0o1000), Format: tar.FormatPAX}
		switch g.IntN(6) {
		case 0:
			kind[path] = 'w'
			h.Name = filepath.Join(filepath.Dir(path), ".wh."+filepath.Base(path))
			h.Typeflag = tar.TypeReg
		case 1, 2:
			kind[path] = tar.TypeReg
			h.Typeflag = tar.TypeReg
		default:
			kind[path], h.Typeflag, listed[path] = tar.TypeDir, tar.TypeDir, true
			if g.IntN(2) == 0 {
				h.PAXRecords = map[string]string{"SCHILY.xattr.user.x": fmt.Sprint(g.IntN(99))}
			}
		}
		noError(g.t, w.WriteHeader(h))
		if h.Typeflag == tar.TypeDir && g.IntN(3) == 0 {
			noError(g.t, w.WriteHeader(&tar.Header{Name: path + "/.wh..wh..opq", Typeflag: tar.TypeReg, Format: tar.FormatPAX}))
		}
	}
	noError(g.t, w.Close())
	return b.Bytes(), listed
}

// markImplied marks what the tar of the layer does not list.
func markImplied(m *Meta, listed map[string]bool) {
	type dir struct {
		node *Node
		path string
	}
	for todo := []dir{{m.Root, ""}}; len(todo) > 0; {
		d := todo[0]
		todo = todo[1:]
		d.node.Inode.Implied = !listed[d.path]
		for _, c := range d.node.Children {
			if c.Dir() {
				todo = append(todo, dir{c, strings.TrimPrefix(d.path+"/"+c.Name, "/")})
			}
		}
	}
}

// attributesOf lists owners, modes and xattrs of a chain. Times are left out: what
// containerd's applier copies changes with the next file in the directory.
func attributesOf(t testing.TB, c Chain) (all []string) {
	t.Helper()
	for e, err := range c.Entries(t.Context()) {
		noError(t, err)
		if e.Path != "/" { // the directory of a snapshot is made by the snapshotter
			all = append(all, fmt.Sprintf("%s %o %d:%d %v", e.Path, e.Mode, e.UID, e.GID, e.Xattrs))
		}
	}
	return all
}

// TestImpliedAsContainerd compares with layers that containerd's applier has
// written one above the other.
func TestImpliedAsContainerd(t *testing.T) {
	asRoot(t)
	seeded(t, func(t *testing.T, g *gen) {
		apply := func(data []byte, parents []string) (string, error) {
			dir := t.TempDir()
			_, err := archive.Apply(t.Context(), dir, bytes.NewReader(data),
				archive.WithConvertWhiteout(archive.OverlayConvertWhiteout), archive.WithParents(parents))
			return dir, err
		}
		var want, got Chain
		var dirs []string
		layers := 2 + g.IntN(3)
		for i := 0; i < layers; {
			data, listed := g.tarLayer()
			dir, err := apply(data, dirs)
			if errors.Is(err, unix.ENOTDIR) {
				continue // the applier refuses a file in place of a lower parent
			}
			noError(t, err)
			want = append(want, scanned(t, dir, uint64(i)))
			alone, err := apply(data, nil)
			noError(t, err)
			m := scanned(t, alone, uint64(i))
			markImplied(m, listed)
			got, dirs = append(got, m), append([]string{dir}, dirs...)
			i++
		}
		if w, g := attributesOf(t, want), attributesOf(t, got); !slices.Equal(w, g) {
			t.Errorf("got\n%s\nwant\n%s", strings.Join(g, "\n"), strings.Join(w, "\n"))
		}
	})
}
