// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package region

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/scmlib"
)

func TestMemoryBelow(t *testing.T) {
	sys, dir := t.TempDir(), t.TempDir()
	require.False(t, memoryBelow(sys, dir).known)
	var st unix.Stat_t
	require.NoError(t, unix.Stat(dir, &st))
	require.NoError(t, os.MkdirAll(filepath.Join(sys, "dev/block"), 0o755))
	require.NoError(t, os.Symlink("../../devices/LNXSYSTM:00/ndbus0/region0/namespace0.0/block/pmem0",
		filepath.Join(sys, "dev/block", fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev)))))
	require.False(t, memoryBelow(sys, dir).known, "no module counts")
	module := func(name, lost string) {
		d := filepath.Join(sys, "bus/nd/devices", name, "nfit")
		require.NoError(t, os.MkdirAll(d, 0o755))
		require.NoError(t, os.WriteFile(filepath.Join(d, "id"), []byte("8089-a2-"+name), 0o644))
		require.NoError(t, os.WriteFile(filepath.Join(d, "dirty_shutdown"), []byte(lost+"\n"), 0o644))
	}
	module("nmem0", "3")
	one := memoryBelow(sys, dir)
	require.True(t, one.known)
	require.EqualValues(t, 4, one.lost)
	module("nmem1", "2")
	two := memoryBelow(sys, dir)
	require.EqualValues(t, 6, two.lost)
	require.NotEqual(t, one.id, two.id)

	s := newStore(t, Options{})
	r, err := s.Create(t.Context(), "default", "a", CreateOptions{Size: mib})
	require.NoError(t, err)
	path := s.data(r.Ref)
	require.NoError(t, two.stamp(path)) // not scmlib's yet
	put(t, path, 1)
	require.NoError(t, two.stamp(path))
	open, err := scmlib.Open(path, scmlib.Options{})
	require.NoError(t, err)
	require.NoError(t, one.stamp(path)) // in use
	crashed, err := os.ReadFile(path)
	require.NoError(t, err)
	require.NoError(t, open.Close())
	require.NoError(t, os.WriteFile(path, crashed, 0o600))
	module("nmem1", "7")
	require.NoError(t, memoryBelow(sys, dir).stamp(path))
	_, err = scmlib.Open(path, scmlib.Options{})
	require.ErrorIs(t, err, scmlib.ErrUnsafe)
}

func TestGuarantee(t *testing.T) {
	i, err := newStore(t, Options{}).Guarantee()
	require.NoError(t, err)
	require.Equal(t, scmlib.ProcessCrash, i.Durability)
	require.Equal(t, "tmpfs", i.Filesystem)
}
