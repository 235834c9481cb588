// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package trace

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/placement"
)

// A file that leaves NVM during a start is one file.
func TestMovedFile(t *testing.T) {
	s := newStore(t)
	s.put(placement.NVM, "3", "f", []byte("data"))
	tr := s.tracer(s.config())
	c := s.container("7")
	w := watch(t, tr, c)
	m := c.mount()
	release := hold(t, tr)
	run(t, "cat", m+"/f")
	require.NoError(t, os.Remove(s.at(placement.NVM, "f")))
	release()
	require.Eventually(t, func() bool { return tr.Stats().Opens[placement.NVM] == 1 }, 10*time.Second, time.Millisecond)
	run(t, "sh", "-c", "echo 2 > /proc/sys/vm/drop_caches") // so that overlayfs looks the data up again
	run(t, "cat", m+"/f")
	got := ready(w)
	require.Equal(t, [2]uint64{1, 1}, tr.Stats().Opens)
	require.Len(t, got.Files, 1)
	require.Equal(t, placement.NVM, got.Files[0].Tier, "where it stood at first")
	require.Equal(t, 2, got.Files[0].Opens)
	require.EqualValues(t, -1, got.Files[0].Touched)
}

// One that comes up is, too.
func TestPromotedFile(t *testing.T) {
	s := newStore(t)
	s.put(placement.HDD, "3", "f", []byte("data"))
	tr := s.tracer(s.config())
	c := s.container("7")
	w := watch(t, tr, c)
	m := c.mount()
	run(t, "cat", m+"/f")
	require.Eventually(t, func() bool { return tr.Stats().Opens[placement.HDD] == 1 }, 10*time.Second, time.Millisecond)
	s.write(s.at(placement.NVM, "f"), []byte("data"))
	run(t, "sh", "-c", "echo 2 > /proc/sys/vm/drop_caches")
	run(t, "cat", m+"/f")
	got := ready(w)
	require.Equal(t, [2]uint64{1, 1}, tr.Stats().Opens)
	require.Len(t, got.Files, 1)
	require.Equal(t, placement.HDD, got.Files[0].Tier, "where it stood at first")
	require.Equal(t, 2, got.Files[0].Opens)
}

// NVM on a filesystem with other things, and what others open on it.
func TestSharedFilesystem(t *testing.T) {
	s := newStore(t)
	s.put(placement.HDD, "3", "f", []byte("x"))
	s.put(placement.NVM, "3", "g", []byte("x"))
	s.write(filepath.Join(s.nvm, "3/01/1"), []byte("x"))
	bind := t.TempDir()
	require.NoError(t, unix.Mount(s.nvm, bind, "", unix.MS_BIND, ""))
	t.Cleanup(func() { _ = unix.Unmount(bind, unix.MNT_DETACH) })
	tr := s.tracer(s.config())
	c := s.container("7")
	w := watch(t, tr, c)
	m := c.mount()
	run(t, "cat", m+"/f", bind+"/3/01/1", bind+"/d"+s.refs["g"].Redirect(), m+"/g")
	got := ready(w)
	require.Equal(t, []string{"f", "g"}, s.paths(got))
	require.Equal(t, [2]placement.Tier{placement.HDD, placement.NVM}, [2]placement.Tier{got.Files[0].Tier, got.Files[1].Tier})
	require.Equal(t, [2]uint64{1, 1}, tr.Stats().Opens)
}
