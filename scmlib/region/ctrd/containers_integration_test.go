//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package ctrd

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/integration/image"
	"github.com/nhybrid/nhybrid/integration/rig"
	"github.com/nhybrid/nhybrid/scmlib/region"
	"github.com/nhybrid/nhybrid/scmlib/region/api"
	"github.com/nhybrid/nhybrid/scmlib/region/stream"
)

func (n *node) ctr(args ...string) string {
	n.t.Helper()
	out, err := n.Ctr(n.t.Context(), args...)
	require.NoError(n.t, err)
	return out
}

func (n *node) call(op string, args, result any) {
	n.t.Helper()
	_, err := api.Call(filepath.Join(n.Dir, "scm.sock"), op, args, result)
	require.NoError(n.t, err)
}

// A region is its container's: through stop and start, through a restart of the daemon, until it is removed, and nobody else's.
func TestCtr(t *testing.T) {
	t.Parallel()
	n := newNode(t, rig.Options{}, region.Options{Pool: map[int64]int{16 * mib: 1}})
	n.app("app:1")
	require.NoError(t, n.Pull(t.Context(), "app:1"))
	require.Equal(t, "1 16777216", n.ctr("run", "--device", n.device("16m"), n.Ref("app:1"), "one", "/app", "count"))
	require.Equal(t, "1 16777216", n.ctr("run", "--device", n.device("16m"), n.Ref("app:1"), "two", "/app", "count"))
	require.Equal(t, "2 16777216", n.ctr("task", "start", "one"))
	n.restart()
	require.Equal(t, "3 16777216", n.ctr("task", "start", "one"))
	require.Equal(t, "2 16777216", n.ctr("task", "start", "two"))

	// What it sees: its own file, no way to any other.
	out := n.ctr("run", "--rm", "--device", n.device("1m"), n.Ref("app:1"), "look", "sh", "-c", "ls -lnR /dev/scm; grep /dev/scm /proc/self/mountinfo; cat /dev/scm/../scm/meta; echo $SCM_REGION")
	require.Contains(t, out, "-rw-rw-rw-    1 0        0          1048576")
	require.Equal(t, 1, strings.Count(out, "/dev/scm/region rw,nosuid,nodev,noexec"))
	require.Contains(t, out, "container+"+n.Namespace+"+look/data")
	require.NotContains(t, out, "+one")
	require.True(t, strings.HasSuffix(out, "/dev/scm/region"), out)

	// One region a container; no such volume; no such size.
	for device, says := range map[string]string{
		"nothing": "unresolvable CDI devices", "image": "the image of container bad-image has no region",
	} {
		_, err := n.Ctr(t.Context(), "run", "--rm", "--device", n.device(device), n.Ref("app:1"), "bad-"+device, "true")
		require.ErrorContains(t, err, says)
	}
	_, err := n.Ctr(t.Context(), "run", "--rm", "--device", n.device("1m"), "--device", n.device("2m"), n.Ref("app:1"), "bad-two", "true")
	require.ErrorContains(t, err, "a container has one")

	n.regions(2)
	n.ctr("containers", "rm", "one")
	n.regions(1)
	n.stop() // and one that is removed while the daemon is away
	n.ctr("containers", "rm", "two")
	n.start()
	n.clean()
}

// Programs of any user, in a user namespace too, and with a read-only root, have the region.
func TestUsers(t *testing.T) {
	t.Parallel()
	n := newNode(t, rig.Options{}, region.Options{})
	n.app("app:1")
	require.NoError(t, n.Pull(t.Context(), "app:1"))
	run := func(args ...string) {
		t.Helper()
		require.Equal(t, "1 2097152", n.ctr(slices.Concat([]string{"run", "--rm", "--device", n.device("2m")}, args, []string{n.Ref("app:1"), "c", "/app", "count"})...))
	}
	run("--user", "1000:1000")
	run("--read-only")
	run("--uidmap", "0:100000:65536", "--gidmap", "0:200000:65536")
	run("--cgroup", "/"+n.Namespace+"-c")
	n.clean()
}

// Root in a container can do to its region's file what it likes: it stays a file of its size, and the next start finds it.
func TestHostile(t *testing.T) {
	t.Parallel()
	n := newNode(t, rig.Options{}, region.Options{})
	n.app("app:1")
	require.NoError(t, n.Pull(t.Context(), "app:1"))
	out := n.ctr("run", "--device", n.device("1m"), n.Ref("app:1"), "c", "sh", "-c", `
		dd if=/dev/zero of=/dev/scm/region bs=1M count=64 2>/dev/null
		i=0; while [ $(stat -c %s /dev/scm/region) != 1048576 ] && [ $i -lt 1000 ]; do i=$((i+1)); usleep 10000; done
		stat -c %s /dev/scm/region
		: >/dev/scm/region
		i=0; while [ $(stat -c %s /dev/scm/region) != 1048576 ] && [ $i -lt 1000 ]; do i=$((i+1)); usleep 10000; done
		stat -c %s /dev/scm/region
		rm -f /dev/scm/region 2>/dev/null || echo stays
		ln /dev/scm/region /dev/scm/link 2>/dev/null || echo no link
		chmod 000 /dev/scm/region; chown 7 /dev/scm/region
		umount /dev/scm/region 2>/dev/null || echo mounted
		tr '\000' x </dev/zero | head -c 1048576 >/dev/scm/region; echo over`)
	require.Equal(t, "1048576\n1048576\nstays\nno link\nmounted\nover", out)
	// All of it is x now, which no header is.
	var rep region.Report
	n.call(region.OpCheck, region.Args{Namespace: n.Namespace, Region: "container/c"}, &rep)
	require.Empty(t, rep.Problems)
	require.EqualValues(t, mib, rep.Used)
	n.call(region.OpKeep, region.Args{Namespace: n.Namespace, Region: "container/c", Keep: true}, nil)
	n.ctr("containers", "rm", "c")
	require.Eventually(t, func() bool { l := n.regions(1); return l[0].Kind == region.Volume }, time.Minute, 10*time.Millisecond)
	_, err := n.Ctr(t.Context(), "run", "--rm", "--device", n.device("c"), n.Ref("app:1"), "d", "/app", "show")
	require.Error(t, err) // scmlib refuses it
	b, err := n.store.Books()
	require.NoError(t, err)
	require.EqualValues(t, mib, b.Promised)
}

func TestVolumes(t *testing.T) {
	t.Parallel()
	n := newNode(t, rig.Options{}, region.Options{})
	n.app("app:1")
	require.NoError(t, n.Pull(t.Context(), "app:1"))
	var r region.Record
	n.call(region.OpCreate, region.Args{Namespace: n.Namespace, Region: "orders", Create: region.CreateOptions{Size: 4 * mib}}, &r)
	count := func() string {
		return n.ctr("run", "--rm", "--device", n.device("orders"), n.Ref("app:1"), "c", "/app", "count")
	}
	require.Equal(t, "1 4194304", count())
	require.Equal(t, "2 4194304", count())
	n.call(region.OpResize, region.Args{Namespace: n.Namespace, Region: "orders", Create: region.CreateOptions{Size: 8 * mib}}, &r)
	require.Equal(t, "3 8388608", count())

	// One container at a time.
	n.ctr("run", "-d", "--device", n.device("orders"), n.Ref("app:1"), "busy", "/app", "keep")
	_, err := n.Ctr(t.Context(), "run", "--rm", "--device", n.device("orders"), n.Ref("app:1"), "second", "/app", "count")
	require.ErrorContains(t, err, "container "+n.Namespace+"/busy uses it")

	// A snapshot of a container that writes all the time is one state that the region had.
	for i := range 5 {
		name := fmt.Sprintf("s%d", i)
		n.call(region.OpSnapshot, region.Args{Namespace: n.Namespace, Region: "orders", To: name}, &r)
		n.call(region.OpClone, region.Args{Namespace: n.Namespace, Region: "snapshot/" + name, To: "c" + name}, &r)
		out := n.ctr("run", "--rm", "--device", n.device("c"+name), n.Ref("app:1"), "show", "/app", "show")
		require.NotContains(t, out, "torn")
	}
	var rep region.Report
	n.call(region.OpCheck, region.Args{Namespace: n.Namespace, Region: "orders"}, &rep)
	require.Empty(t, rep.Problems)
	require.True(t, rep.ContainerOn)
	require.Contains(t, n.ctr("task", "ls"), "RUNNING", "it goes on")
	n.ctr("task", "kill", "-s", "KILL", "busy")
	n.ctr("task", "rm", "-f", "busy")
	n.ctr("containers", "rm", "busy")
	n.call(region.OpRemove, region.Args{Namespace: n.Namespace, Region: "orders"}, nil)
	_, err = n.Ctr(t.Context(), "run", "--rm", "--device", n.device("orders"), n.Ref("app:1"), "c", "/app", "count")
	require.ErrorContains(t, err, "unresolvable CDI devices")
}

// The record of a container can be deleted while its process runs. The region is in use as long as that runs, whether it is kept or not.
func TestRecordDeletedBeforeProcess(t *testing.T) {
	t.Parallel()
	n := newNode(t, rig.Options{}, region.Options{})
	n.app("app:1")
	require.NoError(t, n.Pull(t.Context(), "app:1"))
	deleteRecord := func(id string) {
		t.Helper()
		require.NoError(t, n.connect().ContainerService().Delete(namespaces.WithNamespace(t.Context(), n.Namespace), id))
	}
	find := func(kind region.Kind, name string) (r region.Record, ok bool) {
		r, err := n.store.Inspect(region.Ref{Kind: kind, Namespace: n.Namespace, Name: name})
		return r, err == nil
	}
	var pids []int
	for _, id := range []string{"kept", "goes"} {
		n.ctr("run", "-d", "--device", n.device("1m"), n.Ref("app:1"), id, "/app", "keep")
		r, ok := find(region.Container, id)
		require.True(t, ok)
		pids = append(pids, r.Users[0].Pid)
	}
	n.call(region.OpKeep, region.Args{Namespace: n.Namespace, Region: "container/kept", Keep: true}, nil)
	deleteRecord("goes")
	deleteRecord("kept") // its event comes after that of the other
	require.Eventually(t, func() bool { _, ok := find(region.Volume, "kept"); return ok }, time.Minute, 10*time.Millisecond)
	_, ok := find(region.Container, "goes")
	require.True(t, ok, "the process has its blocks")
	_, err := n.Ctr(t.Context(), "run", "--rm", "--device", n.device("kept"), n.Ref("app:1"), "second", "/app", "count")
	require.ErrorContains(t, err, "container "+n.Namespace+"/kept uses it")
	_, err = api.Call(filepath.Join(n.Dir, "scm.sock"), region.OpRemove, region.Args{Namespace: n.Namespace, Region: "kept"}, nil)
	require.ErrorContains(t, err, "uses it")

	for _, pid := range pids {
		require.NoError(t, unix.Kill(pid, unix.SIGKILL))
	}
	require.Eventually(t, func() bool { _, ok := find(region.Container, "goes"); return !ok }, time.Minute, 10*time.Millisecond)
	require.Eventually(t, func() bool { r, ok := find(region.Volume, "kept"); return ok && len(r.Users) == 0 }, time.Minute, 10*time.Millisecond)
	n.call(region.OpRemove, region.Args{Namespace: n.Namespace, Region: "kept"}, nil)
	n.clean()
}

// The paper's flow: commit a container, run the image, here and on another node: both start from exactly that state.
func TestCommit(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	a := newNode(t, rig.Options{}, region.Options{})
	b := newNode(t, rig.Options{}, region.Options{})
	a.app("app:1")
	require.NoError(t, a.Pull(ctx, "app:1"))
	a.ctr("run", "--device", a.device("16m"), a.Ref("app:1"), "c", "sh", "-c", "/app count; echo changed >>/file")
	a.ctr("task", "start", "c")
	ref := a.Registry.Addr() + "/app:committed"
	var done Committed
	a.call(OpCommit, CommitArgs{Namespace: a.Namespace, Container: "c", Ref: ref}, &done)
	require.EqualValues(t, 16*mib, done.Size)
	require.Less(t, done.Used, int64(mib))
	a.ctr("task", "start", "c") // what comes after does not matter

	want := "changed\nchanged\n3 16777216"
	run := func(n *node, device string) string {
		return n.ctr("run", "--device", n.device(device), ref, "new", "sh", "-c", "cat /file; /app count")
	}
	require.Equal(t, want, run(a, "image"))
	require.Equal(t, "changed\nchanged\n4 16777216", a.ctr("task", "start", "new"), "a restart does not begin again")
	a.ctr("images", "push", "--plain-http", ref)
	b.ctr("images", "pull", "--plain-http", ref)
	require.Equal(t, want, run(b, "16m"))
	b.ctr("containers", "rm", "new")
	require.Equal(t, "changed\nchanged\n3 33554432", run(b, "32m"), "a larger one, too")
	_, err := b.Ctr(ctx, "run", "--rm", "--device", b.device("8m"), ref, "small", "true")
	require.ErrorContains(t, err, "it has 16m, the container asks for 8m")
	// Without a region it is an image like any other.
	require.Equal(t, "changed\nchanged", b.ctr("run", "--rm", ref, "plain", "cat", "/file"))

	// Again, from what came of it, while it runs.
	b.ctr("containers", "rm", "new")
	b.ctr("run", "-d", "--device", b.device("image"), ref, "new", "/app", "keep")
	b.call(OpCommit, CommitArgs{Namespace: b.Namespace, Container: "new", Ref: ref + "2"}, &done)
	require.Positive(t, done.Stood)
	out := b.ctr("run", "--rm", "--device", b.device("image"), ref+"2", "again", "/app", "show")
	require.NotContains(t, out, "torn")
}

// A layer with a damaged region stops the container before anything runs, and leaves nothing.
func TestDamagedImage(t *testing.T) {
	t.Parallel()
	n := newNode(t, rig.Options{}, region.Options{})
	var b bytes.Buffer
	e, err := stream.NewEncoder(&b, stream.Header{Size: mib, Name: "x"})
	require.NoError(t, err)
	require.NoError(t, e.Write(8192, []byte("data")))
	_, err = e.Close()
	require.NoError(t, err)
	for i, spoil := range []func([]byte) []byte{
		func(b []byte) []byte { b[len(b)-60] ^= 1; return b },
		func(b []byte) []byte { b[len(b)-1] ^= 1; return b },
		func(b []byte) []byte { return b[:len(b)-40] },
		func([]byte) []byte { return nil },
		func([]byte) []byte { return make([]byte, 1<<20) },
	} {
		name := fmt.Sprintf("bad:%d", i)
		l, err := image.Layer([]image.Entry{
			{Header: tar.Header{Name: ".scm/", Typeflag: tar.TypeDir, Mode: 0o755}},
			{Header: tar.Header{Name: api.Image, Typeflag: tar.TypeReg, Mode: 0o644}, Data: spoil(bytes.Clone(b.Bytes()))},
		})
		require.NoError(t, err)
		n.app(name, l)
		require.NoError(t, n.Pull(t.Context(), name))
		out, err := n.Ctr(t.Context(), "run", "--rm", "--device", n.device("image"), n.Ref(name), fmt.Sprintf("c%d", i), "echo", "it ran")
		require.ErrorContains(t, err, "stream of a region is damaged")
		require.NotContains(t, out, "it ran")
	}
	// A link that leads out of the image leads into the container's own files.
	secret := filepath.Join(t.TempDir(), "secret")
	require.NoError(t, os.WriteFile(secret, b.Bytes(), 0o644))
	l, err := image.Layer([]image.Entry{
		{Header: tar.Header{Name: ".scm/", Typeflag: tar.TypeDir, Mode: 0o755}},
		{Header: tar.Header{Name: api.Image, Typeflag: tar.TypeSymlink, Linkname: secret}},
	})
	require.NoError(t, err)
	n.app("link:1", l)
	require.NoError(t, n.Pull(t.Context(), "link:1"))
	_, err = n.Ctr(t.Context(), "run", "--rm", "--device", n.device("image"), n.Ref("link:1"), "c", "true")
	require.ErrorContains(t, err, "has no region")
	n.clean()
}

// Many containers with regions come and go, and nothing is left. SCM_CONTAINERS says how many, 20 if it does not.
func TestManyContainers(t *testing.T) {
	t.Parallel()
	total, err := strconv.Atoi(os.Getenv("SCM_CONTAINERS"))
	if err != nil {
		total = 20
	}
	n := newNode(t, rig.Options{}, region.Options{Pool: map[int64]int{2 * mib: 4}})
	n.app("app:1")
	require.NoError(t, n.Pull(t.Context(), "app:1"))
	for batch := 0; batch < total; batch += 20 {
		var ids []string
		for i := batch; i < min(batch+20, total); i++ {
			id := fmt.Sprintf("c%d", i)
			require.Equal(t, "1 2097152", n.ctr("run", "--device", n.device("2m"), n.Ref("app:1"), id, "/app", "count"))
			ids = append(ids, id)
		}
		n.regions(len(ids))
		n.ctr(append([]string{"containers", "rm"}, ids...)...)
		n.regions(0)
	}
	n.clean()
	b, err := n.store.Books()
	require.NoError(t, err)
	require.Zero(t, b.Promised+b.Making)
}

// TestAttachCost measures, with SCM_MEASURE=1, what a region of 256 MiB costs the creation of a container: what containerd, shim and runtime do until its
// first program can start. With and without take turns, as the machine is never quiet.
func TestAttachCost(t *testing.T) {
	rounds := 3
	if os.Getenv("SCM_MEASURE") != "" {
		rounds = 60
	}
	const ready = 3
	n := newNode(t, rig.Options{}, region.Options{Pool: map[int64]int{256 * mib: ready}})
	n.app("app:1")
	require.NoError(t, n.Pull(t.Context(), "app:1"))
	ctx, c := n.Context(t.Context()), n.connect()
	img, err := c.GetImage(ctx, n.Ref("app:1"))
	require.NoError(t, err)
	require.NoError(t, img.Unpack(ctx, "overlayfs"))
	path, err := hook()
	require.NoError(t, err)
	withHook := func(_ context.Context, _ oci.Client, _ *containers.Container, s *specs.Spec) error { // as the device would
		s.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: path, Args: []string{"hook", "-socket", filepath.Join(n.Dir, "scm.sock"), "-size", fmt.Sprint(256 * mib)}}}}
		return nil
	}
	create := func(more ...oci.SpecOpts) time.Duration {
		opts := append([]oci.SpecOpts{oci.WithImageConfig(img), oci.WithProcessArgs("true")}, more...)
		container, err := c.NewContainer(ctx, "c", client.WithSnapshotter("overlayfs"), client.WithNewSnapshot("c", img), client.WithNewSpec(opts...))
		require.NoError(t, err)
		began := time.Now()
		task, err := container.NewTask(ctx, cio.NullIO)
		took := time.Since(began)
		require.NoError(t, err)
		_, err = task.Delete(ctx, client.WithProcessKill)
		require.NoError(t, err)
		require.NoError(t, container.Delete(ctx, client.WithSnapshotCleanup))
		n.regions(0)
		return took
	}
	nothing := func(_ context.Context, _ oci.Client, _ *containers.Container, s *specs.Spec) error { // what hooks cost as such
		s.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/bin/true", Args: []string{"true"}}}}
		return nil
	}
	var with, without, empty, extra, floor []time.Duration
	for i := range rounds {
		if i%ready == 0 {
			require.Eventually(t, func() bool { return n.store.Pooled(256*mib) == ready }, time.Minute, time.Millisecond)
		}
		var took [3]time.Duration
		for k := range took { // each is the first as often as the others
			switch which := (i/ready + k) % 3; which {
			case 0:
				took[which] = create(withHook)
			case 1:
				took[which] = create()
			case 2:
				took[which] = create(nothing)
			}
		}
		a, b, e := took[0], took[1], took[2]
		with, without, empty, extra, floor = append(with, a), append(without, b), append(empty, e), append(extra, a-b), append(floor, e-b)
	}
	for _, d := range [][]time.Duration{with, without, empty, extra, floor} {
		slices.Sort(d)
	}
	t.Logf("%d rounds: median %v with a region, %v with a hook that does nothing, %v without; of the differences %v and %v; fastest %v, %v, %v", rounds, with[rounds/2],
		empty[rounds/2], without[rounds/2], extra[rounds/2], floor[rounds/2], with[0], empty[0], without[0])
	n.clean()
}
