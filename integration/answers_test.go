//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/integration/rig"
	"github.com/nhybrid/nhybrid/integration/workload"
)

// What the tables of nhybridctl have columns for, the daemon fills: what a container has written, what an orphan takes, which
// way files move.
func TestAnswersAreFilled(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{DaemonArgs: hot("--set", "placement.policy=hdd", "--set", "hot.predict=off", "--set", "hot.operations=2")})
	bulk(t, r, "app:1", 40)
	require.NoError(t, r.Pull(ctx, "app:1"))

	const wrote = 3 << 20
	sleeper(t, r, "app:1", "web")
	execute(t, r, "web", "sh", "-ec", fmt.Sprintf("dd if=/dev/urandom of=/own bs=1M count=%d; sync", wrote>>20))
	type snapshot struct {
		Name, Kind, Tier string
		NVMBytes         *int64 `json:"nvm_bytes"`
		HDDBytes         *int64 `json:"hdd_bytes"`
		Inodes           *int64
	}
	web := func(args ...string) snapshot {
		var all []snapshot
		ctl(t, r, &all, args...)
		for _, s := range all {
			if s.Name == "web" {
				return s
			}
		}
		require.Fail(t, "no snapshot of the container")
		return snapshot{}
	}
	require.Nil(t, web("ls").NVMBytes, "not counted")
	s := web("ls", "--size")
	require.Equal(t, "nvm", s.Tier)
	require.GreaterOrEqual(t, *s.NVMBytes, int64(wrote))
	require.Zero(t, *s.HDDBytes)
	require.Greater(t, *s.Inodes, int64(1))
	out, err := r.Nhybridctl(ctx, "inspect", "web")
	require.NoError(t, err)
	require.Regexp(t, `(?m)^writable +3\.\d+ MB on NVM, in \d+ inodes$`, out)

	// A snapshot that was committed by hand, and that nothing but a label keeps.
	const built = 1 << 20
	mounts := prepare(t, r, "build", "", nil)
	require.NoError(t, os.WriteFile(filepath.Join(mounts[0].Source, "made"), workload.Bytes(1, built), 0o644))
	service := service(t, r, r.Snapshotter)
	require.NoError(t, service.Commit(r.Context(ctx), "built", "build", snapshots.WithLabels(kept)))
	t.Cleanup(func() { _ = service.Remove(r.Context(context.Background()), "built") })
	settled(t, r)
	var usage struct {
		Tiers []struct {
			Name            string
			Uppers, Orphans int64
		}
		Orphans []struct {
			Key      string
			NVMBytes int64 `json:"nvm_bytes"`
			HDDBytes int64 `json:"hdd_bytes"`
		}
	}
	ctl(t, r, &usage, "du")
	require.GreaterOrEqual(t, usage.Tiers[0].Uppers, int64(wrote))
	require.Len(t, usage.Orphans, 1)
	require.True(t, strings.HasSuffix(usage.Orphans[0].Key, "/built"), usage.Orphans[0].Key)
	require.GreaterOrEqual(t, usage.Orphans[0].NVMBytes+usage.Orphans[0].HDDBytes, int64(built))
	require.Equal(t, usage.Orphans[0].NVMBytes, usage.Tiers[0].Orphans)
	require.Equal(t, usage.Orphans[0].HDDBytes, usage.Tiers[1].Orphans)

	// Two files a second come up.
	steer(t, r, "profile", "pin", r.Ref("app:1"), "**")
	var m struct {
		Current   string
		Direction string `json:"current_direction"`
		NVMUsed   int64  `json:"nvm_used"`
		Inodes    int64
		Used      int64 `json:"inodes_used"`
	}
	await(t, func(context.Context) error {
		ctl(t, r, &m, "migrate", "status")
		if m.Current == "" || m.Direction != "up" {
			return fmt.Errorf("%+v", m)
		}
		return nil
	})
	require.Positive(t, m.NVMUsed)
	require.Positive(t, m.Used)
	require.Less(t, m.Used, m.Inodes)
	out, err = r.Nhybridctl(ctx, "migrate", "status")
	require.NoError(t, err)
	require.Regexp(t, `(?m)^moving +file \d+ of layer \d+ \(up\)$`, out)
	endSleeper(t, r, "web")
}
