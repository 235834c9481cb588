//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package ctrd

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/integration/rig"
	"github.com/nhybrid/nhybrid/scmlib/region"
)

func TestNerdctl(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	n := newNode(t, rig.Options{}, region.Options{})
	if err := n.NerdctlUnobtainable(); err != nil {
		t.Skip(err)
	}
	n.app("app:1")
	said := func(out string, err error) string {
		t.Helper()
		require.NoError(t, err)
		return out
	}
	nerdctl := func(args ...string) string { return said(n.Nerdctl(ctx, args...)) }
	// What it prints may be lost when it ends at once. That it counts is seen in the end.
	again := func() { nerdctl("start", "-a", "app") }
	nerdctl("pull", "-q", n.Ref("app:1"))
	require.Equal(t, "1 2097152", said(n.NerdctlRun(ctx, "--name", "app", "--device", n.device("2m"), n.Ref("app:1"), "/app", "count")))
	again()
	// nerdctl's own commit knows nothing of regions, and does nothing to them.
	nerdctl("commit", "app", "plain:1")
	require.Equal(t, "1 2097152", said(n.NerdctlRun(ctx, "--rm", "--device", n.device("2m"), "plain:1", "/app", "count")))
	again()
	_, _ = n.Nerdctl(ctx, "export", "-o", filepath.Join(t.TempDir(), "c.tar"), "app") // not in every version
	again()
	// By its name here, which is not its id.
	var done Committed
	n.call(OpCommit, CommitArgs{Namespace: n.Namespace, Container: "app", Ref: "docker.io/library/with:1"}, &done)
	require.Equal(t, "5 2097152", said(n.NerdctlRun(ctx, "--rm", "--device", n.device("image"), "with:1", "/app", "count")))
	nerdctl("rm", "app")
	n.clean()
}

func TestCRI(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	n := newNode(t, rig.Options{CRI: true}, region.Options{})
	n.app("app:1")
	crictl := func(args ...string) string {
		t.Helper()
		out, err := n.Crictl(ctx, args...)
		require.NoError(t, err)
		return out
	}
	crictl("pull", n.Ref("app:1"))
	pod, err := n.Pod(ctx, "pod")
	require.NoError(t, err)
	for name, extra := range map[string]map[string]any{
		"device":     {"CDI_devices": []map[string]string{{"name": n.device("2m")}}},
		"annotation": {"annotations": map[string]string{"cdi.k8s.io/scm": n.device("2m")}},
	} {
		config := map[string]any{
			"metadata": map[string]any{"name": name}, "image": map[string]any{"image": n.Ref("app:1")}, "command": []string{"/app", "wait"},
			"log_path": name + ".log", "linux": map[string]any{},
		}
		for k, v := range extra {
			config[k] = v
		}
		b, err := json.Marshal(config)
		require.NoError(t, err)
		path := filepath.Join(n.Dir, name+".json")
		require.NoError(t, os.WriteFile(path, b, 0o600))
		id := crictl("create", "--no-pull", pod, path, filepath.Join(n.Dir, "pod-pod.json"))
		crictl("start", id)
		require.Eventually(t, func() bool { out, _ := n.Crictl(ctx, "logs", id); return out == "1 2097152" }, time.Minute, 50*time.Millisecond, "%s", name)
		require.Equal(t, "/dev/scm/region", crictl("exec", id, "ls", "/dev/scm/region"))
	}
	n.regions(2)
	crictl("rmp", "-f", pod)
	n.clean()
}
