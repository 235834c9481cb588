// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func write(t *testing.T, name, text string) {
	t.Helper()
	require.NoError(t, os.MkdirAll(filepath.Dir(name), 0o755))
	require.NoError(t, os.WriteFile(name, []byte(text), 0o644))
}

func TestDifferences(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"same", "content", "mode", "time", "gone/f", "links"} {
		write(t, filepath.Join(dir, name), name)
	}
	require.NoError(t, os.Symlink("target", filepath.Join(dir, "symlink")))
	want, err := Read(dir)
	require.NoError(t, err)
	assert.Empty(t, Differences(want, want))

	keep := time.Unix(0, want["content"].Mtime)
	write(t, filepath.Join(dir, "content"), "CONTENT")
	require.NoError(t, os.Chtimes(filepath.Join(dir, "content"), keep, keep))
	require.NoError(t, os.Chmod(filepath.Join(dir, "mode"), 0o4755|os.ModeSetuid))
	require.NoError(t, os.Chtimes(filepath.Join(dir, "time"), keep, time.Unix(1, 1)))
	require.NoError(t, os.RemoveAll(filepath.Join(dir, "gone")))
	require.NoError(t, os.Link(filepath.Join(dir, "links"), filepath.Join(dir, "new")))
	require.NoError(t, os.Remove(filepath.Join(dir, "symlink")))
	require.NoError(t, os.Symlink("other", filepath.Join(dir, "symlink")))
	got, err := Read(dir)
	require.NoError(t, err)
	var diffs []string
	for _, d := range Differences(want, got) {
		diffs = append(diffs, d[:min(len(d), 24)])
	}
	assert.Len(t, diffs, 8, "%v", diffs)

	for _, name := range []string{"content", "mode", "time", "links", "symlink"} {
		assert.NotEmpty(t, want[name].differences(got[name]), name)
	}
	assert.Empty(t, want["same"].differences(got["same"]))
}

func TestRemoveAndRename(t *testing.T) {
	tree := Tree{"a": {}, "a/b": {Size: 1}, "ab": {}, "c": {}}
	moved := tree.Clone()
	moved.Rename("a", "x")
	assert.Equal(t, Tree{"x": {}, "x/b": {Size: 1}, "ab": {}, "c": {}}, moved)
	moved.Remove("x")
	assert.Equal(t, Tree{"ab": {}, "c": {}}, moved)
	assert.Len(t, tree, 4)
}

func TestSeconds(t *testing.T) {
	tree := Tree{"a": {Mtime: 1_500_000_000_999_999_999}}
	assert.Equal(t, int64(1_500_000_000_000_000_000), tree.Seconds()["a"].Mtime)
	assert.Equal(t, int64(1_500_000_000_999_999_999), tree["a"].Mtime)
}
