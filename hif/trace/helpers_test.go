// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package trace

import (
	"bytes"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/hif/parts"
	"github.com/nhybrid/nhybrid/placement"
)

// store is two tiers and one tree, as the daemon keeps them: the tree is a
// plain directory here, its files holes with a redirect.
type store struct {
	t     testing.TB
	tiers [2]string
	tree  string
	all   map[string]bool // layers
}

func newStore(t testing.TB) *store {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: fanotify and overlay mounts")
	}
	s := &store{t: t, all: map[string]bool{}}
	base := t.TempDir()
	for tier, name := range []string{"hdd", "nvm"} {
		s.tiers[tier] = filepath.Join(base, name)
		require.NoError(t, os.Mkdir(s.tiers[tier], 0o755))
		s.mount("tmpfs", "tmpfs", s.tiers[tier])
		require.NoError(t, os.Mkdir(s.root(placement.Tier(tier)), 0o755))
	}
	s.tree = filepath.Join(base, "tree, of=all") // the kernel escapes such names
	require.NoError(t, os.Mkdir(s.tree, 0o755))
	return s
}

func (s *store) mount(source, fstype, target string) {
	s.t.Helper()
	require.NoError(s.t, unix.Mount(source, target, fstype, 0, ""))
	s.t.Cleanup(func() { _ = unix.Unmount(target, unix.MNT_DETACH) })
}

// onDisk puts the HDD tier on an ext4 of its own: tmpfs is all page cache.
func (s *store) onDisk() {
	s.t.Helper()
	image := filepath.Join(s.t.TempDir(), "hdd.img")
	require.NoError(s.t, os.WriteFile(image, nil, 0o600))
	require.NoError(s.t, os.Truncate(image, 64<<20))
	run(s.t, "mkfs.ext4", "-q", image)
	hdd := s.tiers[placement.HDD]
	require.NoError(s.t, unix.Unmount(hdd, unix.MNT_DETACH))
	run(s.t, "mount", "-o", "loop", image, hdd)
	s.t.Cleanup(func() { _ = unix.Unmount(hdd, unix.MNT_DETACH) })
	require.NoError(s.t, os.Mkdir(s.root(placement.HDD), 0o755))
}

func (s *store) root(tier placement.Tier) string { return filepath.Join(s.tiers[tier], "d") }

func (s *store) config() Config {
	return Config{Roots: [2]string{s.root(0), s.root(1)}, Quiet: time.Hour, Max: time.Hour}
}

func (s *store) tracer(cfg Config) *Tracer {
	s.t.Helper()
	tr, err := New(cfg)
	require.NoError(s.t, err)
	s.t.Cleanup(func() { require.NoError(s.t, tr.Close()) })
	return tr
}

// put adds a file of a layer to the tree, with its data on a tier.
func (s *store) put(tier placement.Tier, layer, path string, data []byte) {
	s.t.Helper()
	s.all[layer] = true
	file := filepath.Join(s.root(tier), layer, path)
	require.NoError(s.t, os.MkdirAll(filepath.Dir(file), 0o755))
	require.NoError(s.t, os.WriteFile(file, data, 0o755))
	hole := filepath.Join(s.tree, path)
	require.NoError(s.t, os.MkdirAll(filepath.Dir(hole), 0o755))
	require.NoError(s.t, os.WriteFile(hole, nil, 0o755))
	require.NoError(s.t, os.Truncate(hole, int64(len(data))))
	require.NoError(s.t, unix.Setxattr(hole, "trusted.overlay.metacopy", nil, 0))
	require.NoError(s.t, unix.Setxattr(hole, "trusted.overlay.redirect", []byte("/"+layer+"/"+path), 0))
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

// container is the snapshot of a container: made, not mounted yet.
type container struct {
	Start
	s     *store
	point string
}

func (s *store) container(id string) *container {
	s.t.Helper()
	dir := filepath.Join(s.tiers[placement.HDD], "s", id)
	for _, sub := range []string{"fs", "work", "m"} {
		require.NoError(s.t, os.MkdirAll(filepath.Join(dir, sub), 0o755))
	}
	var layers []string
	for l := range s.all {
		layers = append(layers, l)
	}
	return &container{Start{Snapshot: id, Upper: filepath.Join(dir, "fs"), Tree: s.tree, Layers: layers}, s, filepath.Join(dir, "m")}
}

func (c *container) mount() string {
	c.s.t.Helper()
	options := [][2]string{{"lowerdir+", c.s.tree}, {"datadir+", c.s.root(placement.NVM)}}
	if c.Parts != "" {
		options = append(options, [2]string{"datadir+", c.Parts})
	}
	mountOverlay(c.s.t, c.point, append(options, [2]string{"datadir+", c.s.root(placement.HDD)},
		[2]string{"upperdir", c.Upper}, [2]string{"workdir", filepath.Join(filepath.Dir(c.Upper), "work")}))
	return c.point
}

// divide mounts a new image of parts on the point of that name: of all files on
// HDD of at least so many bytes, with their first chunk on NVM.
func (s *store) divide(name string, atLeast int64) (point string) {
	s.t.Helper()
	var files []parts.File
	root := s.root(placement.HDD)
	require.NoError(s.t, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		if st, err := d.Info(); err != nil || st.Size() >= atLeast {
			files = append(files, parts.File{Redirect: strings.TrimPrefix(path, root), Size: st.Size(), Hot: parts.Hot(st.Size(), []parts.Range{{Length: 1}}, 0)})
		}
		return err
	}))
	sort.Slice(files, func(i, j int) bool { return files[i].Redirect < files[j].Redirect })
	image := filepath.Join(s.tiers[placement.HDD], name+".erofs") // not on tmpfs, from which EROFS does not mount
	_, err := parts.Write(s.t.Context(), image, parts.Roots{NVM: s.root(placement.NVM), HDD: root}, parts.Set{Files: files, Margin: 64 << 10}, func(int) error { return nil })
	require.NoError(s.t, err)
	point = filepath.Join(filepath.Dir(s.tree), "parts-"+name)
	err = parts.Mount(image, point, root)
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

func paths(tr Trace) []string {
	var out []string
	for _, f := range tr.Files {
		out = append(out, f.Path)
	}
	sort.Strings(out)
	return out
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
