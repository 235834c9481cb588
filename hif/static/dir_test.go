// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package static

import (
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// hostile is a root with links that lead outside for who follows them with the host's "/", beside a file that must not
// be reached.
func hostile(t *testing.T) (root, secret string) {
	dir := t.TempDir()
	root, secret = filepath.Join(dir, "root"), filepath.Join(dir, "secret")
	require.NoError(t, os.MkdirAll(filepath.Join(root, "etc"), 0o755))
	require.NoError(t, os.WriteFile(secret, []byte("outside"), 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(root, "etc/inside"), []byte("inside"), 0o600))
	for name, target := range map[string]string{
		"absolute": secret, "up": "../../../../../../../../.." + secret, "dots": "../secret", "good": "/etc/inside", "loop": "loop2", "loop2": "/loop",
		"self": "/proc/self/root" + secret, "top": "/", "etc/back": "../../../etc/inside",
	} {
		require.NoError(t, os.Symlink(target, filepath.Join(root, name)))
	}
	require.NoError(t, unix.Mkfifo(filepath.Join(root, "fifo"), 0o600))
	return root, secret
}

func TestDirStaysInside(t *testing.T) {
	root, secret := hostile(t)
	d, err := OpenDir(root)
	require.NoError(t, err)
	defer d.Close()
	for _, name := range []string{"absolute", "up", "dots", "self", "loop", "fifo", "gone", "../secret", "/etc/inside", "top/../secret", "top" + secret} {
		f, err := d.Open(name)
		if err == nil {
			_ = f.Close()
		}
		require.Error(t, err, name)
	}
	for _, name := range []string{"good", "etc/back", "top/etc/inside"} {
		f, err := d.Open(name)
		require.NoError(t, err, name)
		data, err := io.ReadAll(f)
		require.NoError(t, err)
		require.Equal(t, "inside", string(data))
		require.NoError(t, f.Close())
	}
	info, err := d.Lstat("absolute")
	require.NoError(t, err)
	require.Equal(t, "absolute", info.Name())
	require.Equal(t, fs.ModeSymlink, info.Mode().Type())
	target, err := d.ReadLink("absolute")
	require.NoError(t, err)
	require.Equal(t, secret, target)
	_, err = OpenDir(filepath.Join(root, "etc/inside"))
	require.ErrorIs(t, err, unix.ENOTDIR)
}

func TestAnalyzeStaysInside(t *testing.T) {
	root, _ := hostile(t)
	d, err := OpenDir(root)
	require.NoError(t, err)
	defer d.Close()
	require.NoError(t, os.WriteFile(filepath.Join(root, "tool"), []byte(program()), 0o700))
	require.Equal(t, []string{"tool", "etc/inside"}, predict(t, d, v1.ImageConfig{
		Cmd: []string{"/tool", "/absolute", "/up", "/dots", "/self", "/loop", "/fifo", "/etc/back"},
	}))
}
