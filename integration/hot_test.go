//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"archive/tar"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/integration/image"
	"github.com/nhybrid/nhybrid/integration/rig"
)

// hotImage pushes an image with 40 files of 64 KiB in two layers, and one of 4 MiB.
func hotImage(t *testing.T, r *rig.Rig, name string) {
	t.Helper()
	random := rand.New(rand.NewPCG(1, 2))
	fill := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(random.Uint32())
		}
		return b
	}
	var first, second []image.Entry
	for i := range 20 {
		first = append(first, image.Entry{Header: tar.Header{Name: fmt.Sprintf("app/a%d", i), Mode: 0o644}, Data: fill(64 << 10)})
		second = append(second, image.Entry{Header: tar.Header{Name: fmt.Sprintf("app/b%d", i), Mode: 0o644}, Data: fill(64 << 10)})
	}
	second = append(second, image.Entry{Header: tar.Header{Name: "app/large", Mode: 0o644}, Data: fill(4 << 20)})
	one, err := image.Layer(first)
	require.NoError(t, err)
	two, err := image.Layer(second)
	require.NoError(t, err)
	_, err = r.PushBusybox(t.Context(), name, one, two)
	require.NoError(t, err)
}

// quick makes the ends of starts come soon, but not between two opens of a start on a busy machine.
var quick = []string{"--set", "hot.quiet=2s", "--set", "hot.rate=0", "--set", "hot.operations=0"}

// hotFiles are the files of an image by path, as nhybridctl inspect --files tells.
type hotFile struct {
	Path     string
	Size     int64
	Tier     string
	Hot      bool
	Pinned   bool
	Starts   int64
	NVMBytes int64 `json:"nvm_bytes"`
}

func hotFiles(t *testing.T, r *rig.Rig, name string) map[string]hotFile {
	t.Helper()
	var answer struct{ Files []hotFile }
	ctl(t, r, &answer, "inspect", "--files", "--all", r.Ref(name))
	files := map[string]hotFile{}
	for _, f := range answer.Files {
		files[f.Path] = f
	}
	return files
}

// awaitMigration waits until every start is recorded and every file is where it belongs.
func awaitMigration(t *testing.T, r *rig.Rig, starts int) {
	t.Helper()
	await(t, func(ctx context.Context) error {
		var top struct {
			Sample struct {
				StartsTotal int `json:"starts_total"`
				Starts      []struct{ Files int }
				Migration   struct{ State string }
			}
		}
		out, err := r.Nhybridctl(ctx, "top", "--once", "--json")
		if err != nil {
			return err
		}
		if err := json.Unmarshal([]byte(out), &top); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		opens := false // who has opened nothing only looked at the image
		for _, s := range top.Sample.Starts {
			opens = opens || s.Files > 0
		}
		if s := top.Sample; s.StartsTotal < starts || opens || s.Migration.State != "idle" {
			return fmt.Errorf("not yet: %s", out)
		}
		return nil
	})
}

// After the first start only what it opened is on NVM.
func TestColdFilesLeave(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{DaemonArgs: quick})
	hotImage(t, r, "app:1")
	require.NoError(t, r.Pull(ctx, "app:1"))
	out, err := r.RunContainer(ctx, "app:1", "first", "sh", "-c", "cat /app/a3 /app/b4 | md5sum; dd if=/app/large bs=64k skip=3 count=2 2>/dev/null | md5sum")
	require.NoError(t, err)
	awaitMigration(t, r, 1)
	files := hotFiles(t, r, "app:1")
	for path, f := range files {
		if strings.HasPrefix(path, "app/") && path != "app/large" {
			hot := path == "app/a3" || path == "app/b4"
			require.Equal(t, hot, f.Hot, "%s: %+v", path, f)
			require.Equal(t, hot, f.NVMBytes > 0, "%s: %+v", path, f)
		}
	}
	require.True(t, files["bin/busybox"].Hot)
	require.EqualValues(t, 1, files["app/large"].Starts)
	again, err := r.RunContainer(ctx, "app:1", "second", "sh", "-c", "cat /app/a3 /app/b4 | md5sum; dd if=/app/large bs=64k skip=3 count=2 2>/dev/null | md5sum")
	require.NoError(t, err)
	require.Equal(t, out, again)
	awaitMigration(t, r, 2)
	require.EqualValues(t, 2, hotFiles(t, r, "app:1")["app/a3"].Starts)
}
