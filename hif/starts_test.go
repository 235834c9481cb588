// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/hif/profile"
	"github.com/nhybrid/nhybrid/hif/trace"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// A start of an image of which nothing is known is tied to its container by the
// listing of the image, and recorded by the names of its files.
func TestStartIsRecorded(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: fanotify and overlay mounts")
	}
	image := imageOf("a", "1")
	s := &still{images: []Image{image}}
	m := newManager(t, s, &shelf{})
	base := t.TempDir()
	mount := func(dir string) {
		t.Helper()
		require.NoError(t, os.MkdirAll(dir, 0o755))
		require.NoError(t, unix.Mount("tmpfs", dir, "tmpfs", 0, ""))
		t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	}
	mount(filepath.Join(base, "nvm"))
	mount(filepath.Join(base, "view"))
	s.root = filepath.Join(base, "nvm/d")
	tree, home := filepath.Join(base, "view/t"), filepath.Join(base, "view/h")
	program, err := os.ReadFile("/bin/true")
	require.NoError(t, err)
	for i, path := range []string{"/bin/program", "/lib/x.so.1", "/unused"} {
		ref := pack.Ref{Layer: 1, Number: uint32(i + 1)}
		onNVM := s.put(t, path, ref, program)
		require.NoError(t, os.Chmod(onNVM, 0o755))
		require.NoError(t, os.MkdirAll(filepath.Dir(home+ref.Redirect()), 0o755))
		require.NoError(t, os.WriteFile(home+ref.Redirect(), program, 0o600))
		if path == "/lib/x.so.1" {
			require.NoError(t, os.Remove(onNVM))
		}
		hole := tree + path
		require.NoError(t, os.MkdirAll(filepath.Dir(hole), 0o755))
		require.NoError(t, os.WriteFile(hole, nil, 0o755))
		require.NoError(t, os.Truncate(hole, int64(len(program))))
		require.NoError(t, unix.Setxattr(hole, "trusted.overlay.metacopy", nil, 0))
		require.NoError(t, unix.Setxattr(hole, "trusted.overlay.redirect", []byte(ref.Redirect()), 0))
	}
	m.tracer, err = trace.New(trace.Config{Root: s.root, Quiet: time.Hour, Max: time.Hour})
	require.NoError(t, err)
	dir := filepath.Join(base, "nvm/s")
	for _, sub := range []string{"fs", "work", "m"} {
		require.NoError(t, os.MkdirAll(filepath.Join(dir, sub), 0o755))
	}
	for i := range 2 {
		start := Start{Start: trace.Start{Snapshot: "20", Upper: filepath.Join(dir, "fs"), Tree: tree, Home: home, Layers: image.Chain}, Namespace: "default", Key: "c", View: image.View}
		m.Mounted(start)
		require.Len(t, m.Starts(), 1)
		root := filepath.Join(dir, "m")
		require.NoError(t, unix.Mount("overlay", root, "overlay", 0, "metacopy=on,lowerdir="+tree+"::"+s.root+"::"+home+",upperdir="+dir+"/fs,workdir="+dir+"/work"))
		require.NoError(t, exec.CommandContext(t.Context(), root+"/bin/program").Run())
		_, err = os.ReadFile(root + "/unused") // by this process
		require.NoError(t, err)
		require.NoError(t, exec.CommandContext(t.Context(), "cat", root+"/lib/x.so.1").Run())
		require.Eventually(t, func() bool { return m.Starts()[0].Files == 2 }, 10*time.Second, time.Millisecond, "all are known to be of the container")
		_, err = m.Ready(t.Context(), "default", "c")
		require.NoError(t, err)
		require.NoError(t, unix.Unmount(root, 0))
		k, err := m.Get(t.Context(), image.Digest)
		require.NoError(t, err)
		require.Equal(t, Traced, k.How)
		require.Equal(t, i+1, k.Profile.Starts)
		require.Len(t, k.Profile.Files, 2)
		require.Equal(t, []any{profile.Path("bin/program"), profile.Exec}, []any{k.Profile.Files[0].Path, k.Profile.Files[0].Kind})
		require.Equal(t, []any{profile.Path("lib/x.so.1"), profile.Library}, []any{k.Profile.Files[1].Path, k.Profile.Files[1].Kind})
		require.EqualValues(t, 1, s.lists.Load(), "the second start finds the names")
		if i == 0 {
			m.library.listings = nil
		}
	}
}
