//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/integration/image"
	"github.com/nhybrid/nhybrid/integration/rig"
)

// A pod with a user namespace of its own, as the kubelet asks for it: its containers share the image's layers.
func TestPodWithUserNamespace(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{CRI: true})
	_, err := r.PushTiny(ctx, "app:1", image.TinySpec{Runnable: true, Nasty: true, Layers: []int64{half, half}})
	require.NoError(t, err)
	_, err = r.Crictl(ctx, "pull", r.Ref("app:1"))
	require.NoError(t, err)
	before := len(listed(t, r))
	// A user namespace needs a network namespace of its own.
	require.NoError(t, os.MkdirAll(filepath.Join(r.Dir, "cni"), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(r.Dir, "cni", "net.conflist"), []byte(`{"cniVersion": "1.0.0", "name": "lonely", "plugins": [
		{"type": "ptp", "ipam": {"type": "host-local", "dataDir": "`+r.Dir+`/ipam", "ranges": [[{"subnet": "10.255.77.0/24"}]]}}]}`), 0o600))
	write := func(name string, v any) string {
		b, err := json.Marshal(v)
		require.NoError(t, err)
		path := filepath.Join(r.Dir, name)
		require.NoError(t, os.WriteFile(path, b, 0o600))
		return path
	}
	const inPod = 0 // runtime.v1.NamespaceMode POD
	ids := func(host int) []any {
		return []any{map[string]any{"host_id": host, "container_id": 0, "length": 65536}}
	}
	security := map[string]any{"namespace_options": map[string]any{
		"network": inPod, "userns_options": map[string]any{"mode": inPod, "uids": ids(300000), "gids": ids(300000)},
	}}
	sandbox := write("userpod.json", map[string]any{
		"metadata":      map[string]any{"name": "user", "namespace": "default", "uid": "user", "attempt": 0},
		"log_directory": filepath.Join(r.Dir, "log", "pods"), "linux": map[string]any{"security_context": security},
	})
	var pod string
	await(t, func(ctx context.Context) (err error) { // the network configuration has to be noticed
		pod, err = r.Crictl(ctx, "runp", sandbox)
		return err
	})
	t.Cleanup(func() { _, _ = r.Crictl(context.Background(), "rmp", "-f", pod) })
	container := write("usercontainer.json", map[string]any{
		"metadata": map[string]any{"name": "c"}, "image": map[string]any{"image": r.Ref("app:1")},
		"command": []string{"sleep", "100000"}, "linux": map[string]any{"security_context": security},
	})
	id, err := r.Crictl(ctx, "create", "--no-pull", pod, container, sandbox)
	require.NoError(t, err)
	_, err = r.Crictl(ctx, "start", id)
	require.NoError(t, err)
	out, err := r.Crictl(ctx, "exec", id, "sh", "-ec",
		"tr -s ' ' </proc/self/uid_map; stat -c '%u:%g %a' /data/shared /nasty/0/setgid; echo more >>/data/shared; cat /data/shared; stat -c %u:%g /data/shared")
	require.NoError(t, err)
	require.Equal(t, " 0 300000 65536\n0:0 644\n0:0 2755\n1\nmore\n0:0", out)
	require.Len(t, listed(t, r), before+2, "a writable snapshot each for sandbox and container, and no copy of a layer")
	_, err = r.Crictl(ctx, "rmp", "-f", pod)
	require.NoError(t, err)
}

// listed are the ids of all snapshots.
func listed(t *testing.T, r *rig.Rig) (ids []string) {
	t.Helper()
	out, err := r.Run(soon(t), "nhybridctl", "-n", "k8s.io", "ls", "--json")
	require.NoError(t, err)
	var list []struct{ ID string }
	require.NoError(t, json.Unmarshal([]byte(out), &list), "%s", out)
	for _, s := range list {
		ids = append(ids, s.ID)
	}
	return ids
}
