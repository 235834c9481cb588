//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"
	"github.com/stretchr/testify/require"
	bolt "go.etcd.io/bbolt"

	"github.com/nhybrid/nhybrid/integration/rig"
)

// books are what the database of a rig's daemon says, read past the daemon.
type books struct {
	layers    map[string]booked
	snapshots map[string]booked // by id
	removed   []string
}

// booked is the record of a layer or of a snapshot, as far as it is checked.
type booked struct {
	State    string
	Users    int
	Layer    int64
	Snapshot string
	Damaged  string
	Blob     string
}

// readBooks copies the database, which the daemon has locked, and reads the copy. Nothing may be writing.
func readBooks(t *testing.T, r *rig.Rig) (b books) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(r.NVM, "nhybrid.db"))
	require.NoError(t, err)
	path := filepath.Join(t.TempDir(), "copy.db")
	require.NoError(t, os.WriteFile(path, data, 0o600))
	db, err := bolt.Open(path, 0o600, nil)
	require.NoError(t, err)
	defer func() { require.NoError(t, db.Close()) }()
	b = books{layers: map[string]booked{}, snapshots: map[string]booked{}}
	require.NoError(t, db.View(func(tx *bolt.Tx) error {
		read := func(bucket string, into map[string]booked) error {
			return tx.Bucket([]byte("nhybrid")).Bucket([]byte(bucket)).ForEach(func(k, v []byte) error {
				var one booked
				err := json.Unmarshal(v, &one)
				into[string(k)] = one
				return err
			})
		}
		return errors.Join(read("layers", b.layers), read("snapshots", b.snapshots),
			tx.Bucket([]byte("nhybrid")).Bucket([]byte("removed")).ForEach(func(k, _ []byte) error {
				b.removed = append(b.removed, string(k))
				return nil
			}))
	}))
	return b
}

// audit holds the database against the disks, mounts and loop devices of a rig whose daemon has nothing left to do: what is
// there and nobody refers to, and what is missing.
func audit(t *testing.T, r *rig.Rig) (wrong []string) {
	t.Helper()
	b := readBooks(t, r)
	say := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	names := func(dir string) (all []string) {
		entries, err := os.ReadDir(dir)
		require.NoError(t, err)
		for _, e := range entries {
			all = append(all, e.Name())
		}
		return all
	}
	packs := map[string]bool{}
	for _, name := range names(filepath.Join(r.HDD, "p")) {
		id := strings.TrimSuffix(name, ".erofs")
		packs[id] = true
		if _, ok := b.layers[id]; !ok {
			say("pack %q is of no layer", name)
		}
	}
	users := map[string]int{}
	for id, s := range b.snapshots {
		if s.Layer != 0 {
			users[fmt.Sprint(s.Layer)]++
			if _, ok := b.layers[fmt.Sprint(s.Layer)]; !ok {
				say("snapshot %s is of layer %d, which is not known", id, s.Layer)
			}
		}
	}
	for id, l := range b.layers {
		if (l.State == "stored" || l.State == "durable" || l.State == "home") && !packs[id] {
			say("layer %s is %s and has no pack", id, l.State)
		}
		if l.Users != users[id] {
			say("layer %s has %d users in its record and %d snapshots", id, l.Users, users[id])
		}
		if l.Damaged != "" {
			say("layer %s is damaged: %s", id, l.Damaged)
		}
	}
	for _, id := range names(filepath.Join(r.NVM, "d")) {
		if _, ok := b.layers[id]; !ok {
			say("files on NVM are of layer %s, which is not known", id)
		}
	}
	if len(b.removed) > 0 {
		say("snapshots %q are removed, and their files not", b.removed)
	}
	for _, dir := range []string{r.NVM + "/s", r.HDD + "/s", r.NVM + "/v", r.HDD + "/v", r.NVM + "/parts"} {
		for _, name := range names(dir) {
			if _, ok := b.snapshots[strings.TrimSuffix(name, ".erofs")]; !ok {
				say("%s/%s is of no snapshot", dir, name)
			}
		}
	}
	state := filepath.Join(r.Dir, "state")
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(state))
	require.NoError(t, err)
	for _, m := range mounts {
		if _, ok := b.snapshots[filepath.Base(m.Mountpoint)]; !ok {
			say("%s is mounted on %q, which is of no snapshot", m.FSType, m.Mountpoint)
		}
	}
	loops, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	require.NoError(t, err)
	for _, l := range loops {
		file, err := os.ReadFile(l)
		backing := strings.TrimSpace(string(file))
		if err != nil || !strings.HasPrefix(backing, r.HDD+"/") && !strings.HasPrefix(backing, r.NVM+"/") {
			continue // detached meanwhile, or another's
		}
		if _, err := os.Stat(backing); err != nil {
			say("a loop device holds %q", backing)
		}
	}
	return wrong
}

// inOrder waits until the daemon has nothing left to do and its books are right.
func inOrder(t *testing.T, r *rig.Rig) {
	t.Helper()
	settled(t, r)
	// What the daemon deletes in the background is not among its queues.
	await(t, func(context.Context) error {
		if wrong := audit(t, r); len(wrong) > 0 {
			return fmt.Errorf("%d things are not in order: %q", len(wrong), wrong)
		}
		return nil
	})
}
