// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package migrate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
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
	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// host is a Host of two directories of data files, and a file for each record, so that it outlives a process. What is on HDD
// stands in a directory by number, as in a view.
type host struct {
	dir       string // of the records
	nvm, home string // data roots
	pins      *tier.Pins

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

func (h *host) record(kind, id string) string { return filepath.Join(h.dir, kind+"-"+id) }

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// copy brings a file from one root to the other, whole under its name.
func (h *host) copy(redirect, from, to string, pace func(int) error) (n int64, err error) {
	in, err := os.Open(from + redirect)
	if errors.Is(err, os.ErrNotExist) {
		return 0, fmt.Errorf("%q: %w", redirect, errdefs.ErrNotFound)
	}
	if err != nil {
		return 0, err
	}
	defer in.Close()
	if err := os.MkdirAll(filepath.Dir(to+redirect), 0o755); err != nil {
		return 0, err
	}
	tmp, err := os.Create(to + "/.tmp")
	if err != nil {
		return 0, err
	}
	defer tmp.Close()
	buf := make([]byte, 512<<10)
	for {
		k, err := in.Read(buf)
		if errors.Is(err, io.EOF) {
			break
		}
		if err == nil {
			err = pace(k)
		}
		if err == nil {
			_, err = tmp.Write(buf[:k])
		}
		if err != nil {
			return n, errors.Join(err, os.Remove(tmp.Name()))
		}
		n += int64(k)
	}
	return n, errors.Join(tmp.Chmod(0o755), tmp.Sync(), os.Rename(tmp.Name(), to+redirect))
}

func (h *host) BringHome(_ context.Context, id string, pace func(int) error) error {
	if err := h.failure(id); err != nil {
		return err
	}
	if exists(h.record("gone", id)) {
		return errdefs.ErrNotFound
	}
	if exists(h.record("home", id)) {
		return nil
	}
	for f, err := range h.OnNVM(id) {
		if err == nil && !exists(h.home+f.Redirect) {
			_, err = h.copy(f.Redirect, h.nvm, h.home, pace)
		}
		if err != nil {
			return err
		}
	}
	return os.WriteFile(h.record("home", id), nil, 0o600)
}

func (h *host) OnNVM(id string) iter.Seq2[File, error] {
	return func(yield func(File, error) bool) {
		names, err := filepath.Glob(filepath.Join(h.nvm, id, "*/*"))
		for _, name := range names {
			var st unix.Stat_t
			if err = unix.Lstat(name, &st); err == nil && !yield(File{name[len(h.nvm):], 512 * st.Blocks}, nil) {
				return
			}
		}
		if err != nil {
			yield(File{}, err)
		}
	}
}

func (h *host) Stands(redirect string) (bool, error) { return exists(h.nvm + redirect), nil }

func (h *host) Promote(_ context.Context, redirect string, pace func(int) error) (int64, error) {
	if exists(h.nvm + redirect) {
		return 0, nil
	}
	return h.copy(redirect, h.home, h.nvm, pace)
}

func (h *host) Demote(redirect string) (freed, held int64, err error) {
	if !exists(h.record("home", layerOf(redirect))) {
		return 0, 0, fmt.Errorf("%q: the pack has holes: %w", redirect, errdefs.ErrFailedPrecondition)
	}
	return h.pins.Unlink(h.nvm + redirect)
}

func (h *host) Held() int64 { return h.pins.Bytes() }

func (h *host) Free() (int64, error) {
	var st unix.Statfs_t
	err := unix.Statfs(h.nvm, &st)
	return int64(st.Bavail) * st.Bsize, err
}

func (h *host) Settled(_ context.Context, id string, n int64) error {
	if exists(h.record("gone", id)) {
		return fmt.Errorf("layer %s: %w", id, errdefs.ErrNotFound)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.settled[id] = n
	return nil
}

func (h *host) Gone(id string) error { return os.RemoveAll(filepath.Join(h.nvm, id)) }

// rig is a store with layers that a container uses.
type rig struct {
	t     *testing.T
	dir   string
	host  *host
	files map[string][]byte // content by redirect
}

func openRig(t *testing.T, dir, nvm string) *rig {
	t.Helper()
	h := &host{dir: dir, nvm: filepath.Join(nvm, "d"), home: filepath.Join(dir, "hdd/h"), fail: map[string]error{}, settled: map[string]int64{}}
	for _, root := range []string{h.nvm, h.home} {
		require.NoError(t, os.MkdirAll(root, 0o755))
		require.NoError(t, os.RemoveAll(root+"/.tmp"))
	}
	var err error
	h.pins, err = tier.NewPins(h.nvm)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, h.pins.Close()) })
	return &rig{t: t, dir: dir, host: h, files: map[string][]byte{}}
}

func newRig(t *testing.T) *rig {
	t.Helper()
	dir := t.TempDir()
	return openRig(t, dir, filepath.Join(dir, "nvm"))
}

func (r *rig) engine(c Config) *Engine {
	r.t.Helper()
	c.HDD = r.host.home
	if c.Disk == 0 {
		c.Disk = 1 // whatever others do on the machine's own disk
	}
	e, err := New(c, r.host)
	require.NoError(r.t, err)
	r.t.Cleanup(func() { _ = e.Close() })
	return e
}

// atHome makes the record of a layer whose pack is whole.
func (r *rig) atHome(id string) {
	r.t.Helper()
	require.NoError(r.t, os.WriteFile(r.host.record("home", id), nil, 0o600))
}

func name(layer uint64, number int) string {
	return pack.Ref{Layer: layer, Number: uint32(number)}.Redirect()
}

func (r *rig) root(on placement.Tier) string {
	if on == placement.NVM {
		return r.host.nvm
	}
	return r.host.home
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
	f := r.root(on) + redirect
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
	flat := func(redirect string) string { return strings.ReplaceAll(redirect[1:], "/", "_") }
	for redirect, b := range r.files {
		f := filepath.Join(tree, flat(redirect))
		require.NoError(r.t, os.WriteFile(f, nil, 0o755))
		require.NoError(r.t, os.Truncate(f, int64(len(b))))
		require.NoError(r.t, unix.Setxattr(f, "trusted.overlay.metacopy", nil, 0))
		require.NoError(r.t, unix.Setxattr(f, "trusted.overlay.redirect", []byte(redirect), 0))
	}
	options := "metacopy=on,lowerdir=" + strings.Join([]string{tree, r.host.nvm, r.host.home}, "::")
	require.NoError(r.t, unix.Mount("overlay", root, "overlay", unix.MS_RDONLY, options))
	r.t.Cleanup(func() { _ = unix.Unmount(root, unix.MNT_DETACH) })
	return func(redirect string) string { return filepath.Join(root, flat(redirect)) }
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
		for f, err := range r.host.OnNVM(id) {
			require.NoError(r.t, err)
			names = append(names, f.Redirect)
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
