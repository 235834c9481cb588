//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/integration/image"
	"github.com/nhybrid/nhybrid/integration/rig"
)

// app is a runnable image of three more layers.
func app(seed uint64) image.TinySpec {
	spec := small(seed, 3)
	spec.Runnable = true
	return spec
}

// What containerd collects is gone from both tiers, mounts included.
func TestGarbageCollectionLeavesTiersEmpty(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{DaemonArgs: lass})
	layers := pullWithLast(t, r, "app:1", app(1), 2)
	require.Equal(t, only(2, 4), tiers(layers))
	_, err := r.RunContainer(ctx, "app:1", "c1", "sh", "-c", "echo written >/file")
	require.NoError(t, err)
	settled(t, r)
	found, err := leftovers(r)
	require.NoError(t, err)
	require.NotEmpty(t, found)
	removeImage(t, r, "app:1")
	awaitEmpty(t, r)

	// The numbers of snapshots are not used again, but the image can be.
	require.NoError(t, r.Pull(ctx, "app:1"))
	out, err := r.RunContainer(ctx, "app:1", "c2", "cat", "/data/shared")
	require.NoError(t, err)
	require.Equal(t, "2", out)
}

// A container that still runs keeps its image's layers, and none of its files goes with the image.
func TestImageRemovedUnderAContainer(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{DaemonArgs: lass})
	_, err := r.PushTiny(ctx, "app:1", app(2))
	require.NoError(t, err)
	require.NoError(t, r.Pull(ctx, "app:1"))
	sleeper(t, r, "app:1", "s")
	removeImage(t, r, "app:1")
	settled(t, r)
	require.Equal(t, fmt.Sprint(2*half), execute(t, r, "s", "sh", "-c", "cat /data/1/* | wc -c"))
	endSleeper(t, r, "s")
	awaitEmpty(t, r)
}

// sleeper starts a container that stays.
func sleeper(t *testing.T, r *rig.Rig, name, id string) {
	t.Helper()
	_, err := r.Ctr(soon(t), "run", "-d", r.Ref(name), id, "sleep", "100000")
	require.NoError(t, err)
}

func endSleeper(t *testing.T, r *rig.Rig, id string) {
	t.Helper()
	_, err := r.Ctr(soon(t), "tasks", "rm", "-f", id)
	require.NoError(t, err)
	_, err = r.Ctr(soon(t), "containers", "rm", id)
	require.NoError(t, err)
}

var execs struct {
	sync.Mutex
	n int
}

// execute runs a command in a running container.
func execute(t *testing.T, r *rig.Rig, id string, command ...string) string {
	t.Helper()
	execs.Lock()
	execs.n++
	name := fmt.Sprintf("e%d", execs.n)
	execs.Unlock()
	out, err := r.Ctr(soon(t), append([]string{"tasks", "exec", "--exec-id", name, id}, command...)...)
	require.NoError(t, err)
	return out
}

// Nothing of the daemon is on the way of a container's reads and writes: it can go at any time.
func TestDaemonRestartsUnderContainers(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{DaemonArgs: lass})
	require.Equal(t, only(2, 4), tiers(pullWithLast(t, r, "app:1", app(3), 2)))
	sleeper(t, r, "app:1", "s")
	end := map[string]func() error{"SIGTERM": r.Daemon.Stop, "SIGKILL": r.Daemon.Kill}
	for i, signal := range []string{"SIGTERM", "SIGKILL"} {
		require.NoError(t, end[signal]())
		// Files that were never opened before, one on each tier, and a new one.
		for layer := range 3 {
			require.Equal(t, "2500", execute(t, r, "s", "sh", "-c", fmt.Sprintf("wc -c </data/%d/%d", layer, i)), signal)
		}
		require.Equal(t, "new", execute(t, r, "s", "sh", "-c", "echo new >/new; cat /new"), signal)
		require.Error(t, r.Pull(ctx, "app:1", "--snapshotter", "nhybrid"), "without the daemon there are no pulls")
		require.NoError(t, r.Daemon.Start(ctx))
		require.Equal(t, "2500", execute(t, r, "s", "sh", "-c", fmt.Sprintf("wc -c </data/2/%d", 4+i)), signal)
		await(t, reachable(r))
		out, err := r.RunContainer(ctx, "app:1", "c"+signal, "cat", "/data/shared")
		require.NoError(t, err, signal)
		require.Equal(t, "2", out)
		require.Equal(t, only(2, 4), tiers(inspect(t, r, "app:1")), "decisions outlive the daemon")
	}
	endSleeper(t, r, "s")
	removeImage(t, r, "app:1")
	awaitEmpty(t, r)
}

func TestContainerdRestartsUnderContainers(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{DaemonArgs: lass})
	_, err := r.PushTiny(ctx, "app:1", app(4))
	require.NoError(t, err)
	require.NoError(t, r.Pull(ctx, "app:1"))
	sleeper(t, r, "app:1", "s")
	require.NoError(t, r.Containerd.Kill())
	require.NoError(t, r.Containerd.Start(ctx))
	require.Equal(t, "2500", execute(t, r, "s", "sh", "-c", "wc -c </data/1/1"))
	require.NoError(t, r.Containerd.Restart(ctx))
	require.Equal(t, "2500", execute(t, r, "s", "sh", "-c", "wc -c </data/1/2"))
	require.Equal(t, only(2, 4), tiers(pullWithLast(t, r, "next:1", small(5, 4), 2)), "downloads are seen again")
	endSleeper(t, r, "s")
	removeImage(t, r, "app:1")
	removeImage(t, r, "next:1")
	awaitEmpty(t, r)
}

// contentSum is what sha256sum says of the files of all layers of a small image, in the shell's order.
func contentSum(t *testing.T, seed uint64, n int) string {
	t.Helper()
	return sumOf(t, small(seed, n))
}

// sumOf is the same of any generated image.
func sumOf(t *testing.T, spec image.TinySpec) string {
	t.Helper()
	img, err := image.Tiny(spec)
	require.NoError(t, err)
	layers, err := img.Layers()
	require.NoError(t, err)
	sum := sha256.New()
	for _, l := range layers {
		in, err := l.Uncompressed()
		require.NoError(t, err)
		files := tar.NewReader(in)
		for {
			h, err := files.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			require.NoError(t, err)
			if strings.Count(h.Name, "/") == 2 { // data/<layer>/<file>
				_, err = io.Copy(sum, files)
				require.NoError(t, err)
			}
		}
		require.NoError(t, in.Close())
	}
	return fmt.Sprintf("%x  -", sum.Sum(nil))
}

// Killed right after a commit, again and again: no layer is lost, torn or kept that should go.
func TestDaemonKilledRightAfterCommitsAndRemovals(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{DaemonArgs: lass})
	_, err := r.PushTiny(ctx, "app:1", app(7))
	require.NoError(t, err)
	for range 3 {
		require.NoError(t, r.Pull(ctx, "app:1"))
		require.NoError(t, r.Daemon.Kill())
		require.NoError(t, r.Daemon.Start(ctx))
		await(t, reachable(r))
		out, err := r.RunContainer(ctx, "app:1", "c", "sh", "-c", "cat /data/*/* | sha256sum")
		require.NoError(t, err)
		require.Equal(t, contentSum(t, 7, 3), out)
		removeImage(t, r, "app:1")
		require.NoError(t, r.Daemon.Kill())
		require.NoError(t, r.Daemon.Start(ctx))
		awaitEmpty(t, r)
	}
}

// Two namespaces share layers, and no snapshots; removing the image from one leaves the other whole.
func TestTwoNamespaces(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{DaemonArgs: lass})
	_, err := r.PushTiny(ctx, "app:1", app(8))
	require.NoError(t, err)
	other := r.Namespace + "-b"
	ctr := func(ns string, args ...string) string {
		t.Helper()
		out, err := r.Run(ctx, "ctr", append([]string{"-n", ns}, args...)...)
		require.NoError(t, err)
		return out
	}
	var both sync.WaitGroup
	errs := make([]error, 2)
	for i, ns := range []string{r.Namespace, other} {
		both.Go(func() {
			_, errs[i] = r.Run(ctx, "ctr", "-n", ns, "images", "pull", "--plain-http", r.Ref("app:1"))
		})
	}
	both.Wait()
	require.NoError(t, errors.Join(errs...))
	mine, theirs := inspect(t, r, "app:1"), inspectIn(t, r, other, "app:1")
	require.Equal(t, numbers(mine), numbers(theirs))
	require.NotEqual(t, mine[3].SnapshotID, theirs[3].SnapshotID)
	require.Equal(t, "2", ctr(other, "run", "--rm", r.Ref("app:1"), "c", "cat", "/data/shared"))
	removeImage(t, r, "app:1")
	settled(t, r)
	require.Equal(t, contentSum(t, 8, 3), ctr(other, "run", "--rm", r.Ref("app:1"), "c2", "sh", "-c", "cat /data/*/* | sha256sum"))
	_, err = r.Run(ctx, "nhybridctl", "-n", other, "inspect", r.Ref("app:1"))
	require.NoError(t, err)
	_, err = r.Nhybridctl(ctx, "inspect", r.Ref("app:1"))
	require.ErrorContains(t, err, "not found")
	ctr(other, "images", "rm", "--sync", r.Ref("app:1"))
	awaitEmpty(t, r)
}

// Images that share layers are pulled at once: each layer is stored once, and all run.
func TestConcurrentPullsShareLayers(t *testing.T) {
	t.Parallel()
	for _, unpacks := range []int{1, 3} {
		t.Run(fmt.Sprintf("unpacks=%d", unpacks), func(t *testing.T) {
			t.Parallel()
			ctx := soon(t)
			r := newRig(t, rig.Options{ConcurrentUnpacks: unpacks, DaemonArgs: lass})
			const n = 3
			for i := range n {
				spec := app(9)
				spec.Layers = append(spec.Layers, int64(1000*(i+1))) // the topmost is each image's own
				_, err := r.PushTiny(ctx, fmt.Sprintf("app%d:1", i), spec)
				require.NoError(t, err)
			}
			var all sync.WaitGroup
			errs := make([]error, n)
			for i := range n {
				all.Go(func() { errs[i] = r.Pull(ctx, fmt.Sprintf("app%d:1", i)) })
			}
			all.Wait()
			require.NoError(t, errors.Join(errs...))
			shared := inspect(t, r, "app0:1")
			for i := range n {
				layers := inspect(t, r, fmt.Sprintf("app%d:1", i))
				require.Len(t, layers, 5)
				for j := range 4 {
					require.Equal(t, shared[j].SnapshotID, layers[j].SnapshotID, "layer %d of image %d", j, i)
				}
				out, err := r.RunContainer(ctx, fmt.Sprintf("app%d:1", i), fmt.Sprintf("c%d", i), "sh", "-c", "cat /data/3/* | wc -c; cat /data/shared")
				require.NoError(t, err)
				require.Equal(t, fmt.Sprintf("%d\n3", 1000*(i+1)), out)
			}
			removeImage(t, r, "app0:1")
			settled(t, r)
			out, err := r.RunContainer(ctx, "app1:1", "again", "sh", "-c", "cat /data/[0-2]/* | sha256sum")
			require.NoError(t, err)
			require.Equal(t, contentSum(t, 9, 3), out)
			for i := 1; i < n; i++ {
				removeImage(t, r, fmt.Sprintf("app%d:1", i))
			}
			awaitEmpty(t, r)
		})
	}
}

// collect removes an image and what a pull of it that did not end has leased, and waits until nothing is left.
func collect(t *testing.T, r *rig.Rig, name string) {
	t.Helper()
	c, err := r.Client()
	require.NoError(t, err)
	ctx := r.Context(soon(t))
	await(t, func(context.Context) error { // leases of the transfer service end on their own account
		leases, err := c.LeasesService().List(ctx)
		if err != nil {
			return err
		}
		for _, l := range leases {
			if err := c.LeasesService().Delete(ctx, l); err != nil {
				return err
			}
		}
		found, err := leftovers(r)
		if err == nil && len(found) > 0 {
			// A deletion is what makes containerd collect.
			_, _ = r.Ctr(ctx, "images", "rm", "--sync", r.Ref(name))
			err = fmt.Errorf("left over: %q", found)
		}
		return err
	})
	awaitEmpty(t, r)
}

// Layers belong to no chain: images that have them in another order share them.
func TestImagesShareLayersInAnotherOrder(t *testing.T) {
	t.Parallel()
	for _, noDiffer := range []bool{false, true} {
		t.Run(fmt.Sprintf("no differ=%v", noDiffer), func(t *testing.T) {
			t.Parallel()
			ctx := soon(t)
			r := newRig(t, rig.Options{DaemonArgs: lass, NoDiffer: noDiffer})
			a, b := ofFiles(t, plain("dir/a", []byte("a")), plain("both", []byte("a"))), ofFiles(t, plain("dir/b", []byte("b")), plain("both", []byte("b")))
			_, err := r.PushBusybox(ctx, "ab:1", a, b)
			require.NoError(t, err)
			_, err = r.PushBusybox(ctx, "ba:1", b, a)
			require.NoError(t, err)
			require.NoError(t, r.Pull(ctx, "ab:1"))
			require.NoError(t, r.Pull(ctx, "ba:1"))
			ab, ba := numbers(inspect(t, r, "ab:1")), numbers(inspect(t, r, "ba:1"))
			require.Equal(t, []string{ab[0], ab[2], ab[1]}, ba)
			require.Equal(t, "abb", run(t, r, "ab:1", "cat", "/dir/a", "/dir/b", "/both"))
			require.Equal(t, "aba", run(t, r, "ba:1", "cat", "/dir/a", "/dir/b", "/both"))
			removeImage(t, r, "ab:1")
			settled(t, r)
			require.Equal(t, "aba", run(t, r, "ba:1", "cat", "/dir/a", "/dir/b", "/both"))
			removeImage(t, r, "ba:1")
			awaitEmpty(t, r)
		})
	}
}
