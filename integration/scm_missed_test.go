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
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/integration/rig"
)

// edit replaces text in a file of the rig's directory that must have it.
func edit(t *testing.T, r *rig.Rig, name, before, after string) {
	t.Helper()
	path := filepath.Join(r.Dir, name)
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Contains(t, string(b), before)
	require.NoError(t, os.WriteFile(path, []byte(strings.ReplaceAll(string(b), before, after)), 0o600))
}

var withRegion = map[string]string{"scm.nhybrid.io/size": "1m"}

// create makes a container of a pod and does not start it.
func create(ctx context.Context, r *rig.Rig, pod, podName, name, script string) (string, error) {
	container := filepath.Join(r.Dir, "create-"+podName+"-"+name+".json")
	b, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"name": name}, "image": map[string]any{"image": r.Ref("busybox:1")},
		"command": []string{"sh", "-c", script}, "log_path": name + ".log", "linux": map[string]any{},
	})
	if err := errors.Join(err, os.WriteFile(container, b, 0o600)); err != nil {
		return "", err
	}
	return r.Crictl(ctx, "create", "--no-pull", pod, container, filepath.Join(r.Dir, "pod-"+podName+".json"))
}

// What was created while the plugin was away is refused when it starts, and said if it runs.
func TestPodsThatMissedThePlugin(t *testing.T) {
	t.Parallel()
	r := newRig(t, rig.Options{CRI: true, DaemonConfig: "[scm]\nnri = false # yet\n"})
	_, err := r.PushBusybox(soon(t), "busybox:1")
	require.NoError(t, err)
	_, err = r.Crictl(soon(t), "pull", r.Ref("busybox:1"))
	require.NoError(t, err)
	pod, err := r.Pod(soon(t), "web", withRegion)
	require.NoError(t, err)
	runs, err := create(soon(t), r, pod, "web", "runs", "sleep 1000")
	require.NoError(t, err)
	_, err = r.Crictl(soon(t), "start", runs)
	require.NoError(t, err)
	waits, err := create(soon(t), r, pod, "web", "waits", "sleep 1000")
	require.NoError(t, err)
	plain, err := r.Pod(soon(t), "plain")
	require.NoError(t, err)
	other, err := create(soon(t), r, plain, "plain", "other", "sleep 1000")
	require.NoError(t, err)

	edit(t, r, "nhybrid.toml", "nri = false # yet", "nri = true")
	require.NoError(t, r.Daemon.Restart(soon(t)))
	awaitPlugin(t, r, 1)
	require.Contains(t, warnings(t, r), "containers run without the region that their pods ask for")
	require.Regexp(t, `gives them one: runs of pod default/web$`, warnings(t, r))
	_, err = r.Crictl(soon(t), "start", waits)
	require.ErrorContains(t, err, "was created without the region that its pod asks for")
	_, err = r.Crictl(soon(t), "start", other)
	require.NoError(t, err)
	again, err := create(soon(t), r, pod, "web", "again", "sleep 1000")
	require.NoError(t, err)
	_, err = r.Crictl(soon(t), "start", again)
	require.NoError(t, err)
	out, err := r.Crictl(soon(t), "exec", again, "stat", "-c", "%s", "/dev/scm/region")
	require.NoError(t, err)
	require.Equal(t, "1048576", out)

	_, err = r.Crictl(soon(t), "stop", runs)
	require.NoError(t, err)
	require.Empty(t, warnings(t, r))
	removePod(t, r, pod)
	removePod(t, r, plain)
}

// A daemon that stalls, or that has just died, costs a creation and no region; one that is away for longer is refused where the pod requires the plugin. CRI is on
// overlayfs, so that nothing else waits for the daemon.
func TestPodsOfADaemonThatDoesNotAnswer(t *testing.T) {
	t.Parallel()
	r := newRig(t, rig.Options{CRI: true, ContainerdConfig: "[plugins.'io.containerd.nri.v1.nri'.default_validator]\n  enable = true\n"})
	_, err := r.PushBusybox(soon(t), "busybox:1")
	require.NoError(t, err)
	awaitPlugin(t, r, 1)
	require.NoError(t, r.Containerd.Stop())
	edit(t, r, "containerd.toml", "\n  snapshotter = 'nhybrid'\n  [plugins.'io.containerd.cri.v1.images'", "\n  snapshotter = 'overlayfs'\n  [plugins.'io.containerd.cri.v1.images'")
	require.NoError(t, r.Containerd.Start(soon(t)))
	awaitPlugin(t, r, 2)
	_, err = r.Crictl(soon(t), "pull", r.Ref("busybox:1"))
	require.NoError(t, err)
	pod, err := r.Pod(soon(t), "web", withRegion)
	require.NoError(t, err)
	strict, err := r.Pod(soon(t), "strict", map[string]string{"scm.nhybrid.io/size": "1m", "required-plugins.noderesource.dev/pod": `["nhybrid-scm"]`})
	require.NoError(t, err)

	require.NoError(t, unix.Kill(r.Daemon.Pid(), unix.SIGSTOP))
	_, err = create(soon(t), r, pod, "web", "stalled", "true")
	stillRuns := unix.Kill(r.Daemon.Pid(), unix.SIGCONT)
	require.ErrorContains(t, err, "nhybrid-scm")
	require.NoError(t, stillRuns)
	awaitPlugin(t, r, 3)
	id, err := create(soon(t), r, pod, "web", "stalled", "sleep 1000") // its end would tell containerd of the next
	require.NoError(t, err)
	_, err = r.Crictl(soon(t), "start", id)
	require.NoError(t, err)

	require.NoError(t, r.Daemon.Kill())
	_, err = create(soon(t), r, pod, "web", "first", "true")
	require.ErrorContains(t, err, "nhybrid-scm", "the first one after its death")
	_, err = create(soon(t), r, strict, "strict", "second", "true")
	require.ErrorContains(t, err, "nhybrid-scm", "the pod requires it")
	require.NoError(t, r.Daemon.Start(soon(t)))
	awaitPlugin(t, r, 4)
	require.Empty(t, warnings(t, r))
	removePod(t, r, pod)
	removePod(t, r, strict)
}

// Pods are created while the daemon is killed and started again: whatever starts has its region.
func TestPodsWhileTheDaemonRestarts(t *testing.T) {
	t.Parallel()
	r := podRig(t)
	const n = 12
	pods := make([]string, n)
	for i := range pods {
		id, err := r.Pod(soon(t), fmt.Sprintf("p%d", i), withRegion)
		require.NoError(t, err)
		pods[i] = id
	}
	ctx := soon(t)
	started := make([]string, n)
	failed := make([]error, n)
	begun := make(chan struct{}, n)
	var work sync.WaitGroup
	for i := range pods {
		work.Go(func() { // as the kubelet: again until it runs
			for attempt := 0; ctx.Err() == nil; attempt++ {
				name := fmt.Sprintf("c%d", attempt)
				id, err := create(ctx, r, pods[i], fmt.Sprintf("p%d", i), name, "stat -c %s /dev/scm/region; sleep 1000")
				if attempt == 0 {
					begun <- struct{}{}
				}
				if err == nil {
					_, err = r.Crictl(ctx, "start", id)
				}
				if err == nil {
					started[i] = id
					return
				}
				failed[i] = err
			}
		})
	}
	<-begun
	require.NoError(t, r.Daemon.Kill())
	require.NoError(t, r.Daemon.Start(ctx))
	work.Wait()
	for i, id := range started {
		require.NotEmpty(t, id, "%v", failed[i])
		out, err := r.Crictl(soon(t), "exec", id, "stat", "-c", "%s", "/dev/scm/region")
		require.NoError(t, err, "container %d of %d", i, n)
		require.Equal(t, "1048576", out)
	}
	for _, id := range pods {
		removePod(t, r, id)
	}
	awaitBytes(t, r, 0)
}
