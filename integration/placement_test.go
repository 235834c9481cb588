//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
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

// pullWithLast pulls an image so that layer k arrives last, and not before all others are stored.
func pullWithLast(t *testing.T, r *rig.Rig, name string, spec image.TinySpec, k int, args ...string) []layer {
	t.Helper()
	img, err := r.PushTiny(soon(t), name, spec)
	require.NoError(t, err)
	digests := blobs(t, img)
	last := r.Link.Hold(digests[k], half)
	defer last()
	wait := start(func() error { return r.Pull(soon(t), name, args...) })
	awaitStored(t, r, but(digests, k)...)
	last()
	require.NoError(t, wait())
	return inspect(t, r, name)
}

// only is the word of tiers where one layer of n goes to NVM.
func only(k, n int) string { return strings.Repeat("h", k) + "n" + strings.Repeat("h", n-k-1) }

// All layers are stored as they arrive, one by one unpacked by the client or not: the last-downloading one goes to NVM,
// and no other, whichever layer that is.
func TestOnlyTheLayerThatArrivesLastGoesToNVM(t *testing.T) {
	t.Parallel()
	const n = 5
	for _, unpacks := range []int{1, 3} {
		t.Run(fmt.Sprintf("unpacks=%d", unpacks), func(t *testing.T) {
			t.Parallel()
			r := newRig(t, rig.Options{ConcurrentUnpacks: unpacks, DaemonArgs: lass})
			for k := range n {
				name := fmt.Sprintf("last%d:1", k)
				layers := pullWithLast(t, r, name, small(uint64(k), n), k)
				require.Equal(t, only(k, n), tiers(layers), "layer %d arrives last", k)
				for i, l := range layers {
					require.Equal(t, i, l.Index)
					require.Equal(t, n, l.Decision.Layers)
					require.Equal(t, "lass", l.Decision.Policy)
					require.Equal(t, r.Ref(name), l.Decision.Image)
					require.Positive(t, l.Decision.NVMFree)
					if i != k {
						require.Positive(t, l.Decision.Downloading, "layer %d: %s", i, l.Decision.Reason)
						require.Positive(t, l.Decision.BytesLeft)
					} else {
						require.Zero(t, l.Decision.Downloading, "layer %d: %s", i, l.Decision.Reason)
					}
					require.Equal(t, i == k, l.LDL, "layer %d", i)
				}
				why, err := r.Nhybridctl(soon(t), "why", r.Ref(name), strconv.Itoa(k))
				require.NoError(t, err)
				require.Contains(t, why, "as the whole layer")
				require.Contains(t, why, fmt.Sprintf("last download layer %d", k))
				require.Contains(t, layers[k].Decision.Reason, "no other layer is downloading any more")
				require.Contains(t, layers[(k+1)%n].Decision.Reason, "so its storing costs the pull no time")
			}
		})
	}
}

// A layer is unpacked while its blob arrives, whichever applier the client takes; nothing is packed a second time.
func TestStoredWhileItDownloads(t *testing.T) {
	t.Parallel()
	for name, o := range map[string]rig.Options{
		"our differ": {}, "other differ": {NoDiffer: true}, "other differ, parallel": {NoDiffer: true, ConcurrentUnpacks: 3}, "parallel": {ConcurrentUnpacks: 3},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := soon(t)
			o.DaemonArgs = []string{"--set", "placement.policy=boundary=2"}
			r := newRig(t, o)
			const size = 8 << 20
			spec := image.TinySpec{Seed: 51, Runnable: true, Layers: []int64{size, size}}
			img, err := r.PushTiny(ctx, "app:1", spec)
			require.NoError(t, err)
			digests := blobs(t, img)
			for _, d := range digests[1:] {
				defer r.Link.Hold(d, size/2)()
			}
			wait := start(func() error { return r.Pull(ctx, "app:1") })
			// Of one layer bytes go to a pack that has no name yet, of the other to NVM.
			for _, pattern := range []string{r.HDD + "/p/.*.new", r.NVM + "/d/*/*/*"} {
				await(t, func(context.Context) error {
					files, err := filepath.Glob(pattern)
					for _, f := range files {
						if st, err := os.Stat(f); err == nil && st.Size() >= size/8 {
							return nil
						}
					}
					return errors.Join(err, fmt.Errorf("no file %s of %d bytes among %q", pattern, size/8, files))
				})
			}
			for _, d := range digests[1:] {
				require.False(t, inLog(r, "layer stored", d), "half a layer is no layer")
				r.Link.Hold(d, size)() // a new rule takes the place of the old one and lets it go
			}
			require.NoError(t, wait())
			require.Equal(t, "hhn", tiers(inspect(t, r, "app:1")))
			require.False(t, inLog(r, "step=pack"))
			require.Equal(t, fmt.Sprint(2*size), run(t, r, "app:1", "sh", "-c", "cat /data/*/* | wc -c"))
			// What went to NVM alone gets into the pack.
			settled(t, r)
			for i, l := range inspect(t, r, "app:1") {
				require.Equal(t, "home", l.State, "layer %d", i)
			}
			removeImage(t, r, "app:1")
			awaitEmpty(t, r)
		})
	}
}

func TestPolicies(t *testing.T) {
	t.Parallel()
	for policy, want := range map[string]string{"nvm": "nnnn", "hdd": "hhhh", "boundary=3": "hhhn", "lass": "hnhh"} {
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

// drain goes by the rate of the disk: one that takes all at once gets all, one that takes nothing gets nothing. What is in the
// content store needs no bandwidth to be known.
func TestDrainGoesByTheRateOfTheDisk(t *testing.T) {
	t.Parallel()
	for rate, want := range map[string]string{"100TB/s": "hhh", "1B/s": "nnn"} {
		t.Run(strings.ReplaceAll(rate, "/", ""), func(t *testing.T) {
			t.Parallel()
			r := newRig(t, rig.Options{DaemonArgs: []string{"--set", "placement.policy=drain", "--set", "placement.hdd_rate=" + rate, "--set", "hot.predict=off"}})
			_, err := r.PushTiny(soon(t), "drain:1", image.TinySpec{Seed: 2, Layers: []int64{2 << 20, 2 << 20, 2 << 20}})
			require.NoError(t, err)
			require.NoError(t, r.Pull(soon(t), "drain:1", "--snapshotter", "overlayfs"))
			require.NoError(t, r.Pull(soon(t), "drain:1"))
			layers := inspect(t, r, "drain:1")
			require.Equal(t, want, tiers(layers), "%+v", layers[1].Decision)
			for _, l := range layers {
				require.Contains(t, l.Decision.Reason, "the disk")
			}
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
	require.Equal(t, only(2, 4), tiers(pullWithLast(t, r, "back:1", small(41, 4), 2)))
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
