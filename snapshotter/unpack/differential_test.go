// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// scratch is a tmpfs: it keeps all times and xattrs as they are.
func scratch(t testing.TB) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounts and devices need root")
	}
	dir := t.TempDir()
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, ""))
	t.Cleanup(func() { must(t, unix.Unmount(dir, 0)) })
	return dir
}

// theirs applies a tar as containerd does for an overlayfs mount.
func theirs(t testing.TB, dir string, layer []byte) (map[string]attrs, error) {
	t.Helper()
	must(t, os.Mkdir(dir, 0o755))
	_, err := archive.Apply(t.Context(), dir, bytes.NewReader(layer), archive.WithConvertWhiteout(archive.OverlayConvertWhiteout))
	if err != nil {
		return nil, err
	}
	return ofDir(t, dir), nil
}

func inMemory(t testing.TB, _ string, layer []byte) (map[string]attrs, error) {
	t.Helper()
	m, _, p, err := unpackBytes(t.Context(), layer, Options{Layer: 3})
	if err != nil {
		return nil, err
	}
	return ofMeta(t, m, p.data), nil
}

// mounted writes the layer as a pack and reads it as the kernel shows it.
func mounted(t testing.TB, dir string, layer []byte) (map[string]attrs, error) {
	t.Helper()
	w, err := pack.Create(dir+".erofs", pack.WriterOptions{})
	must(t, err)
	defer func() { must(t, w.Abort()) }()
	m, res, err := Layer(t.Context(), io.NopCloser(bytes.NewReader(layer)), w, wantOf(layer, layer), Options{Layer: 3})
	if err != nil {
		return nil, err
	}
	_, err = w.Finish(m, pack.Identity{Layer: 3, DiffID: res.DiffID})
	must(t, err)
	must(t, os.Mkdir(dir, 0o700))
	must(t, unix.Mount(dir+".erofs", dir, "erofs", unix.MS_RDONLY, ""))
	defer func() { must(t, unix.Unmount(dir, 0)) }()
	return ofDir(t, dir), nil
}

func count(name string, n int) int {
	if s, err := strconv.Atoi(os.Getenv(name)); err == nil {
		return s
	}
	return n
}

// TestSameAsContainerd holds generated layers against containerd's applier.
// UNPACK_LAYERS is their number, UNPACK_SEED the first one.
func TestSameAsContainerd(t *testing.T) {
	log.L.Logger.SetOutput(io.Discard) // containerd warns of what it ignores
	end := count("UNPACK_SEED", 1) + count("UNPACK_LAYERS", 1000)
	for first := count("UNPACK_SEED", 1); first < end; first += 100 {
		t.Run(fmt.Sprint("from ", first), func(t *testing.T) {
			t.Parallel()
			upper, dir := scratch(t), t.TempDir()
			refused := 0
			for seed := first; seed < min(first+100, end) && !t.Failed(); seed++ {
				if !same(t, upper, dir, newGenerator(t, uint64(seed)).layer(), seed%10 == 0) {
					refused++
				}
				if t.Failed() {
					t.Logf("UNPACK_SEED=%d UNPACK_LAYERS=1", seed)
				}
			}
			if n := min(100, end-first); refused > n/2 && n > 10 {
				t.Errorf("%d of %d layers are refused by both", refused, n)
			}
		})
	}
}

// same reports whether containerd applies the layer, and fails if the result
// differs. With mount ours is what the kernel shows of the finished pack. upper is for theirs, dir for ours: EROFS takes no files of a tmpfs.
func same(t testing.TB, upper, dir string, layer []byte, mount bool) bool {
	t.Helper()
	now := time.Now().Unix()
	upper, dir = filepath.Join(upper, "upper"), filepath.Join(dir, "pack")
	defer os.RemoveAll(upper)
	want, theirErr := theirs(t, upper, layer)
	ours := inMemory
	if mount {
		ours = mounted
	}
	got, err := ours(t, dir, layer)
	os.Remove(dir)
	switch {
	case theirErr == nil && err != nil:
		t.Errorf("containerd applies it: %v", err)
	case theirErr != nil && err == nil:
		t.Errorf("containerd refuses it: %v", theirErr)
	case err != nil:
		if !errdefs.IsInvalidArgument(err) {
			t.Errorf("class of error: %v", err)
		}
	default:
		for _, d := range differ(got, want, now) {
			t.Error(d)
		}
	}
	return theirErr == nil
}
