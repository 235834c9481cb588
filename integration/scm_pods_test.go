//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/integration/rig"
)

// podRig is a rig whose pods ask for regions by annotations.
func podRig(t *testing.T, more ...string) *rig.Rig {
	t.Helper()
	r := newRig(t, rig.Options{CRI: true, DaemonArgs: more})
	_, err := r.PushBusybox(soon(t), "busybox:1")
	require.NoError(t, err)
	_, err = r.Crictl(soon(t), "pull", r.Ref("busybox:1"))
	require.NoError(t, err)
	awaitPlugin(t, r, 1)
	return r
}

// awaitPlugin waits until containerd has taken the daemon's plugin so many times.
func awaitPlugin(t *testing.T, r *rig.Rig, times int) {
	t.Helper()
	await(t, func(context.Context) error {
		if n := strings.Count(r.Daemon.Log(), "annotations of pods ask for regions"); n < times {
			return fmt.Errorf("containerd has taken the plugin %d times", n)
		}
		return nil
	})
}

// inPod runs a command in a container of a pod with the annotations, and returns the pod and what it wrote.
func inPod(t *testing.T, r *rig.Rig, pod string, annotations map[string]string, container, script string) (id, out string, err error) {
	t.Helper()
	id, err = r.Pod(soon(t), pod, annotations)
	require.NoError(t, err)
	out, err = r.PodRun(soon(t), id, pod, container, r.Ref("busybox:1"), "sh", "-c", script)
	return id, out, err
}

// awaitBytes waits until all regions, of all namespaces, have so many.
func awaitBytes(t *testing.T, r *rig.Rig, n int64) {
	t.Helper()
	await(t, func(ctx context.Context) error {
		var books struct{ Promised int64 }
		out, err := r.Nhybridctl(ctx, "scm", "df", "--json")
		if err == nil {
			err = json.Unmarshal([]byte(out), &books)
		}
		if err == nil && books.Promised != n {
			err = fmt.Errorf("regions have %d bytes", books.Promised)
		}
		return err
	})
}

func removePod(t *testing.T, r *rig.Rig, id string) {
	t.Helper()
	_, err := r.Crictl(soon(t), "rmp", "-f", id)
	require.NoError(t, err)
}

// What the annotations of a pod ask for is there before anything of its containers runs; what they cannot have stops them with the reason.
func TestPodsWithRegions(t *testing.T) {
	t.Parallel()
	r := podRig(t, "--set", "scm.quotas=default.k8s.io=8MiB")
	const look = `echo $SCM_REGION; stat -c %s /dev/scm/region; tr -d '\0' </dev/scm/region; printf mark | dd of=/dev/scm/region conv=notrunc 2>/dev/null`

	// Every container of the pod has one of its own; the one that is named has what is said of it.
	pod, out, err := inPod(t, r, "sizes", map[string]string{"scm.nhybrid.io/size": "1m", "size.scm.nhybrid.io/container.large": "3m", "other.example/size": "5"}, "small", look)
	require.NoError(t, err)
	require.Equal(t, "/dev/scm/region\n1048576", out)
	out, err = r.PodRun(soon(t), pod, "sizes", "large", r.Ref("busybox:1"), "sh", "-c", look)
	require.NoError(t, err)
	require.Equal(t, "/dev/scm/region\n3145728", out)
	var books struct {
		Accounts map[string]struct {
			Bytes int64
			Quota struct{ Bytes int64 }
		}
	}
	ctl(t, r, &books, "scm", "df")
	require.EqualValues(t, 4<<20, books.Accounts["default.k8s.io"].Bytes, "they count for the pod's namespace")
	require.EqualValues(t, 8<<20, books.Accounts["default.k8s.io"].Quota.Bytes)
	require.NotContains(t, books.Accounts, "k8s.io")

	// Nothing is asked for, nothing is there.
	plain, out, err := inPod(t, r, "plain", map[string]string{"size.scm.nhybrid.io/container.other": "1m"}, "web", `ls /dev/scm 2>&1; echo "[$SCM_REGION]"`)
	require.NoError(t, err)
	require.Equal(t, "ls: /dev/scm: No such file or directory\n[]", out)
	removePod(t, r, plain)

	// A volume is of the pod's namespace: one of the same name elsewhere is another's.
	_, err = r.Nhybridctl(soon(t), "scm", "create", "-n", "other.k8s.io", "orders", "--size", "1m")
	require.NoError(t, err)
	orders := map[string]string{"scm.nhybrid.io/volume": "orders"}
	id, _, err := inPod(t, r, "orders", orders, "job", look)
	require.ErrorContains(t, err, "make it by nhybridctl scm create -n default.k8s.io orders")
	removePod(t, r, id)
	_, err = r.Nhybridctl(soon(t), "scm", "create", "-n", "default.k8s.io", "orders", "--size", "2m")
	require.NoError(t, err)
	for i, want := range []string{"/dev/scm/region\n2097152", "/dev/scm/region\n2097152\nmark"} {
		id, out, err = inPod(t, r, fmt.Sprintf("orders%d", i), orders, "job", look)
		require.NoError(t, err)
		require.Equal(t, want, out)
		removePod(t, r, id)
	}

	// Whatever makes no sense, or is too much, is said where the pod is looked at.
	for i, bad := range []struct {
		annotations map[string]string
		says        string
	}{
		{map[string]string{"scm.nhybrid.io/size": "much"}, `annotation "scm.nhybrid.io/size": size "much"`},
		{map[string]string{"scm.nhybrid.io/sise": "1m"}, `annotation "scm.nhybrid.io/sise": known are`},
		{map[string]string{"scm.nhybrid.io/size": "1m", "scm.nhybrid.io/volume": "orders"}, "a container has one region"},
		{map[string]string{"scm.nhybrid.io/size": "4m"}, `namespace "default.k8s.io" has 6m in regions and asks for 4m more, its quota is 8m`},
		{map[string]string{"scm.nhybrid.io/image": "true"}, "has no region at /.scm/region.scmimg"},
	} {
		id, out, err := inPod(t, r, fmt.Sprintf("bad%d", i), bad.annotations, "bad", "echo it ran")
		require.Error(t, err)
		require.Contains(t, strings.ReplaceAll(err.Error(), `\`, ""), bad.says) // crictl quotes what it was told, twice
		require.NotContains(t, out, "it ran")
		removePod(t, r, id)
	}
	removePod(t, r, pod)
	awaitBytes(t, r, 3<<20) // the volumes
	require.Empty(t, warnings(t, r))
}

// Whoever of containerd and the daemon is restarted, the plugin is there again.
func TestPodsAfterRestarts(t *testing.T) {
	t.Parallel()
	r := podRig(t)
	ask := func(name string) {
		t.Helper()
		id, out, err := inPod(t, r, name, map[string]string{"scm.nhybrid.io/size": "1m"}, "web", "stat -c %s $SCM_REGION")
		require.NoError(t, err)
		require.Equal(t, "1048576", out)
		removePod(t, r, id)
	}
	ask("first")
	require.NoError(t, r.Containerd.Restart(soon(t)))
	awaitPlugin(t, r, 2)
	ask("second")
	require.NoError(t, r.Containerd.Kill())
	require.NoError(t, r.Containerd.Start(soon(t)))
	awaitPlugin(t, r, 3)
	ask("third")
	require.NoError(t, r.Daemon.Restart(soon(t)))
	awaitPlugin(t, r, 4)
	await(t, reachable(r)) // for containerd, by its own connection to the snapshotter
	ask("fourth")
	awaitBytes(t, r, 0)
	require.Empty(t, warnings(t, r))
}

// A containerd that requires the plugin starts no container without it, rather than one without its region.
func TestPodsRequirePlugin(t *testing.T) {
	t.Parallel()
	r := newRig(t, rig.Options{CRI: true, DaemonArgs: []string{"--set", "scm.nri=false"},
		ContainerdConfig: "[plugins.'io.containerd.nri.v1.nri'.default_validator]\n  enable = true\n"})
	_, err := r.PushBusybox(soon(t), "busybox:1")
	require.NoError(t, err)
	_, err = r.Crictl(soon(t), "pull", r.Ref("busybox:1"))
	require.NoError(t, err)
	id, out, err := inPod(t, r, "needs", map[string]string{"scm.nhybrid.io/size": "1m", "required-plugins.noderesource.dev/pod": `["nhybrid-scm"]`}, "web", "echo it ran")
	require.ErrorContains(t, err, "nhybrid-scm")
	require.NotContains(t, out, "it ran")
	removePod(t, r, id)
	require.NotContains(t, r.Daemon.Log(), "annotations of pods ask")
}
