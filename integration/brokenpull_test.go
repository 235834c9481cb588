//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/integration/link"
	"github.com/nhybrid/nhybrid/integration/rig"
)

// The daemon dies in the middle of a pull, while a layer is awaited: the pull can be repeated and is right.
func TestDaemonDiesInAPull(t *testing.T) {
	t.Parallel()
	for signal, end := range map[string]func(*rig.Process) error{"SIGTERM": (*rig.Process).Stop, "SIGKILL": (*rig.Process).Kill} {
		for _, unpacks := range []int{1, 3} {
			t.Run(fmt.Sprintf("%s, unpacks=%d", signal, unpacks), func(t *testing.T) {
				t.Parallel()
				ctx := soon(t)
				r := newRig(t, rig.Options{ConcurrentUnpacks: unpacks})
				img, err := r.PushTiny(ctx, "app:1", app(6))
				require.NoError(t, err)
				digests := blobs(t, img)
				release := r.Link.Hold(digests[2], half)
				defer release()
				wait := start(func() error { return r.Pull(ctx, "app:1") })
				awaitStored(t, r, but(digests, 2)...)
				require.NoError(t, end(r.Daemon))
				require.NoError(t, r.Daemon.Start(ctx))
				release()
				if err := wait(); err != nil { // containerd may have met the daemon's absence
					await(t, reachable(r))
					require.NoError(t, r.Pull(ctx, "app:1"))
				}
				require.Equal(t, "0:0 644 2\n"+contentSum(t, 6, 3),
					run(t, r, "app:1", "sh", "-c", "stat -c '%u:%g %a %s' /data/shared; "+allContent))
				removeImage(t, r, "app:1")
				awaitEmpty(t, r)
			})
		}
	}
}

// containerd dies in the middle of a pull: what was unpacked is right or goes.
func TestContainerdDiesInAPull(t *testing.T) {
	t.Parallel()
	for _, noDiffer := range []bool{false, true} {
		t.Run(fmt.Sprintf("no differ=%v", noDiffer), func(t *testing.T) {
			t.Parallel()
			ctx := soon(t)
			r := newRig(t, rig.Options{DaemonArgs: lass, NoDiffer: noDiffer})
			digests, release := pushHeld(t, r, 13)
			defer release()
			wait := start(func() error { return r.Pull(ctx, "app:1") })
			awaitStored(t, r, but(digests, 2)...)
			require.NoError(t, r.Containerd.Kill())
			require.Error(t, wait())
			release()
			require.NoError(t, r.Containerd.Start(ctx))
			await(t, reachable(r))
			require.NoError(t, r.Pull(ctx, "app:1"))
			require.Equal(t, contentSum(t, 13, 3), run(t, r, "app:1", "sh", "-c", allContent))
			collect(t, r, "app:1")
		})
	}
}

// A pull that is cancelled can be repeated. Layers that were stored whole are kept for that for a while; once the image goes, so do they.
func TestCancelledPull(t *testing.T) {
	t.Parallel()
	for _, local := range []bool{false, true} {
		t.Run(fmt.Sprintf("local=%v", local), func(t *testing.T) {
			t.Parallel()
			ctx := soon(t)
			r := newRig(t, rig.Options{DaemonArgs: lass})
			digests, release := pushHeld(t, r, 10)
			defer release()
			args := []string{"images", "pull", "--plain-http"}
			if local {
				args = append(args, "--local")
			}
			pull, err := r.Command(ctx, "ctr", append(args, r.Ref("app:1"))...)
			require.NoError(t, err)
			require.NoError(t, pull.Start())
			if !local { // which unpacks only when all is there
				awaitStored(t, r, but(digests, 2)...)
			}
			require.NoError(t, r.Link.Await(ctx, link.Reached(digests[2], half)))
			require.NoError(t, pull.Process.Kill())
			_ = pull.Wait()
			release()
			require.NoError(t, r.Pull(ctx, "app:1"))
			out, err := r.RunContainer(ctx, "app:1", "c", "sh", "-c", "cat /data/*/* | sha256sum")
			require.NoError(t, err)
			require.Equal(t, contentSum(t, 10, 3), out)
			collect(t, r, "app:1")
		})
	}
}

// The registry dies in the middle of a layer: the pull fails, and succeeds when it is back, with the rest of the blob only.
func TestRegistryDiesInALayer(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{DaemonArgs: lass})
	img, err := r.PushTiny(ctx, "app:1", app(11))
	require.NoError(t, err)
	digests := blobs(t, img)
	r.Link.Cut(digests[2], half, 100)
	require.Error(t, r.Pull(ctx, "app:1"))
	r.Link.Cut(digests[2], 0, 0)
	require.NoError(t, r.Pull(ctx, "app:1"))
	resumed := false
	for _, q := range r.Link.Requests() {
		resumed = resumed || q.Digest == digests[2] && strings.HasPrefix(q.Range, "bytes=")
	}
	require.True(t, resumed, "containerd asked for the rest only: %+v", r.Link.Requests())
	out, err := r.RunContainer(ctx, "app:1", "c", "sh", "-c", "cat /data/*/* | sha256sum")
	require.NoError(t, err)
	require.Equal(t, contentSum(t, 11, 3), out)

	// And the link as a whole.
	img, err = r.PushTiny(ctx, "next:1", app(12))
	require.NoError(t, err)
	digests = blobs(t, img)
	release := r.Link.Hold(digests[3], half)
	defer release()
	wait := start(func() error { return r.Pull(ctx, "next:1") })
	require.NoError(t, r.Link.Await(ctx, link.Reached(digests[3], half)))
	r.Link.SetDown(true)
	require.Error(t, wait())
	r.Link.SetDown(false)
	release()
	require.NoError(t, r.Pull(ctx, "next:1"))
	out, err = r.RunContainer(ctx, "next:1", "c2", "sh", "-c", "cat /data/*/* | sha256sum")
	require.NoError(t, err)
	require.Equal(t, contentSum(t, 12, 3), out)
	removeImage(t, r, "app:1")
	removeImage(t, r, "next:1")
	awaitEmpty(t, r)
}
