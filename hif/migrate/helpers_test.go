// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package migrate

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/hif/plan"
	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/placement/tier"
)

// host is a Host with files for records, so that they outlive a process.
type host struct {
	tiers *tier.Store
	dir   string

	mu      sync.Mutex
	busy    string
	fail    map[string]error
	settled map[string]int64
}

func (h *host) Busy() (string, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.busy, h.busy != ""
}

func (h *host) set(busy string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.busy = busy
}

func (h *host) failure(id string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.fail[id]
}

func (h *host) BringHome(ctx context.Context, id string, pace func(int) error) error {
	if err := h.failure(id); err != nil {
		return err
	}
	if h.home(id) {
		return nil
	}
	if _, err := h.tiers.WriteBack(ctx, id, pace); err != nil {
		return err
	}
	if err := h.tiers.Sync(placement.HDD); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(h.dir, "home-"+id), nil, 0o600)
}

func (h *host) home(id string) bool {
	_, err := os.Stat(filepath.Join(h.dir, "home-"+id))
	return err == nil
}

func (h *host) Settled(_ context.Context, id string, n int64) error {
	if _, err := os.Stat(filepath.Join(h.dir, "gone-"+id)); err == nil {
		return fmt.Errorf("layer %s: %w", id, errdefs.ErrNotFound)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.settled[id] = n
	return nil
}

// rig is a store with layers that a container uses.
type rig struct {
	t     *testing.T
	dir   string
	tiers *tier.Store
	host  *host
	files map[string][]byte // content by redirect
}

func openRig(t *testing.T, dir, nvm string) *rig {
	t.Helper()
	s, err := tier.Open(filepath.Join(dir, "hdd"), nvm, filepath.Join(dir, "state"))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	return &rig{t: t, dir: dir, tiers: s, files: map[string][]byte{}, host: &host{tiers: s, dir: dir, fail: map[string]error{}, settled: map[string]int64{}}}
}

func newRig(t *testing.T) *rig {
	t.Helper()
	dir := t.TempDir()
	return openRig(t, dir, filepath.Join(dir, "nvm"))
}

func (r *rig) engine(c Config) *Engine {
	r.t.Helper()
	e, err := New(c, r.tiers, r.host)
	require.NoError(r.t, err)
	r.t.Cleanup(func() { _ = e.Close() })
	return e
}

// file puts one into a layer.
func (r *rig) file(on placement.Tier, redirect string, size int) {
	r.t.Helper()
	b := make([]byte, size)
	seed := rand.NewChaCha8([32]byte([]byte(fmt.Sprintf("%-32.32s", redirect))))
	_, _ = seed.Read(b)
	r.put(on, redirect, b)
}

func (r *rig) put(on placement.Tier, redirect string, b []byte) {
	r.t.Helper()
	f := filepath.Join(r.tiers.DataRoot(on), redirect)
	require.NoError(r.t, os.MkdirAll(filepath.Dir(f), 0o755))
	require.NoError(r.t, os.WriteFile(f, b, 0o755))
	r.files[redirect] = b
}

// mount shows the files as a container sees them, and returns the path of each.
func (r *rig) mount() func(redirect string) string {
	r.t.Helper()
	if os.Geteuid() != 0 {
		r.t.Skip("mounting needs root")
	}
	tree, root := r.t.TempDir(), r.t.TempDir()
	name := func(redirect string) string { return strings.ReplaceAll(redirect[1:], "/", "_") }
	for redirect, b := range r.files {
		f := filepath.Join(tree, name(redirect))
		require.NoError(r.t, os.WriteFile(f, nil, 0o755))
		require.NoError(r.t, os.Truncate(f, int64(len(b))))
		require.NoError(r.t, unix.Setxattr(f, "trusted.overlay.metacopy", nil, 0))
		require.NoError(r.t, unix.Setxattr(f, "trusted.overlay.redirect", []byte(redirect), 0))
	}
	options := "metacopy=on,lowerdir=" + strings.Join([]string{tree, r.tiers.DataRoot(placement.NVM), r.tiers.DataRoot(placement.HDD)}, "::")
	require.NoError(r.t, unix.Mount("overlay", root, "overlay", unix.MS_RDONLY, options))
	r.t.Cleanup(func() { _ = unix.Unmount(root, unix.MNT_DETACH) })
	return func(redirect string) string { return filepath.Join(root, name(redirect)) }
}

// whole reads every file through a new container.
func (r *rig) whole() {
	r.t.Helper()
	path := r.mount()
	for redirect, want := range r.files {
		got, err := os.ReadFile(path(redirect))
		require.NoError(r.t, err)
		require.True(r.t, bytes.Equal(want, got), "%s holds wrong bytes", redirect)
	}
	// An overlay that stands holds what was opened through it.
	require.NoError(r.t, unix.Unmount(filepath.Dir(path("/0/x")), 0))
}

// onNVM lists the files there.
func (r *rig) onNVM(ids ...string) []string {
	r.t.Helper()
	names := []string{}
	for _, id := range ids {
		for e, err := range r.tiers.OnNVM(id) {
			require.NoError(r.t, err)
			if !e.Mode.IsDir() {
				names = append(names, e.Redirect)
			}
		}
	}
	return names
}

func keep(redirects ...string) map[string]bool {
	m := map[string]bool{}
	for _, r := range redirects {
		m[r] = true
	}
	return m
}

func up(r *rig, redirects ...string) (ups []plan.Promotion) {
	for _, name := range redirects {
		ups = append(ups, plan.Promotion{Redirect: name, Size: int64(len(r.files[name]))})
	}
	return ups
}

func command(t *testing.T, name string, args ...string) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
	require.NoError(t, err, "%s %v: %s", name, args, out)
}
