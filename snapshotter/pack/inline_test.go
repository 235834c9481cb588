// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestInline: small files of each size, at all places of a block, stand in pack and view as themselves. None of them
// has a number, a place below h/, or anything that overlayfs must resolve.
func TestInline(t *testing.T) {
	asRoot(t)
	m := newMaker(t, 5)
	want := map[string][]byte{}
	for size := range InlineMax + 2 {
		name := fmt.Sprintf("f%03d", size)
		want[name] = bytes.Repeat([]byte{0xff}, size)
		switch {
		case size == 0 || size > InlineMax:
			m.add(m.meta.Root, name, m.file(want[name], false))
		default:
			in := inlineFile(want[name])
			if size%3 == 0 {
				in.Xattrs = []Xattr{{"user.x", string(make([]byte, size%37))}}
			}
			m.add(m.meta.Root, name, in)
		}
	}
	linked := inlineFile([]byte("linked"))
	linked.Nlink = 3
	for _, name := range []string{"l1", "l2", "l3"} {
		want[name] = []byte("linked")
		m.add(m.meta.Root, name, linked)
	}
	p := m.finish()
	judge(t, p.File().Name())
	if p.t.numbers != 1 || m.stats.Files != InlineMax+2 {
		t.Errorf("%d numbers, %+v", p.t.numbers, m.stats)
	}
	got, err := p.Meta(t.Context())
	noError(t, err)
	sameMeta(t, m.meta, got)
	layers := []*testLayer{{Meta: got, pack: p.File().Name(), blocks: p.Blocks()}}
	image, stats := writeTo(t, layers)
	if stats.Files != 1 {
		t.Errorf("the view has %d data files", stats.Files)
	}
	view := mountView(t, image, stats.Devices, layers, false)
	for what, root := range map[string]string{
		"pack": mountPack(t, p.File().Name()), "view": filepath.Join(view, "t"), "container": mountContainer(t, view, newNVM(t)),
	} {
		for name, data := range want {
			if what == "view" && len(data) > InlineMax {
				continue // a hole
			}
			b, err := os.ReadFile(filepath.Join(root, name))
			if err != nil || !bytes.Equal(b, data) {
				t.Errorf("%s: %q has %d bytes, %v", what, name, len(b), err)
			}
			for _, x := range []string{XattrMetacopy, XattrRedirect} {
				if _, err := unix.Lgetxattr(filepath.Join(root, name), x, nil); err == nil {
					t.Errorf("%s: %q has %s", what, name, x)
				}
			}
			var st unix.Stat_t
			noError(t, unix.Lstat(filepath.Join(root, name), &st))
			if links := map[bool]uint64{true: 3, false: 1}[name[0] == 'l']; st.Nlink != links {
				t.Errorf("%s: %q has %d links", what, name, st.Nlink)
			}
		}
	}
}

// TestInlineCopyUp: a container that changes small files leaves a layer of small files, whatever the kernel has copied
// up, and what is not small any more becomes a data file, and the reverse.
func TestInlineCopyUp(t *testing.T) {
	asRoot(t)
	for _, options := range [][]string{nil, {"metacopy=on"}} {
		t.Run(fmt.Sprint(options), func(t *testing.T) {
			s := newStack(t, func() bool { return true })
			base := t.TempDir()
			for name, size := range map[string]int{"mode": 7, "moved": InlineMax, "grown": InlineMax, "cut": InlineMax + 1, "linked": 9, "dir/in": 5, "gone": 3, "same": 4} {
				path := filepath.Join(base, name)
				noError(t, os.MkdirAll(filepath.Dir(path), 0o755))
				noError(t, os.WriteFile(path, bytes.Repeat([]byte{0xff}, size), 0o644))
			}
			s.add(base)
			upper, seen := s.container(func(root string) {
				at := func(p string) string { return filepath.Join(root, p) }
				noError(t, os.Chmod(at("mode"), 0o600))
				noError(t, os.Rename(at("moved"), at("moved2")))
				f, err := os.OpenFile(at("grown"), os.O_WRONLY|os.O_APPEND, 0)
				noError(t, err)
				_, err = f.WriteString("x")
				noError(t, err)
				noError(t, f.Close())
				noError(t, os.Truncate(at("cut"), 10))
				noError(t, os.Link(at("linked"), at("dir/linked")))
				noError(t, os.Remove(at("gone")))
				noError(t, os.Chown(at("dir/in"), 7, 8))
			}, options...)
			l, stats := store(t, upper, 30, chainOf(s.layers), s.nvm, s.pick)
			if want := int64(InlineMax + 1); stats.DataBytes < want || len(l.files) != 1 || l.files[0] != "grown" {
				t.Errorf("data files are %q, %+v", l.files, stats)
			}
			s.layers = append(s.layers, l)
			same(t, "committed", unlinked(seen), unlinked(s.view()))
		})
	}
}
