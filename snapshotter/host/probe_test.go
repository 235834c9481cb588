// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package host

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

func TestProbe(t *testing.T) {
	requireRoot(t)
	dir := t.TempDir()
	f, err := Probe(dir, Image())
	require.NoError(t, err)
	t.Logf("%+v", f)
	require.NoError(t, f.Check())
	require.NotEmpty(t, f.Kernel)
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, left)
	mounts, err := os.ReadFile("/proc/self/mounts")
	require.NoError(t, err)
	require.NotContains(t, string(mounts), dir)
}

func TestProbeNeedsAnImage(t *testing.T) {
	requireRoot(t)
	dir := t.TempDir()
	f, err := Probe(dir, []byte("no filesystem"))
	require.NoError(t, err)
	require.False(t, f.FileBacked)
	require.False(t, f.Loop)
	require.ErrorIs(t, f.Check(), errdefs.ErrFailedPrecondition)
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, left)
}

func TestProbeMissingDirectory(t *testing.T) {
	_, err := Probe(filepath.Join(t.TempDir(), "missing"), Image())
	require.ErrorIs(t, err, os.ErrNotExist)
}

// The data that the redirect leads to is what makes the trial more than a mount that succeeds.
func TestProbeSeesThatDataIsMissing(t *testing.T) {
	requireRoot(t)
	f, err := Probe(t.TempDir(), Image())
	require.NoError(t, err)
	x, err := newTrial(t.TempDir(), Image())
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, x.clean()) })
	require.NoError(t, x.mountLoop(x.tree))
	require.NoError(t, x.overlay("ro", x.tree, false, f.Options()))
	require.True(t, x.reads("ro"))
	x.unmount("ro")
	require.NoError(t, os.Remove(filepath.Join(x.dir, "nvm", probeRedirect)))
	require.NoError(t, x.overlay("ro", x.tree, false, f.Options()))
	require.False(t, x.reads("ro"))
}

func TestCheck(t *testing.T) {
	good := Features{DataOnly: true, FileBacked: true, StackOK: true, Kernel: "6.8"}
	require.NoError(t, good.Check())
	for want, change := range map[string]func(*Features){
		"user namespace": func(f *Features) { f.UserNS = true },
		"EROFS":          func(f *Features) { f.FileBacked = false },
		"data-only":      func(f *Features) { f.DataOnly = false },
	} {
		f := good
		change(&f)
		err := f.Check()
		require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
		require.ErrorContains(t, err, want)
		require.NotContains(t, err.Error(), "\n")
	}
}

func TestOptions(t *testing.T) {
	require.Equal(t, []string{"index=off", "metacopy=on"}, Features{IndexOff: true, Metacopy: true}.Options())
	require.Empty(t, Features{}.Options())
	for _, x := range []struct {
		f    Features
		loop bool
	}{
		{Features{FileBacked: true, StackOK: true, Loop: true}, false},
		{Features{FileBacked: true, StackOK: false, Loop: true}, true},
		{Features{FileBacked: true, StackOK: false}, false},
		{Features{Loop: true, StackOK: true}, true},
	} {
		require.Equal(t, x.loop, x.f.UseLoop(), "%+v", x.f)
	}
}

func TestImageIsGood(t *testing.T) {
	fsck, err := exec.LookPath("fsck.erofs")
	if err != nil {
		t.Skip("fsck.erofs is not installed")
	}
	file := filepath.Join(t.TempDir(), "image")
	require.NoError(t, os.WriteFile(file, Image(), 0o600))
	out, err := exec.Command(fsck, file).CombinedOutput()
	require.NoError(t, err, string(out))
	require.False(t, strings.Contains(string(out), "orrupt"), string(out))
}
