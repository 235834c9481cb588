//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/integration/image"
	"github.com/nhybrid/nhybrid/integration/rig"
)

// withoutFanotify is a directory of programs in which the daemon is refused fanotify.
func withoutFanotify(t *testing.T) string {
	t.Helper()
	strace, err := exec.LookPath("strace")
	require.NoError(t, err)
	dir := t.TempDir()
	real := filepath.Dir(program(t, "containerd"))
	programs, err := os.ReadDir(real)
	require.NoError(t, err)
	for _, p := range programs {
		if p.Name() != "containerd-nhybrid-grpc" {
			require.NoError(t, os.Symlink(filepath.Join(real, p.Name()), filepath.Join(dir, p.Name())))
		}
	}
	// The tracer is the daemon's grandchild, so that the daemon has the number, and the fate, of what was started.
	wrapper := fmt.Sprintf("#!/bin/sh\nexec %s -D -f --seccomp-bpf -qqq -o /dev/null -e trace=fanotify_init -e inject=fanotify_init:error=EPERM %s \"$@\"\n",
		strace, filepath.Join(real, "containerd-nhybrid-grpc"))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "containerd-nhybrid-grpc"), []byte(wrapper), 0o755))
	return dir
}

// Where starts cannot be traced, the daemon runs on: images are analysed, and what they will need comes to NVM before their
// first start. It says so once.
func TestWithoutTraces(t *testing.T) {
	t.Parallel()
	for name, refused := range map[string]bool{"refused by the kernel": true, "switched off": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := soon(t)
			o := rig.Options{DaemonArgs: hot("--set", "placement.policy=hdd")}
			if refused {
				o.Bin = withoutFanotify(t)
			} else {
				o.DaemonArgs = append(o.DaemonArgs, "--set", "hot.trace=false")
			}
			r := newRig(t, o)
			_, err := r.PushTiny(ctx, "app:1", image.TinySpec{
				Runnable: true, Layers: []int64{half, half}, Config: v1.Config{Entrypoint: []string{"/bin/sh", "-c", "cat /data/0/3"}},
			})
			require.NoError(t, err)
			require.NoError(t, r.Pull(ctx, "app:1"))
			awaitProfile(t, r, r.Ref("app:1"), func(s shown) error {
				if s.Info.Known != "predicted" {
					return fmt.Errorf("known: %q", s.Info.Known)
				}
				return nil
			})
			now(t, r)
			files := hotFiles(t, r, "app:1")
			require.Positive(t, files["bin/busybox"].NVMBytes)
			require.Positive(t, files["data/0/3"].NVMBytes)
			require.Zero(t, files["data/0/4"].NVMBytes)
			require.Equal(t, "1", run(t, r, "app:1", "cat", "/data/shared"))
			now(t, r)
			require.Equal(t, "predicted", profileOf(t, r, r.Ref("app:1")).Info.Known)

			var status struct{ Warnings []string }
			ctl(t, r, &status, "status")
			why := map[bool]string{true: "CAP_SYS_ADMIN", false: "hot.trace"}[refused]
			require.True(t, slices.ContainsFunc(status.Warnings, func(w string) bool {
				return strings.Contains(w, "starts are not traced") && strings.Contains(w, why)
			}), "%q", status.Warnings)
			out, err := r.Nhybridctl(ctx, "top", "--once")
			require.NoError(t, err)
			require.Contains(t, out, "trace      off: ")
			if !refused {
				require.Zero(t, lines(r, "level=warning", "starts are not traced"), "that is what was asked for")
				return
			}
			require.Equal(t, 1, lines(r, "level=warning", "starts are not traced", "CAP_SYS_ADMIN"))
			// Seen by doctor, with the cure.
			found := examine(t, r, filepath.Join(r.Dir, "containerd.toml"))
			require.True(t, slices.ContainsFunc(found, func(f finding) bool {
				return f.Level == "warn" && strings.Contains(f.Text, "not traced") && strings.Contains(f.Text, "CAP_SYS_ADMIN")
			}), "%+v", found)
		})
	}
}

// lines counts the lines of the daemon's log that hold all the words.
func lines(r *rig.Rig, words ...string) (n int) {
	for line := range strings.SplitSeq(r.Daemon.Log(), "\n") {
		if !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(line, w) }) {
			n++
		}
	}
	return n
}
