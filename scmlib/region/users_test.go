// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package region

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/scmlib/region/api"
)

// records is containerd's: which containers there are, and which instance of its id each is.
type records map[string]string

func (c records) identify(_ context.Context, _, id string) (string, error) {
	if i, ok := c[id]; ok {
		return i, nil
	}
	return "", fmt.Errorf("container %q: %w", id, errdefs.ErrNotFound)
}

// The record of a container may be deleted while its process runs (the API allows it, and metadata can be lost). Its region becomes a volume that is in use.
func TestKeptRegionKeepsItsUsers(t *testing.T) {
	ctx := t.Context()
	containers := records{"c": "1", "d": "1"}
	dir := filesystem(t, "tmpfs", 64*mib)
	s, err := Open(ctx, filepath.Join(dir, "r"), Options{Identify: containers.identify})
	require.NoError(t, err)
	p, other := sleeper(t), sleeper(t)
	mount, r, err := s.Attach(ctx, api.Attach{Namespace: "default", Container: "c", Pid: p.Process.Pid, Size: mib}, nil)
	require.NoError(t, err)
	defer mount.Close()
	require.NoError(t, s.SetKeep(ctx, r.Ref, true))
	delete(containers, "c")
	require.NoError(t, s.Release(ctx, "default", "c"))

	refused := func() {
		t.Helper()
		f, _, err := s.Attach(ctx, api.Attach{Namespace: "default", Container: "d", Pid: other.Process.Pid, Volume: "c"}, nil)
		if err == nil {
			f.Close()
		}
		require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
		require.ErrorContains(t, err, "container default/c uses it")
		require.ErrorIs(t, s.Remove(ctx, vol("c")), errdefs.ErrFailedPrecondition)
		v, err := s.Inspect(vol("c"))
		require.NoError(t, err)
		require.Len(t, v.Users, 1)
	}
	refused()
	// Its file is watched under its new name.
	inside, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", mount.Fd()), os.O_RDWR, 0)
	require.NoError(t, err)
	defer inside.Close()
	require.NoError(t, inside.Truncate(8*mib))
	require.Eventually(t, func() bool { st, err := os.Stat(s.data(vol("c"))); return err == nil && st.Size() == mib }, waitFor, tick)

	require.NoError(t, s.Close())
	s = open(t, dir, Options{Identify: containers.identify})
	refused()
	end(p)
	f, _, err := s.Attach(ctx, api.Attach{Namespace: "default", Container: "d", Pid: other.Process.Pid, Volume: "c"}, nil)
	require.NoError(t, err)
	f.Close()
	end(other)
	require.NoError(t, s.Remove(ctx, vol("c")))
}

// The blocks of a region are not free before the process that maps it ends, so the region stays in the books as long, whatever became of the container's record.
func TestRegionStaysWithItsProcess(t *testing.T) {
	ctx := t.Context()
	containers := records{"c": "1"}
	s := newStore(t, Options{Identify: containers.identify})
	promised := func() int64 {
		t.Helper()
		b, err := s.Books()
		require.NoError(t, err)
		return b.Promised
	}
	attach := func(pid int) error {
		f, _, err := s.Attach(ctx, api.Attach{Namespace: "default", Container: "c", Pid: pid, Size: mib}, nil)
		if err == nil {
			f.Close()
		}
		return err
	}
	p, next := sleeper(t), sleeper(t)
	require.NoError(t, attach(p.Process.Pid))
	// The same container once more: who has its region already still has it.
	require.NoError(t, attach(next.Process.Pid))
	r, err := s.Inspect(Ref{Container, "default", "c"})
	require.NoError(t, err)
	require.Len(t, r.Users, 2)
	end(next)

	delete(containers, "c")
	require.NoError(t, s.Release(ctx, "default", "c"))
	require.NoError(t, s.Reconcile(ctx))
	require.EqualValues(t, mib, promised())
	containers["c"] = "2"
	other := sleeper(t)
	err = attach(other.Process.Pid)
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	require.ErrorContains(t, err, "earlier container")
	require.EqualValues(t, mib, promised())

	end(p)
	require.NoError(t, attach(other.Process.Pid))
	require.EqualValues(t, mib, promised())
	end(other)
	delete(containers, "c")
	require.NoError(t, s.Release(ctx, "default", "c"))
	require.Zero(t, promised())
	empty(t, s)
}
