//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"strconv"
	"sync"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/integration/image"
	"github.com/nhybrid/nhybrid/integration/rig"
	"github.com/nhybrid/nhybrid/integration/workload"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// verifier is the program that uses and checks files in a container.
var verifier = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "nh-verify-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	build := exec.Command("go", "build", "-o", dir, "github.com/nhybrid/nhybrid/integration/workload/verify")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build verify: %w: %s", err, out)
	}
	return os.ReadFile(filepath.Join(dir, "verify"))
})

// known is an image in which every byte is known: files of all sizes in two layers, hard links, a file that the second
// layer replaces, large ones, programs. /app/verify checks those in /app/list.
type known struct {
	files  []workload.File
	layers [][]image.Entry // without the base
}

func knownImage(t *testing.T, files int, large int) (k known) {
	t.Helper()
	program, err := verifier()
	require.NoError(t, err)
	busybox, err := os.ReadFile("/bin/busybox")
	require.NoError(t, err)
	executable := func(name string, data []byte) image.Entry {
		e := plain(name, data)
		e.Header.Mode = 0o755
		return e
	}
	add := func(layer *[]image.Entry, name string, seed uint64, size int) {
		*layer = append(*layer, plain(name, workload.Bytes(seed, size)))
		k.files = append(k.files, workload.File{Path: "/" + name, Seed: seed, Size: size})
	}
	random := rand.New(rand.NewPCG(uint64(files), 1))
	k.layers = make([][]image.Entry, 2)
	for l := range k.layers {
		layer := &k.layers[l]
		for i := range files / 2 {
			add(layer, fmt.Sprintf("app/%d/d%d/f%d", l, i%5, i), uint64(1000*l+i), 1+random.IntN(1<<(4+i%15)))
		}
		hard := plain(fmt.Sprintf("app/%d/hard", l), nil)
		hard.Header.Typeflag, hard.Header.Linkname = '1', fmt.Sprintf("app/%d/d0/f0", l)
		*layer = append(*layer, hard)
		first := k.files[len(k.files)-files/2]
		k.files = append(k.files, workload.File{Path: "/" + hard.Header.Name, Seed: first.Seed, Size: first.Size})
		add(layer, fmt.Sprintf("app/large%d", l), uint64(5000+l), large)
		*layer = append(*layer, executable(fmt.Sprintf("app/busybox-%d", l), busybox))
		k.files = append(k.files, workload.File{Path: fmt.Sprintf("/app/busybox-%d", l), Program: true})
	}
	k.layers[0] = append(k.layers[0], plain("app/replaced", []byte("old")))
	add(&k.layers[1], "app/replaced", 6000, 70000)
	list, err := json.Marshal(k.files)
	require.NoError(t, err)
	k.layers[1] = append(k.layers[1], plain("app/list", list), executable("app/verify", program))
	return k
}

func (k known) push(t *testing.T, r *rig.Rig, name string) {
	t.Helper()
	var layers []v1.Layer
	for _, l := range k.layers {
		layers = append(layers, ofFiles(t, l...))
	}
	_, err := r.PushBusybox(t.Context(), name, layers...)
	require.NoError(t, err)
}

// check has every file read in a new container.
func (k known) check(t *testing.T, r *rig.Rig, name string) {
	t.Helper()
	var result workload.Result
	require.NoError(t, json.Unmarshal([]byte(run(t, r, name, "/app/verify", "/app/list")), &result))
	require.Empty(t, result.Errors)
	require.Equal(t, len(k.files), result.Reads+result.Execs)
}

// atHome holds the data in the packs of all layers against what the image was made of.
func (k known) atHome(t *testing.T, r *rig.Rig, name string) {
	t.Helper()
	layers := inspect(t, r, name)
	for i, entries := range k.layers {
		got := packed(t, r, layers[1+i].Digest)
		for _, e := range entries {
			data := e.Data
			if e.Header.Linkname != "" {
				for _, other := range entries {
					if other.Header.Name == e.Header.Linkname {
						data = other.Data
					}
				}
			}
			b, ok := got[e.Header.Name]
			require.True(t, ok, "%q is not in the pack of layer %d", e.Header.Name, i)
			require.True(t, bytes.Equal(data, b), "%q in the pack of layer %d is not what the image has", e.Header.Name, i)
		}
	}
}

// packed are the files in the pack of a blob, by path.
func packed(t *testing.T, r *rig.Rig, blob string) map[string][]byte {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(r.HDD, "p", "*.erofs"))
	require.NoError(t, err)
	for _, file := range paths {
		p, err := pack.Open(file)
		require.NoError(t, err)
		if p.Identity().Blob.String() != blob {
			require.NoError(t, p.Close())
			continue
		}
		m, err := p.Meta(t.Context())
		require.NoError(t, err)
		files := map[string][]byte{}
		var walk func(dir string, n *pack.Node)
		walk = func(dir string, n *pack.Node) {
			name := path.Join(dir, n.Name)
			switch i := n.Inode; {
			case i == nil:
			case i.HasData():
				data, err := p.ReadData(i.Data.Number)
				require.NoError(t, err)
				files[name], err = io.ReadAll(data)
				require.NoError(t, err)
			case i.Size > 0:
				files[name] = []byte(i.Inline)
			}
			for _, c := range n.Children {
				walk(name, c)
			}
		}
		walk("", m.Root)
		require.NoError(t, p.Close())
		return files
	}
	require.Fail(t, "no pack", "of blob %s below %s", blob, r.HDD)
	return nil
}

// healthy asserts that nhybridctl status has nothing to complain of.
func healthy(t *testing.T, r *rig.Rig) {
	t.Helper()
	var status struct {
		NotDurable int64 `json:"not_durable"`
		Warnings   []string
		Queues     []struct {
			Name      string
			Failed    int64
			LastError string `json:"last_error"`
		}
	}
	ctl(t, r, &status, "status")
	require.Zero(t, status.NotDurable)
	for _, w := range status.Warnings {
		require.NotContains(t, w, "layer")
		require.NotContains(t, w, "traced")
	}
	for _, q := range status.Queues {
		require.Empty(t, q.LastError, "queue %s", q.Name)
	}
}

// setting reads what a longer run is asked for.
func setting[T any](t *testing.T, name string, otherwise T, parse func(string) (T, error)) T {
	t.Helper()
	s := os.Getenv(name)
	if s == "" {
		return otherwise
	}
	v, err := parse(s)
	require.NoError(t, err, "environment variable %s", name)
	return v
}

var moved = regexp.MustCompile(`left_nvm=(\d+) left_nvm_bytes=(\d+) .*to_nvm=(\d+) to_nvm_bytes=(\d+)`)

// Files are used in all ways while they move up and down as fast as they can and the daemon is killed again and again: no
// error, no wrong byte, and nothing is lost. NHYBRID_WORKLOAD and NHYBRID_KILLS make it longer.
func TestKilledWhileFilesMove(t *testing.T) {
	t.Parallel()
	duration := setting(t, "NHYBRID_WORKLOAD", 15*time.Second, time.ParseDuration)
	kills := setting(t, "NHYBRID_KILLS", 5, strconv.Atoi)
	ctx, cancel := context.WithTimeout(t.Context(), duration+3*time.Minute)
	defer cancel()
	r := newRig(t, rig.Options{DaemonArgs: hot("--set", "hot.parts=1MiB")})
	k := knownImage(t, 120, 6<<20+333)
	k.push(t, r, "app:1")
	require.NoError(t, r.Pull(ctx, "app:1"))
	k.check(t, r, "app:1")
	awaitMigration(t, r, 1)

	work, err := r.Command(ctx, "ctr", "run", "--rm", r.Ref("app:1"), "work", "/app/verify", "/app/list", duration.String())
	require.NoError(t, err)
	var out, said bytes.Buffer
	work.Stdout, work.Stderr = &out, &said
	require.NoError(t, work.Start())
	done := make(chan error, 1)
	go func() { done <- work.Wait() }()

	// What moves everything up, everything down, and what starts say, in turn.
	moving, stop := context.WithCancel(ctx)
	defer stop()
	var mover sync.WaitGroup
	turns := 0
	mover.Go(func() {
		for i := 0; moving.Err() == nil; i++ {
			how := []string{"pin", "exclude", "unpin"}[i%3]
			if _, err := r.Nhybridctl(moving, "profile", how, r.Ref("app:1"), "**"); err != nil {
				time.Sleep(10 * time.Millisecond) // the daemon is being killed
				continue
			}
			// Not always to the end: another plan comes in the midst of one.
			args := []string{"migrate", "now", "--wait"}
			if rand.IntN(4) == 0 {
				args = args[:2]
			}
			if _, err := r.Nhybridctl(moving, args...); err == nil {
				turns++
			}
		}
	})
	var ended error
	running, killed := true, 0
	began := time.Now()
	for running && killed < kills {
		next := time.Duration((float64(killed) + 0.3 + 0.7*rand.Float64()) * float64(duration) * 0.95 / float64(kills))
		select {
		case ended = <-done:
			running = false
			continue
		case <-time.After(time.Until(began.Add(next))):
		}
		require.NoError(t, r.Daemon.Kill())
		killed++
		require.NoError(t, r.Daemon.Start(ctx))
		if killed%5 == 1 { // a new container mounts what the killed one has left
			await(t, reachable(r))
			k.check(t, r, "app:1")
		}
	}
	if running {
		ended = <-done
	}
	stop()
	mover.Wait()
	var result workload.Result
	require.NoError(t, json.Unmarshal(out.Bytes(), &result), "%v: %s %s", ended, &out, &said)
	sums := make([]int64, 4)
	for _, m := range moved.FindAllStringSubmatch(r.Daemon.Log(), -1) {
		for i := range sums {
			n, _ := strconv.ParseInt(m[1+i], 10, 64) // digits
			sums[i] += n
		}
	}
	fmt.Printf("workload: %v, %d kills, %d turns; at least %d files (%d MB) left NVM, %d (%d MB) came; %d reads, %d pieces, %d maps, %d programs, %d held, %d MB checked; %d errors\n",
		duration, killed, turns, sums[0], sums[1]/1e6, sums[2], sums[3]/1e6, result.Reads, result.Pieces, result.Maps, result.Execs, result.Held, result.Bytes/1e6, len(result.Errors))
	require.Empty(t, result.Errors)
	require.NoError(t, ended, "%s", &said)
	require.Equal(t, kills, killed)
	require.Greater(t, turns, 2)
	require.Positive(t, sums[0]*sums[2], "nothing moved")
	require.NotContains(t, r.Daemon.Log(), "level=error")

	await(t, reachable(r))
	for _, how := range []string{"exclude", "pin", "unpin"} {
		_, err := r.Nhybridctl(ctx, "profile", how, r.Ref("app:1"), "**")
		require.NoError(t, err)
		_, err = r.Nhybridctl(ctx, "migrate", "now", "--wait")
		require.NoError(t, err)
		for path, f := range hotFiles(t, r, "app:1") {
			switch how {
			case "exclude":
				require.Zero(t, f.NVMBytes, "%s: %+v", path, f)
			case "pin":
				require.Contains(t, []string{"nvm", "both"}, f.Tier, "%s: %+v", path, f)
			}
		}
		k.check(t, r, "app:1")
	}
	k.atHome(t, r, "app:1")
	settled(t, r)
	healthy(t, r)
	removeImage(t, r, "app:1")
	awaitEmpty(t, r)
}
