//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/integration/image"
	"github.com/nhybrid/nhybrid/integration/rig"
)

// needNerdctl skips where the module proxy no longer serves nerdctl.
func needNerdctl(t *testing.T, r *rig.Rig) {
	t.Helper()
	if err := r.NerdctlUnobtainable(); errors.Is(err, rig.ErrNerdctlUnobtainable) {
		t.Skip(err)
	} else if err != nil {
		t.Fatal(err)
	}
}

// nerdctl pulls, runs, commits what a container has changed, runs that, and builds upon it again and again, as a build does.
func TestNerdctlCommitChain(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{DaemonArgs: lass})
	needNerdctl(t, r)
	_, err := r.PushTiny(ctx, "base:1", image.TinySpec{Runnable: true, Nasty: true, Layers: []int64{half, half}})
	require.NoError(t, err)
	said := func(out string, err error) string {
		t.Helper()
		require.NoError(t, err)
		return out
	}
	nerdctl := func(args ...string) { said(r.Nerdctl(ctx, args...)) }
	nerdctl("pull", "-q", r.Ref("base:1"))
	// Each step changes what the one before has made, in a way that is easily got wrong.
	steps := []string{
		`chmod 4711 /nasty/1/setuid; chown 7:8 /data/shared; echo a >/a; mkdir /made; echo m >/made/m`,
		`mv /made /moved; rm -r /nasty/1/dir; echo b >>/a; ln /a /a2; touch -d @1000 /nasty/1/empty`,
		`mv /nasty/1/opaque /nasty/1/renamed; rm /a; mkdir /a; echo in >/a/in; chmod 700 /moved/m; mknod /dev-null c 1 3`,
		`rm -r /nasty/1/renamed; mkdir -p /nasty/1/renamed; echo new >/nasty/1/renamed/new; mv /moved/m /m`,
	}
	from := r.Ref("base:1")
	for i, step := range steps {
		name := fmt.Sprintf("step:%d", i)
		said(r.NerdctlRun(ctx, "--name", fmt.Sprintf("c%d", i), from, "sh", "-ec", step))
		nerdctl("commit", fmt.Sprintf("c%d", i), name)
		nerdctl("rm", fmt.Sprintf("c%d", i))
		from = name
	}
	const ask = `stat -c '%a %n' /nasty/1/setuid; stat -c %u:%g /data/shared; cat /data/shared /a2 /a/in /m; ls /nasty/1/renamed /moved; stat -c %Y /nasty/1/empty; stat -c '%F %t %T' /dev-null; stat -c %a /m; test -e /made || test -e /nasty/1/dir || echo gone`
	const want = "4711 /nasty/1/setuid\n7:8\n1\na\nb\nin\nm\n/moved:\n\n/nasty/1/renamed:\nnew\n1000\ncharacter special file 1 3\n700\ngone"
	require.Equal(t, want, said(r.NerdctlRun(ctx, "--rm", from, "sh", "-c", ask)))
	// The steps below are still what they were.
	require.Equal(t, "a\nm", said(r.NerdctlRun(ctx, "--rm", "step:0", "cat", "/a", "/made/m")))

	for i := range steps {
		nerdctl("rmi", "-f", fmt.Sprintf("step:%d", i))
	}
	require.Equal(t, "1", said(r.NerdctlRun(ctx, "--rm", r.Ref("base:1"), "cat", "/data/shared")))
	nerdctl("rmi", "-f", r.Ref("base:1"))
	awaitEmpty(t, r)
}

func TestCRI(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{CRI: true})
	crictl := func(args ...string) string {
		t.Helper()
		out, err := r.Crictl(ctx, args...)
		require.NoError(t, err)
		return out
	}
	_, err := r.PushTiny(ctx, "app:1", image.TinySpec{Runnable: true, Layers: []int64{half, half, half}})
	require.NoError(t, err)
	crictl("pull", r.Ref("app:1"))
	require.Contains(t, crictl("images"), r.Ref("app"))

	pod, err := r.Pod(ctx, "pod")
	require.NoError(t, err)
	id, err := r.Container(ctx, pod, "pod", "app", r.Ref("app:1"), "sh", "-c", "echo written >/file; echo started; sleep 100000")
	require.NoError(t, err)
	await(t, func(context.Context) error {
		if logs := crictl("logs", id); logs != "started" {
			return fmt.Errorf("the container has written %q", logs)
		}
		return nil
	})
	require.Equal(t, "written\n2", crictl("exec", id, "cat", "/file", "/data/shared"))
	require.Contains(t, crictl("stats", "-a"), id[:13])

	out, err := r.Run(ctx, "nhybridctl", "-n", "k8s.io", "inspect", r.Ref("app:1"))
	require.NoError(t, err)
	require.Contains(t, out, "layers")
	out, err = r.Run(ctx, "nhybridctl", "-n", "k8s.io", "why", r.Ref("app:1"))
	require.NoError(t, err)
	require.Equal(t, 4, strings.Count(out, "Layer "), "%s", out)

	crictl("rmp", "-f", pod)
	crictl("rmi", r.Ref("app:1"))
	c, err := r.Client()
	require.NoError(t, err)
	images, err := c.ImageService().List(inNamespace(ctx, "k8s.io"))
	require.NoError(t, err)
	for _, i := range images { // the pinned image of sandboxes
		_, err := r.Run(ctx, "ctr", "-n", "k8s.io", "images", "rm", "--sync", i.Name)
		require.NoError(t, err)
	}
	awaitEmpty(t, r)
}

// In a container with a user namespace, the image belongs to the namespace's root, and nothing was copied for it.
func TestUserNamespace(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{DaemonArgs: lass})
	_, err := r.PushTiny(ctx, "nasty:1", image.TinySpec{Runnable: true, Nasty: true, Layers: []int64{half, half}})
	require.NoError(t, err)
	require.NoError(t, r.Pull(ctx, "nasty:1"))
	out, err := r.RunContainerWith(ctx, []string{"--uidmap", "0:100000:65536", "--gidmap", "0:200000:65536", "--remap-labels"}, "nasty:1", "mapped",
		"sh", "-ec", `cat /proc/self/uid_map | tr -s ' '; stat -c '%u:%g %a' / /data/shared /nasty/1/setgid; stat -c %u:%g /nasty/1/owned
		echo more >>/data/shared; cat /data/shared; stat -c %u:%g /data/shared; echo new >/new; stat -c %u:%g /new; mv /nasty/1/dir /nasty/1/dir2; cat /nasty/1/dir2/inside`)
	require.NoError(t, err)
	require.Equal(t, " 0 100000 65536\n0:0 755\n0:0 644\n0:0 2755\n65534:65534\n1\nmore\n0:0\n0:0\ninside", out)

	// Seen from the host: what it wrote belongs to the mapped root.
	mounts := prepare(t, r, "peek", topOf(t, r, "nasty:1"), map[string]string{
		"containerd.io/snapshot/uidmapping": "0:100000:65536", "containerd.io/snapshot/gidmapping": "0:200000:65536",
	})
	dir := mountedAt(t, mounts)
	for _, name := range []string{"", "data/shared", "nasty/0/hardlink"} {
		var st unix.Stat_t
		require.NoError(t, unix.Lstat(filepath.Join(dir, name), &st))
		require.EqualValues(t, 100000, st.Uid, "%q", name)
		require.EqualValues(t, 200000, st.Gid, "%q", name)
	}
	// Others see it unmapped, as before.
	require.EqualValues(t, 0, look(t, mounted(t, r, "nhybrid", "nasty:1"))["data/shared"].UID)

	removeImage(t, r, "nasty:1")
	require.NoError(t, service(t, r, "nhybrid").Remove(r.Context(ctx), "peek"))
}

// containerd looks users and groups up in the image before the container runs.
func TestUserByName(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{DaemonArgs: lass})
	users, err := image.Layer([]image.Entry{
		{Header: tar.Header{Name: "etc/passwd", Mode: 0o644}, Data: []byte("root:x:0:0::/:/bin/sh\nsomebody:x:1234:5678::/:/bin/sh\n")},
		{Header: tar.Header{Name: "etc/group", Mode: 0o644}, Data: []byte("root:x:0:\nmany:x:99:somebody\nmain:x:5678:\n")},
	})
	require.NoError(t, err)
	_, err = r.PushBusybox(ctx, "users:1", users)
	require.NoError(t, err)
	require.NoError(t, r.Pull(ctx, "users:1"))
	for _, flags := range [][]string{{"--user", "somebody"}, {"--user", "somebody", "--read-only"}} {
		out, err := r.RunContainerWith(ctx, flags, "users:1", "c", "id")
		require.NoError(t, err, "%q", flags)
		require.Contains(t, out, "uid=1234(somebody) gid=5678(main)", "%q", flags)
		require.Contains(t, out, "99(many)", "%q", flags)
	}
}

// A container may mount an overlay of its own, as builders and nested container engines do.
func TestNestedOverlay(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{DaemonArgs: lass})
	_, err := r.PushTiny(ctx, "app:1", image.TinySpec{Runnable: true, Layers: []int64{half, half}})
	require.NoError(t, err)
	require.NoError(t, r.Pull(ctx, "app:1"))
	out, err := r.RunContainerWith(ctx, []string{"--privileged"}, "app:1", "nested", "sh", "-ec", `
		mkdir /scratch; mount -t tmpfs none /scratch; mkdir /scratch/upper /scratch/work /scratch/merged
		mount -t overlay -o lowerdir=/data,upperdir=/scratch/upper,workdir=/scratch/work none /scratch/merged
		cat /scratch/merged/shared; echo changed >/scratch/merged/shared; cat /scratch/merged/shared /data/shared; wc -c </scratch/merged/0/7`)
	require.NoError(t, err)
	require.Equal(t, fmt.Sprintf("1\nchanged\n1\n%d", half/8), strings.ReplaceAll(out, "\r", ""))
}
