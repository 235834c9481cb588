//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"os"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/integration/image"
	"github.com/nhybrid/nhybrid/integration/rig"
)

// same asserts that two trees look the same.
func same(t *testing.T, want, got map[string]file) {
	t.Helper()
	require.Empty(t, differ(want, got))
}

// excluded has everything of an image leave NVM.
func excluded(t *testing.T, r *rig.Rig, name string) {
	t.Helper()
	settled(t, r) // nothing leaves NVM of a layer that is not on its devices yet
	_, err := r.Nhybridctl(soon(t), "profile", "exclude", r.Ref(name), "**")
	require.NoError(t, err)
	_, err = r.Nhybridctl(soon(t), "migrate", "now", "--wait")
	require.NoError(t, err)
	for path, f := range hotFiles(t, r, name) {
		require.Zero(t, f.NVMBytes, "%s: %+v", path, f)
	}
}

// What has moved looks as it did, and so does what is stored on top of it: layers that come later, commits of containers.
func TestContentAfterMigration(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{DaemonArgs: hot("--set", "placement.policy=nvm")})
	needNerdctl(t, r)
	spec := image.TinySpec{Seed: 5, Runnable: true, Nasty: true, Layers: []int64{half, half}}
	_, err := r.PushTiny(ctx, "base:1", spec)
	require.NoError(t, err)
	// A layer above that does not list the directories into which it writes.
	spec.Layers = append(spec.Layers, half)
	_, err = r.PushTiny(ctx, "above:1", spec)
	require.NoError(t, err)
	above, err := image.Tiny(spec)
	require.NoError(t, err)
	layers, err := above.Layers()
	require.NoError(t, err)
	_, err = r.PushBusybox(ctx, "deep:1", layers[1], layers[2], ofFiles(t, plain("nasty/1/dir/new", []byte("new")), plain("nasty/0/opaque/new", []byte("new"))))
	require.NoError(t, err)

	require.NoError(t, r.Pull(ctx, "base:1"))
	require.NoError(t, r.Pull(ctx, "base:1", "--snapshotter", "overlayfs"))
	want := look(t, mounted(t, r, "overlayfs", "base:1"))
	_, err = r.NerdctlRun(ctx, "--name", "changed", r.Ref("base:1"), "sh", "-ec",
		"echo more >>/nasty/1/owned; chmod 700 /nasty/1/setuid; rm -r /nasty/1/dir; echo new >/nasty/1/opaque/mine; mv /nasty/1/empty /moved")
	require.NoError(t, err)
	awaitMigration(t, r, 1)
	excluded(t, r, "base:1")
	same(t, want, look(t, mounted(t, r, "nhybrid", "base:1")))

	// Its container, made before anything moved, is committed now.
	_, err = r.Nerdctl(ctx, "commit", "changed", "committed:1")
	require.NoError(t, err)
	out, err := r.NerdctlRun(ctx, "--rm", "committed:1", "sh", "-c",
		"cat /nasty/1/owned; stat -c '%a %u:%g' /nasty/1/setuid /nasty/1/owned /nasty/0/setgid; ls /nasty/1/opaque; test -e /nasty/1/dir || echo gone; wc -c </data/1/3; stat -c %s /moved")
	require.NoError(t, err)
	require.Equal(t, "ownedmore\n700 0:0\n640 1234567:7654321\n2755 0:0\nmine\nold\ngone\n1250\n0", out)
	for _, args := range [][]string{{"rm", "changed"}, {"rmi", "-f", "committed:1"}} { // it shares layers with the others
		_, err = r.Nerdctl(ctx, args...)
		require.NoError(t, err)
	}

	for _, name := range []string{"above:1", "deep:1"} {
		require.NoError(t, r.Pull(ctx, name))
		require.NoError(t, r.Pull(ctx, name, "--snapshotter", "overlayfs"))
		want := look(t, mounted(t, r, "overlayfs", name))
		same(t, want, look(t, mounted(t, r, "nhybrid", name)))
		run(t, r, name, "sh", "-c", "cat /data/shared")
		awaitMigration(t, r, 0)
		excluded(t, r, name)
		same(t, want, look(t, mounted(t, r, "nhybrid", name)))
		_, err = r.Nhybridctl(ctx, "profile", "pin", r.Ref(name), "**")
		require.NoError(t, err)
		_, err = r.Nhybridctl(ctx, "migrate", "now", "--wait")
		require.NoError(t, err)
		same(t, want, look(t, mounted(t, r, "nhybrid", name)))
		_, err = r.Nhybridctl(ctx, "profile", "exclude", r.Ref(name), "**") // the next one shares layers
		require.NoError(t, err)
	}
}

// NVM is lost after files have moved: all images run from HDD alone, without the blobs of the content store.
func TestLossOfNVMAfterMigration(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{DaemonArgs: hot("--set", "placement.policy=boundary=2", "--set", "background.write_back=false")})
	k := knownImage(t, 40, 3<<20+5)
	k.push(t, r, "app:1")
	require.NoError(t, r.Pull(ctx, "app:1"))
	run(t, r, "app:1", "sh", "-c", "cat /app/0/d4/f14 /app/1/d4/f14 >/dev/null; dd if=/app/large0 bs=64k count=2 2>/dev/null | md5sum")
	awaitMigration(t, r, 1)
	c, err := r.Client()
	require.NoError(t, err)
	img, err := c.GetImage(r.Context(ctx), r.Ref("app:1"))
	require.NoError(t, err)
	manifest, err := imageLayers(r.Context(ctx), img)
	require.NoError(t, err)
	forgetBlobs(t, r, manifest...)
	require.NoError(t, r.Daemon.Stop())
	reboot(t, r)
	require.NoError(t, os.RemoveAll(r.NVM))
	require.NoError(t, os.Mkdir(r.NVM, 0o711))
	require.NoError(t, r.Daemon.Start(ctx))
	await(t, reachable(r))
	require.False(t, inLog(r, "has to be rebuilt"))
	k.check(t, r, "app:1")
	k.atHome(t, r, "app:1")
	// The profile was in the copy of the database, and what is hot comes up again.
	awaitMigration(t, r, 1)
	require.EqualValues(t, 2, profileOf(t, r, r.Ref("app:1")).Info.Starts)
	_, err = r.Nhybridctl(ctx, "migrate", "now", "--wait")
	require.NoError(t, err)
	require.Positive(t, hotFiles(t, r, "app:1")["app/0/d4/f14"].NVMBytes)
	removeImage(t, r, "app:1")
	awaitEmpty(t, r)
}
