// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package trace

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/hif/parts"
	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// store is NVM and the view of one chain, as the daemon keeps them: one
// filesystem with the tree, whose files are holes with a redirect, and the data
// files by number. It is a tmpfs here, or an ext4 where page caches matter.
type store struct {
	t     testing.TB
	nvm   string
	view  string
	all   map[string]bool     // layers
	refs  map[string]pack.Ref // by path
	names map[pack.Ref]string // paths
	last  map[uint64]uint32   // numbers given out, by layer
}

func newStore(t testing.TB) *store { return newStoreAt(t, "view, of=all") } // the kernel escapes such names

func newStoreAt(t testing.TB, view string) *store {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: fanotify and overlay mounts")
	}
	base := t.TempDir()
	s := &store{t: t, nvm: filepath.Join(base, "nvm"), view: filepath.Join(base, view),
		all: map[string]bool{}, refs: map[string]pack.Ref{}, names: map[pack.Ref]string{}, last: map[uint64]uint32{}}
	for _, dir := range []string{s.nvm, s.view} {
		require.NoError(t, os.Mkdir(dir, 0o755))
		s.mount("tmpfs", "tmpfs", dir)
	}
	s.dirs()
	return s
}

func (s *store) dirs() {
	s.t.Helper()
	for _, dir := range []string{s.root(), s.tree(), s.home()} {
		require.NoError(s.t, os.MkdirAll(dir, 0o755))
	}
}

func (s *store) root() string { return filepath.Join(s.nvm, "d") }
func (s *store) tree() string { return filepath.Join(s.view, "t") }
func (s *store) home() string { return filepath.Join(s.view, "h") }

func (s *store) mount(source, fstype, target string) {
	s.t.Helper()
	require.NoError(s.t, unix.Mount(source, target, fstype, 0, ""))
	s.t.Cleanup(func() { _ = unix.Unmount(target, unix.MNT_DETACH) })
}

// onDisk puts the view on an ext4 of its own: tmpfs is all page cache.
func (s *store) onDisk() {
	s.t.Helper()
	image := filepath.Join(s.t.TempDir(), "view.img")
	require.NoError(s.t, os.WriteFile(image, nil, 0o600))
	require.NoError(s.t, os.Truncate(image, 128<<20))
	run(s.t, "mkfs.ext4", "-q", image)
	require.NoError(s.t, unix.Unmount(s.view, unix.MNT_DETACH))
	run(s.t, "mount", "-o", "loop", image, s.view)
	s.t.Cleanup(func() { _ = unix.Unmount(s.view, unix.MNT_DETACH) })
	s.dirs()
}

func (s *store) config() Config {
	return Config{Root: s.root(), Quiet: time.Hour, Max: time.Hour}
}

func (s *store) tracer(cfg Config) *Tracer {
	s.t.Helper()
	tr, err := New(cfg)
	require.NoError(s.t, err)
	s.t.Cleanup(func() { require.NoError(s.t, tr.Close()) })
	return tr
}

// number gives a file of a layer its number, and what redirects to it.
func (s *store) number(layer, path string) string {
	s.t.Helper()
	id, err := strconv.ParseUint(layer, 10, 64)
	require.NoError(s.t, err)
	s.all[layer] = true
	s.last[id]++
	ref := pack.Ref{Layer: id, Number: s.last[id]}
	s.refs[path], s.names[ref] = ref, path
	return ref.Redirect()
}

// put adds a file of a layer to the view, on NVM with a copy there.
func (s *store) put(tier placement.Tier, layer, path string, data []byte) {
	s.t.Helper()
	redirect := s.number(layer, path)
	s.write(s.home()+redirect, data)
	if tier == placement.NVM {
		s.write(s.root()+redirect, data)
	}
	hole := filepath.Join(s.tree(), path)
	s.write(hole, nil)
	require.NoError(s.t, os.Truncate(hole, int64(len(data))))
	require.NoError(s.t, unix.Setxattr(hole, "trusted.overlay.metacopy", nil, 0))
	require.NoError(s.t, unix.Setxattr(hole, "trusted.overlay.redirect", []byte(redirect), 0))
}

func (s *store) write(file string, data []byte) {
	s.t.Helper()
	require.NoError(s.t, os.MkdirAll(filepath.Dir(file), 0o755))
	require.NoError(s.t, os.WriteFile(file, data, 0o755))
}

// at is where the data of a file stand on a tier.
func (s *store) at(tier placement.Tier, path string) string {
	s.t.Helper()
	require.Contains(s.t, s.refs, path)
	if tier == placement.NVM {
		return s.root() + s.refs[path].Redirect()
	}
	return s.home() + s.refs[path].Redirect()
}

// path is [Start.Path].
func (s *store) path(ref pack.Ref) string {
	if p := s.names[ref]; p != "" {
		return "/" + p
	}
	return ""
}

// install copies files of this machine, following links, and the shared
// objects they need.
func (s *store) install(tier placement.Tier, layer string, files ...string) {
	s.t.Helper()
	todo := map[string]bool{}
	for _, f := range files {
		todo[f] = true
		out, _ := exec.Command("ldd", f).Output() // fails for what is not dynamic
		for _, word := range strings.Fields(string(out)) {
			if filepath.IsAbs(word) {
				todo[word] = true
			}
		}
	}
	for f := range todo {
		data, err := os.ReadFile(f)
		require.NoError(s.t, err)
		s.put(tier, layer, f[1:], data)
	}
}

// installDir copies a whole directory.
func (s *store) installDir(tier placement.Tier, layer, dir string) {
	s.t.Helper()
	require.NoError(s.t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			if len(data) > 0 {
				s.put(tier, layer, path[1:], data)
			}
		}
		return err
	}))
}

// container is the snapshot of a container: made, not mounted yet. Its upper
// directory is on the filesystem that is marked.
type container struct {
	Start
	s     *store
	point string
}

func (s *store) container(id string) *container {
	s.t.Helper()
	dir := filepath.Join(s.nvm, "s", id)
	for _, sub := range []string{"fs", "work", "m"} {
		require.NoError(s.t, os.MkdirAll(filepath.Join(dir, sub), 0o755))
	}
	var layers []string
	for l := range s.all {
		layers = append(layers, l)
	}
	return &container{Start{Snapshot: id, Upper: filepath.Join(dir, "fs"), Tree: s.tree(), Home: s.home(), Layers: layers, Path: s.path}, s, filepath.Join(dir, "m")}
}

// lower are the options of an overlay of the container without an upper directory.
func (c *container) lower() [][2]string {
	options := [][2]string{{"lowerdir+", c.Tree}, {"datadir+", c.s.root()}}
	if c.Parts != "" {
		options = append(options, [2]string{"datadir+", c.Parts})
	}
	return append(options, [2]string{"datadir+", c.Home})
}

func (c *container) mount() string {
	c.s.t.Helper()
	mountOverlay(c.s.t, c.point, append(c.lower(), [2]string{"upperdir", c.Upper}, [2]string{"workdir", filepath.Join(filepath.Dir(c.Upper), "work")}))
	return c.point
}

// packs are the data files of the view in one pack for each layer.
type packs struct {
	dir    string
	blocks map[pack.Ref]uint32
	sizes  map[pack.Ref]int64
}

func (p *packs) PackPath(layer uint64) string { return filepath.Join(p.dir, fmt.Sprint(layer)) }

func (p *packs) PackFile(ref pack.Ref) (uint32, int64, error) {
	return p.blocks[ref], p.sizes[ref], nil
}

// pack writes the packs of all files, on the disk of the view.
func (s *store) pack() *packs {
	s.t.Helper()
	p := &packs{filepath.Join(s.view, "p"), map[pack.Ref]uint32{}, map[pack.Ref]int64{}}
	require.NoError(s.t, os.MkdirAll(p.dir, 0o755))
	for layer, last := range s.last {
		data := make([]byte, pack.BlockSize)
		for n := range last {
			ref := pack.Ref{Layer: layer, Number: n + 1}
			b, err := os.ReadFile(s.home() + ref.Redirect())
			require.NoError(s.t, err)
			p.blocks[ref], p.sizes[ref] = uint32(len(data)/pack.BlockSize), int64(len(b))
			data = append(data, b...)
			data = append(data, make([]byte, -len(data)&(pack.BlockSize-1))...)
		}
		f, err := os.Create(p.PackPath(layer))
		require.NoError(s.t, err)
		_, err = f.Write(data)
		require.NoError(s.t, errors.Join(err, f.Sync(), f.Close()))
	}
	return p
}

// divide mounts a new image of parts on the point of that name: of all files of
// at least so many bytes that are not on NVM, with their first chunk on NVM.
func (s *store) divide(name string, atLeast int64, hot ...parts.Range) (point string) {
	s.t.Helper()
	p := s.pack()
	if len(hot) == 0 {
		hot = []parts.Range{{Length: 1}}
	}
	var files []parts.File
	for ref, size := range p.sizes {
		if _, err := os.Stat(s.root() + ref.Redirect()); size >= atLeast && err != nil {
			files = append(files, parts.File{Redirect: ref.Redirect(), Size: size, Hot: parts.Hot(size, hot, 0)})
		}
	}
	sort.Slice(files, func(i, j int) bool { return files[i].Redirect < files[j].Redirect })
	return s.mountParts(name, p, parts.Set{Files: files, Margin: 64 << 10})
}

func (s *store) mountParts(name string, p *packs, set parts.Set) (point string) {
	s.t.Helper()
	image := filepath.Join(s.view, name+".erofs") // not on tmpfs, from which EROFS does not mount
	_, err := parts.Write(s.t.Context(), image, s.root(), p, set, func(int) error { return nil })
	require.NoError(s.t, err)
	point = filepath.Join(filepath.Dir(s.view), "parts-"+name)
	err = parts.Mount(image, point, p.PackPath)
	if errdefs.IsNotImplemented(err) {
		s.t.Skip(err)
	}
	require.NoError(s.t, err)
	s.t.Cleanup(func() { require.NoError(s.t, parts.Unmount(point)) })
	return point
}

func mountOverlay(t testing.TB, point string, options [][2]string) {
	t.Helper()
	fd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	require.NoError(t, err)
	defer unix.Close(fd)
	for _, o := range options {
		require.NoError(t, unix.FsconfigSetString(fd, o[0], o[1]), "%s", o)
	}
	require.NoError(t, unix.FsconfigCreate(fd))
	m, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, 0)
	require.NoError(t, err)
	defer unix.Close(m)
	require.NoError(t, unix.MoveMount(m, "", unix.AT_FDCWD, point, unix.MOVE_MOUNT_F_EMPTY_PATH))
	t.Cleanup(func() { _ = unix.Unmount(point, unix.MNT_DETACH) })
}

func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	require.NoError(t, err, "%s %s: %s", name, args, errs.String())
	return string(out)
}

func watch(t testing.TB, tr *Tracer, c *container) *Watch {
	t.Helper()
	w, err := tr.Watch(c.Start)
	require.NoError(t, err)
	return w
}

func ready(w *Watch) Trace {
	w.Ready()
	return w.Result()
}

// paths are those of the files of a trace, in order.
func (s *store) paths(tr Trace) []string {
	var out []string
	for _, f := range tr.Files {
		out = append(out, s.names[f.Ref])
	}
	sort.Strings(out)
	return out
}

// byPath are the files of a trace, none of which was assumed.
func (s *store) byPath(tr Trace) map[string]File {
	s.t.Helper()
	by := map[string]File{}
	for _, f := range tr.Files {
		require.False(s.t, f.Assumed)
		require.Contains(s.t, s.names, f.Ref)
		by[s.names[f.Ref]] = f
	}
	require.Len(s.t, by, len(tr.Files))
	return by
}

func need(t testing.TB, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("%s is not installed", p)
		}
	}
}

// hold keeps the reader from taking events, until release or the end of the test.
func hold(t testing.TB, tr *Tracer) (release func()) {
	tr.mu.Lock()
	release = sync.OnceFunc(tr.mu.Unlock)
	t.Cleanup(release)
	return release
}
