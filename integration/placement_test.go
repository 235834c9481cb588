//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/integration/image"
	"github.com/nhybrid/nhybrid/integration/rig"
)

// half of a small blob: it compresses to no less than its content.
const half = 10_000

// lass is the policy whose boundary a test can force by the order of downloads alone.
var lass = []string{"--set", "placement.policy=lass"}

func small(seed uint64, n int) image.TinySpec {
	spec := image.TinySpec{Seed: seed}
	for range n {
		spec.Layers = append(spec.Layers, 2*half)
	}
	return spec
}

// pullWithLast pulls an image so that layer k arrives last, and not before all layers below are stored.
func pullWithLast(t *testing.T, r *rig.Rig, name string, spec image.TinySpec, k int, args ...string) []layer {
	t.Helper()
	img, err := r.PushTiny(soon(t), name, spec)
	require.NoError(t, err)
	digests := blobs(t, img)
	last := r.Link.Hold(digests[k], half)
	defer last()
	// Something has to be on its way still when layer 0 is prepared, or it would never be swung.
	other := func() {}
	if k == 0 && len(digests) > 1 {
		other = r.Link.Hold(digests[1], half)
		defer other()
	}
	wait := start(func() error { return r.Pull(soon(t), name, args...) })
	awaitLog(t, r, "layer prepared", digests[0])
	other()
	awaitDone(t, r, slices.Delete(slices.Clone(digests), k, k+1)...)
	// Unpacked one by one, the layers below k are stored and k is prepared.
	awaitLog(t, r, "layer prepared", digests[k])
	if k == 0 && !inLog(r, "policy=hdd") && !inLog(r, "policy=nvm") && !inLog(r, `policy="boundary`) {
		awaitLog(t, r, "layer swung", digests[0], "tier=nvm")
	}
	last()
	require.NoError(t, wait())
	return inspect(t, r, name)
}

// The layers below the last-downloading one go to HDD, it and those above to NVM, whichever layer that is.
func TestBoundaryIsTheLayerThatArrivesLast(t *testing.T) {
	t.Parallel()
	const n = 5
	r := newRig(t, rig.Options{DaemonArgs: lass})
	for k := range n {
		name := fmt.Sprintf("last%d:1", k)
		layers := pullWithLast(t, r, name, small(uint64(k), n), k)
		require.Equal(t, strings.Repeat("h", k)+strings.Repeat("n", n-k), tiers(layers), "layer %d arrives last", k)
		for i, l := range layers {
			require.NotNil(t, l.Decision, "layer %d", i)
			require.Equal(t, i, l.Index)
			require.Equal(t, n, l.Decision.Layers)
			require.Equal(t, "lass", l.Decision.Policy)
			require.Equal(t, r.Ref(name), l.Decision.Image)
			require.True(t, l.Decision.Sequential)
			require.Positive(t, l.Decision.NVMFree)
			if i < k {
				require.Positive(t, l.Decision.Downloading, "layer %d: %s", i, l.Decision.Reason)
				require.Positive(t, l.Decision.BytesLeft)
			} else {
				require.Zero(t, l.Decision.Downloading, "layer %d: %s", i, l.Decision.Reason)
			}
			require.Equal(t, i == k, l.LDL, "layer %d", i)
		}
		if k == 0 {
			require.Positive(t, layers[0].Decision.Swings)
		}
		why, err := r.Nhybridctl(soon(t), "why", r.Ref(name), strconv.Itoa(k))
		require.NoError(t, err)
		require.Contains(t, why, "no other layer is downloading any more")
		require.Contains(t, why, fmt.Sprintf("last download layer %d", k))
		if k > 0 {
			why, err = r.Nhybridctl(soon(t), "why", r.Ref(name), "0")
			require.NoError(t, err)
			require.Contains(t, why, "so its storing costs the pull no time")
		}
	}
}

// Unpacked in parallel, layers above the last one are stored while it downloads, and need no NVM.
func TestParallelUnpackingNeedsLessNVM(t *testing.T) {
	t.Parallel()
	const n, k = 5, 1
	spec := small(7, n)
	ctx := soon(t)
	sequential := newRig(t, rig.Options{DaemonArgs: lass})
	one := pullWithLast(t, sequential, "one:1", spec, k)
	require.Equal(t, "hnnnn", tiers(one))

	parallel := newRig(t, rig.Options{ConcurrentUnpacks: 3, DaemonArgs: lass})
	img, err := parallel.PushTiny(ctx, "many:1", spec)
	require.NoError(t, err)
	digests := blobs(t, img)
	last := parallel.Link.Hold(digests[k], half)
	defer last()
	wait := start(func() error { return parallel.Pull(ctx, "many:1") })
	for i := range digests {
		if i != k {
			awaitLog(t, parallel, "layer storing", digests[i])
		}
	}
	awaitLog(t, parallel, "layer swung", digests[k], "tier=nvm")
	last()
	require.NoError(t, wait())
	many := inspect(t, parallel, "many:1")
	require.Equal(t, "hnhhh", tiers(many))
	require.Less(t, nvmBytes(many), nvmBytes(one))
	require.False(t, many[n-1].Decision.Sequential)
}

func TestPolicies(t *testing.T) {
	t.Parallel()
	for policy, want := range map[string]string{"nvm": "nnnn", "hdd": "hhhh", "boundary=3": "hhhn", "lass": "hnnn"} {
		t.Run(policy, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, rig.Options{DaemonArgs: []string{"--set", "placement.policy=" + policy}})
			layers := pullWithLast(t, r, "p:1", small(11, 4), 1)
			require.Equal(t, want, tiers(layers))
			for _, l := range layers {
				require.Equal(t, policy, l.Decision.Policy)
			}
		})
	}
}

// With its rates known, drain goes by them and not by what is downloading: a disk that takes all at once gets all
// but the layers the pull ends with, one that takes nothing gets nothing.
func TestDrainGoesByTheRateOfTheDisk(t *testing.T) {
	t.Parallel()
	for rate, want := range map[string]string{"100TB/s": "h", "1B/s": "n"} {
		t.Run(strings.ReplaceAll(rate, "/", ""), func(t *testing.T) {
			t.Parallel()
			r := newRig(t, rig.Options{
				Rate:       20e6, // a bandwidth there is something to measure of
				DaemonArgs: []string{"--set", "placement.policy=drain", "--set", "placement.hdd_rate=" + rate},
			})
			// The rate of unpacking is learnt from layers above 1 MiB.
			warm := image.TinySpec{Seed: 1, Layers: []int64{2 << 20, 2 << 20}}
			_, err := r.PushTiny(soon(t), "warm:1", warm)
			require.NoError(t, err)
			require.NoError(t, r.Pull(soon(t), "warm:1"))

			spec := image.TinySpec{Seed: 2, Layers: []int64{2 << 20, 2 << 20, 2 << 20}}
			img, err := r.PushTiny(soon(t), "drain:1", spec)
			require.NoError(t, err)
			digests := blobs(t, img)
			last := r.Link.Hold(digests[2], 1<<20)
			defer last()
			wait := start(func() error { return r.Pull(soon(t), "drain:1") })
			awaitLog(t, r, "layer storing", digests[1])
			last()
			require.NoError(t, wait())
			layers := inspect(t, r, "drain:1")
			require.Equal(t, want, tiers(layers)[1:2], "%+v", layers[1].Decision)
			require.Contains(t, layers[1].Decision.Reason, "the disk")
		})
	}
}

// What nothing has to be downloaded for is all last, and goes to NVM as far as it fits.
func TestImageAlreadyInTheContentStore(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{DaemonArgs: lass})
	_, err := r.PushTiny(ctx, "here:1", small(21, 3))
	require.NoError(t, err)
	require.NoError(t, r.Pull(ctx, "here:1", "--snapshotter", "overlayfs"))
	require.NoError(t, r.Daemon.Restart(ctx)) // it has not seen them arrive
	await(t, reachable(r))
	seen := len(r.Link.Requests())
	require.NoError(t, r.Pull(ctx, "here:1", "--snapshotter", "nhybrid"))
	for _, q := range r.Link.Requests()[seen:] {
		require.NotContains(t, q.Path, "/blobs/", "nothing is downloaded again")
	}
	layers := inspect(t, r, "here:1")
	require.Equal(t, "nnn", tiers(layers))
	for _, l := range layers {
		require.Zero(t, l.Decision.Downloading)
		require.Contains(t, l.Decision.Reason, "no other layer is downloading any more")
		require.Zero(t, l.Decision.Swings)
	}
}

// ctr pull --local unpacks in ctr's own process, when all has arrived: every layer is one that the pull waits for.
func TestLocalPull(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{DaemonArgs: lass})
	spec := small(31, 4)
	spec.Runnable = true
	img, err := r.PushTiny(ctx, "local:1", spec)
	require.NoError(t, err)
	digests := blobs(t, img)
	last := r.Link.Hold(digests[2], half)
	defer last()
	wait := start(func() error { return r.Pull(ctx, "local:1", "--local") })
	awaitDone(t, r, digests[0], digests[1], digests[3], digests[4])
	last()
	require.NoError(t, wait())
	layers := inspect(t, r, "local:1")
	require.Equal(t, "nnnnn", tiers(layers))
	for _, l := range layers {
		require.Equal(t, r.Ref("local:1"), l.Decision.Image, "which image a layer belongs to is found without labels")
		require.Equal(t, 5, l.Decision.Layers)
	}
	out, err := r.RunContainer(ctx, "local:1", "c", "cat", "/data/shared")
	require.NoError(t, err)
	require.Equal(t, "3", out)
}

// The daemon sees the downloads of the first pull after containerd was away, however soon it comes.
func TestPullRightAfterContainerdCameBack(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{DaemonArgs: lass})
	require.NoError(t, r.Containerd.Stop())
	// gRPC now waits longer and longer before it tries again.
	awaitLog(t, r, "no events from containerd")
	_, err := r.Nhybridctl(ctx, "status")
	require.NoError(t, err)
	require.NoError(t, r.Containerd.Start(ctx))
	require.Equal(t, "hhnn", tiers(pullWithLast(t, r, "back:1", small(41, 4), 2)))
}

// A layer that does not fit beside the reserve goes to HDD, and says so; no pull fails for it.
func TestLayerTooLargeForNVM(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{NVMSize: 64 << 20, DaemonArgs: lass})
	_, err := r.PushTiny(ctx, "large:1", image.TinySpec{Runnable: true, Layers: []int64{80 << 20, half}})
	require.NoError(t, err)
	require.NoError(t, r.Pull(ctx, "large:1", "--snapshotter", "overlayfs"))
	require.NoError(t, r.Pull(ctx, "large:1"))
	layers := inspect(t, r, "large:1")
	require.Equal(t, "nhn", tiers(layers))
	require.False(t, layers[1].Decision.Admitted)
	require.Contains(t, layers[1].Decision.Reason, "it would go to NVM")
	require.Contains(t, layers[1].Decision.Reason, "needs")
	out, err := r.RunContainer(ctx, "large:1", "c", "sh", "-c", "cat /data/0/* | wc -c")
	require.NoError(t, err)
	require.Equal(t, strconv.Itoa(80<<20), out)
}

// The tier of a container's writable directory is configured, chosen by a label, and HDD where NVM is full.
func TestTierOfWritableDirectories(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{NVMSize: 64 << 20, DaemonArgs: lass})
	_, err := r.PushBusybox(ctx, "busybox:1")
	require.NoError(t, err)
	require.NoError(t, r.Pull(ctx, "busybox:1"))
	tierOf := func(key string) string {
		var answer struct{ Snapshot struct{ Tier string } }
		ctl(t, r, &answer, "inspect", key)
		return answer.Snapshot.Tier
	}
	top := topOf(t, r, "busybox:1")
	prepare(t, r, "plain", top, nil)
	require.Equal(t, "nvm", tierOf("plain"))
	prepare(t, r, "labelled", top, map[string]string{"containerd.io/snapshot/nhybrid.upper-tier": "hdd"})
	require.Equal(t, "hdd", tierOf("labelled"))

	// A container fills NVM up.
	_, err = r.RunContainer(ctx, "busybox:1", "filler", "sh", "-c", "true")
	require.NoError(t, err)
	_, err = r.Ctr(ctx, "run", "-d", r.Ref("busybox:1"), "full", "sh", "-c", "dd if=/dev/zero of=/fill bs=1M; sleep 100000")
	require.NoError(t, err)
	await(t, fullNVM(r))
	prepare(t, r, "late", top, nil)
	require.Equal(t, "hdd", tierOf("late"))
	require.True(t, inLog(r, "writable directory on HDD"))

	// Images and containers still go in and out.
	_, err = r.PushTiny(ctx, "more:1", image.TinySpec{Seed: 5, Runnable: true, Layers: []int64{half}})
	require.NoError(t, err)
	require.NoError(t, r.Pull(ctx, "more:1"))
	require.Equal(t, "nh", tiers(inspect(t, r, "more:1")), "busybox was there, the other layer finds no room")
	out, err := r.RunContainer(ctx, "more:1", "c", "sh", "-c", "echo written >/f && cat /f /data/shared")
	require.NoError(t, err)
	require.Equal(t, "written\n0", out)
	removeImage(t, r, "more:1")
}
