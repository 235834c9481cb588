//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/integration/image"
	"github.com/nhybrid/nhybrid/integration/rig"
)

// A pod with a user namespace of its own, as the kubelet asks for it: its containers share the image's layers.
func TestPodWithUserNamespace(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{CRI: true})
	img, err := image.Tiny(image.TinySpec{
		Runnable: true, Nasty: true, Layers: []int64{half, half}, Config: v1.Config{Volumes: map[string]struct{}{"/volume": {}}},
	})
	require.NoError(t, err)
	img, err = mutate.Append(img, mutate.Addendum{MediaType: types.OCILayer, Layer: ofFiles(t,
		image.Entry{Header: tar.Header{Name: "volume/", Typeflag: tar.TypeDir, Mode: 0o755}}, plain("volume/root", []byte("r")),
		image.Entry{Header: tar.Header{Name: "volume/user", Mode: 0o600, Uid: 1000, Gid: 1001}, Data: []byte("u")})})
	require.NoError(t, err)
	require.NoError(t, r.Push(ctx, "app:1", img))
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
	// The content of a volume is copied out of the image with the image's owners, and the copy is mounted idmapped.
	out, err = r.Crictl(ctx, "exec", id, "sh", "-ec", "cd /volume; stat -c '%u:%g %a %n' . root user; cat root user; echo n >new; stat -c %u:%g new")
	require.NoError(t, err)
	require.Equal(t, "0:0 755 .\n0:0 644 root\n1000:1001 600 user\nru0:0", out)
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

// byRuntime matches what a runtime makes in a root filesystem to mount upon.
var byRuntime = regexp.MustCompile(`^(dev|proc|run|sys|etc)/`)

// entriesOf are the names in a layer, compressed or not, with their owners; without what the runtime has made.
func entriesOf(t *testing.T, layer io.Reader) map[string][2]int {
	t.Helper()
	plain, err := compression.DecompressStream(layer)
	require.NoError(t, err)
	defer plain.Close()
	all := map[string][2]int{}
	for in := tar.NewReader(plain); ; {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			return all
		}
		require.NoError(t, err)
		if !byRuntime.MatchString(h.Name) {
			all[h.Name] = [2]int{h.Uid, h.Gid}
		}
	}
}

// layersOf are the layers of an image as entriesOf tells them.
func layersOf(t *testing.T, r *rig.Rig, ref string) (all []map[string][2]int) {
	t.Helper()
	ctx := r.Context(soon(t))
	c, err := r.Client()
	require.NoError(t, err)
	img, err := c.GetImage(ctx, ref)
	require.NoError(t, err)
	m, err := images.Manifest(ctx, c.ContentStore(), img.Target(), img.Platform())
	require.NoError(t, err)
	for _, l := range m.Layers {
		ra, err := c.ContentStore().ReaderAt(ctx, l)
		require.NoError(t, err)
		all = append(all, entriesOf(t, content.NewReader(ra)))
		require.NoError(t, ra.Close())
	}
	return all
}

// What a container in a user namespace has changed is what it has changed, not every file for its owner. What it wrote itself
// has the owners of the host, as with overlayfs: containerd does not map them back.
func TestChangesInAUserNamespace(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r, device := regionRig(t)
	needNerdctl(t, r)
	_, err := r.PushBusybox(ctx, "app:1", ofFiles(t, plain("data/kept", []byte("k")), plain("data/gone", []byte("g")), plain("other/file", []byte("o"))))
	require.NoError(t, err)
	require.NoError(t, r.Pull(ctx, "app:1"))
	_, err = r.Ctr(ctx, "run", "-d", "--cgroup", "/"+r.Namespace+"-web", "--device", device("1m"),
		"--uidmap", "0:100000:65536", "--gidmap", "0:200000:65536", "--remap-labels", r.Ref("app:1"), "web", "sleep", "1000")
	require.NoError(t, err)
	execute(t, r, "web", "sh", "-ec", "mkdir /made; echo n >/made/new; rm /data/gone")
	mapped := [2]int{100000, 200000}
	changes := map[string][2]int{"data/": mapped, "data/.wh.gone": {0, 0}, "made/": mapped, "made/new": mapped}

	diff, err := r.Command(ctx, "ctr", "snapshots", "diff", "web")
	require.NoError(t, err)
	out, err := diff.Output()
	require.NoError(t, err)
	require.Equal(t, changes, entriesOf(t, strings.NewReader(string(out))))

	_, err = r.Nerdctl(ctx, "commit", "web", "nerdctl:1")
	require.NoError(t, err)
	_, err = r.Nhybridctl(ctx, "scm", "commit", "web", "scm:1")
	require.NoError(t, err)
	base := layersOf(t, r, r.Ref("app:1"))
	for _, name := range []string{"nerdctl:1", "scm:1"} {
		ref := name
		if name == "nerdctl:1" {
			ref = "docker.io/library/" + name
		}
		layers := layersOf(t, r, ref)
		require.Equal(t, append(slices.Clone(base), changes), layers[:len(base)+1], name)
		out, err := r.Ctr(ctx, "run", "--rm", ref, "again", "sh", "-c", "stat -c %u:%g /bin/busybox /other/file /data/kept; cat /made/new /data/kept; test -e /data/gone || echo gone")
		require.NoError(t, err)
		require.Equal(t, "0:0\n0:0\n0:0\nn\nkgone", out, name)
	}
	endSleeper(t, r, "web")
}
