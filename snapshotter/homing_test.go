// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/placement"
)

func unpaced(int) error { return nil }

// mirrored is a record as the copy of the database on HDD has it.
func mirrored(t *testing.T, s *Snapshotter, id string) record {
	t.Helper()
	b, err := os.ReadFile(s.path(databaseFile))
	require.NoError(t, err)
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, databaseFile), b, 0o600))
	db, err := openDatabase(t.Context(), dir)
	require.NoError(t, err)
	defer func() { require.NoError(t, db.ms.Close()) }()
	r, err := db.record(t.Context(), id)
	require.NoError(t, err)
	return r
}

// Files leave NVM right after their layer was brought home. A database that is
// restored from its copy must know that they stand on HDD.
func TestBroughtHomeIsInTheCopyOfTheDatabase(t *testing.T) {
	dir, d := t.TempDir(), newDownloads(1000)
	s := start(t, dir, func(c *Config) { c.Downloads = d })
	name, id := storeLayer(t, s, d, "hello")
	awaitRecord(t, s, id, func(r record) bool { return r.Durable })
	require.NoError(t, s.homing.bring(t.Context(), id, unpaced))
	r := mirrored(t, s, id)
	require.True(t, r.Home && r.Captured && r.Durable)
	_, err := s.tiers.Demote("/" + id + "/file")
	require.NoError(t, err)

	// The machine goes down, the database with it; what the copy said before
	// that came from an even older one.
	older, err := os.ReadFile(s.path(databaseFile))
	require.NoError(t, err)
	require.NoError(t, s.Close())
	require.NoError(t, unmountAll(s))
	require.NoError(t, os.Remove(s.db.path))
	require.NoError(t, os.WriteFile(s.path(databaseFile), older, 0o600))
	s = start(t, dir, func(c *Config) { c.Downloads, c.WriteBack, c.BootID = d, true, "another boot" })
	got, err := read(t, s, name, "file")
	require.NoError(t, err)
	require.Equal(t, "hello", got)
}

// Who waits for the copying of another layer can be told to stop: the daemon
// ends while that goes on.
func TestBringCanBeStopped(t *testing.T) {
	d := newDownloads(1000)
	s := start(t, t.TempDir(), func(c *Config) { c.Downloads = d })
	_, id := storeLayer(t, s, d, "hello")
	awaitRecord(t, s, id, func(r record) bool { return r.Durable })
	s.homing.copying <- struct{}{}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.homing.bring(ctx, id, unpaced) }()
	cancel()
	require.ErrorIs(t, <-done, context.Canceled)
	<-s.homing.copying
	require.NoError(t, s.homing.bring(t.Context(), id, unpaced))
	require.True(t, errdefs.IsNotFound(s.homing.bring(t.Context(), "4242", unpaced)))
}

// A file that the disk failed to write has its size all the same.
func TestErrorOfTheDiskBeginsACopyAnew(t *testing.T) {
	d := newDownloads(1000)
	s := start(t, t.TempDir(), func(c *Config) { c.Downloads = d })
	_, id := storeLayer(t, s, d, "hello")
	awaitRecord(t, s, id, func(r record) bool { return r.Durable })
	require.NoError(t, s.db.updateRecord(t.Context(), id, func(r *record) { r.Homing = s.config.BootID }))
	torn := filepath.Join(s.tiers.Data(placement.HDD, id), "file")
	require.NoError(t, mkdirs(filepath.Dir(torn)))
	require.NoError(t, os.WriteFile(torn, make([]byte, len("hello")), 0o600))
	s.condemn(t.Context(), placement.HDD, "the disk is bad")
	require.NoError(t, s.homing.bring(t.Context(), id, unpaced))
	got, err := os.ReadFile(torn)
	require.NoError(t, err)
	require.Equal(t, "hello", string(got))
}

// The manager looks at every layer once a minute: what is as it was must cost
// neither a transaction nor a copy of the database.
func TestSettledAsBeforeIsNoWork(t *testing.T) {
	d := newDownloads(1000)
	s := start(t, t.TempDir(), func(c *Config) { c.Downloads = d })
	_, id := storeLayer(t, s, d, "hello")
	awaitRecord(t, s, id, func(r record) bool { return r.Durable })
	require.NoError(t, s.homing.bring(t.Context(), id, unpaced))
	require.NoError(t, hotStore{s}.Settled(t.Context(), id, 4096))
	changes := s.mirror.want.Load()
	require.NoError(t, hotStore{s}.Settled(t.Context(), id, 4096))
	require.Equal(t, changes, s.mirror.want.Load())
	require.NoError(t, hotStore{s}.Settled(t.Context(), id, 8192))
	r, err := s.db.record(t.Context(), id)
	require.NoError(t, err)
	require.EqualValues(t, 8192, r.NVMBytes)
	require.True(t, errdefs.IsNotFound(hotStore{s}.Settled(t.Context(), "4242", 0)))
}
