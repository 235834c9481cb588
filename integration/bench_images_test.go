//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/integration/bench/deploy"
	"github.com/nhybrid/nhybrid/integration/image"
	"github.com/nhybrid/nhybrid/integration/image/catalog"
	"github.com/nhybrid/nhybrid/integration/rig"
)

// benchImages are the images of the benchmarks by name, and how to make them: those of NHYBRID_BENCH_IMAGES, a comma separated
// list of "deploy" (all of make bench-deploy), "hif" (all of make bench-hif) and names; else small generated ones.
func benchImages(t *testing.T) (names []string, build map[string]func() (v1.Image, error)) {
	t.Helper()
	build = map[string]func() (v1.Image, error){}
	wanted := os.Getenv("NHYBRID_BENCH_IMAGES")
	if wanted == "" {
		for i, spec := range []image.TinySpec{
			{Seed: 1, Runnable: true, Nasty: true, Layers: []int64{3 << 20, 1 << 20, 1000}, Files: 200},
			{Seed: 2, Runnable: true, Nasty: true, Layers: []int64{1000, 1 << 20, 3 << 20, 1 << 20}, Files: 50},
			{Seed: 3, Runnable: true, Nasty: true, Layers: []int64{1 << 20, 6 << 20}, Files: 1000},
		} {
			name := fmt.Sprintf("generated-%d", i)
			names = append(names, name)
			build[name] = func() (v1.Image, error) { return image.Tiny(spec) }
		}
		return names, build
	}
	builder, err := image.NewBuilder("")
	require.NoError(t, err)
	builder.Log = func(format string, args ...any) { fmt.Printf(format+"\n", args...) }
	sets := map[string][]string{}
	add := func(set string, spec image.Spec) {
		build[spec.Name] = func() (v1.Image, error) { return builder.Build(t.Context(), spec) }
		sets[set] = append(sets[set], spec.Name)
	}
	for _, s := range deploy.Images() {
		add("deploy", s)
	}
	all, err := catalog.All()
	require.NoError(t, err)
	for _, i := range all {
		add("hif", i.Spec)
	}
	for _, w := range strings.Split(wanted, ",") {
		if set := sets[w]; set != nil {
			names = append(names, set...)
			continue
		}
		require.Contains(t, build, w, "NHYBRID_BENCH_IMAGES: no such image or set")
		names = append(names, w)
	}
	return names, build
}

// An image of the benchmarks that nhybrid has unpacked while it downloaded shows the same tree as what containerd's own applier
// makes of the same blobs on overlayfs, byte for byte and attribute for attribute.
func TestBenchmarkImagesLookTheSame(t *testing.T) {
	t.Parallel()
	names, build := benchImages(t)
	r := newRig(t, rig.Options{NVMSize: 2 << 30, DaemonArgs: append([]string{"--set", "placement.policy=drain"}, calm...)})
	files, differences := 0, 0
	for _, name := range names {
		ref := strings.ReplaceAll(name, ":", "-") + ":1"
		t.Run(name, func(t *testing.T) {
			img, err := build[name]()
			require.NoError(t, err)
			require.NoError(t, r.Push(t.Context(), ref, img))
			require.NoError(t, r.Pull(t.Context(), ref))
			require.NoError(t, r.Pull(t.Context(), ref, "--snapshotter", "overlayfs"))
			want := look(t, mounted(t, r, "overlayfs", ref))
			got := look(t, mounted(t, r, "nhybrid", ref))
			found := differ(want, got)
			files, differences = files+len(want), differences+len(found)
			fmt.Printf("%s: %d files, %d differences\n", name, len(want), len(found))
			require.Empty(t, found)
		})
		removeImage(t, r, ref)
		blobs, err := filepath.Glob(filepath.Join(r.Dir, "registry", "sha256", "*"))
		require.NoError(t, err)
		for _, b := range blobs { // the builder keeps them
			require.NoError(t, os.Remove(b))
		}
	}
	fmt.Printf("%d images, %d files, %d differences\n", len(names), files, differences)
}

// differ lists how two trees differ. Of a directory into which containerd's applier has written later, only nhybrid has the time
// that the layer says.
func differ(want, got map[string]file) (found []string) {
	for name, w := range want {
		g, ok := got[name]
		if w.Mode&unix.S_IFMT == unix.S_IFDIR && w.Sec == 0 {
			g.Sec, g.Nsec = 0, 0
		}
		switch {
		case !ok:
			found = append(found, fmt.Sprintf("%q is missing", name))
		case w != g:
			found = append(found, fmt.Sprintf("%q is %+v and should be %+v", name, g, w))
		}
	}
	for name := range got {
		if _, ok := want[name]; !ok {
			found = append(found, fmt.Sprintf("%q should not be there", name))
		}
	}
	slices.Sort(found)
	return found
}
