//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/moby/sys/mountinfo"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/integration/link"
	"github.com/nhybrid/nhybrid/integration/rig"
)

// soon is the test's context with a deadline that nothing but what hangs can meet, however busy the machine is.
func soon(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// await asks until the answer is nil.
func await(t *testing.T, ask func(context.Context) error) {
	t.Helper()
	require.NoError(t, rig.Await(soon(t), ask))
}

// newRig starts a rig with the policy lass, where none is asked for: it goes by nothing but the order of arrivals, which
// tests decide, while the default goes by rates that it measures. Files stay where they are stored, unless a test is about
// hot files.
func newRig(t *testing.T, o rig.Options) *rig.Rig {
	t.Helper()
	args := strings.Join(o.DaemonArgs, " ")
	o.DaemonArgs = slices.Clone(o.DaemonArgs)
	if !strings.Contains(args, "placement.policy=") {
		o.DaemonArgs = append(o.DaemonArgs, "--set", "placement.policy=lass")
	}
	if !strings.Contains(args, "hot.") {
		o.DaemonArgs = append(o.DaemonArgs, "--set", "hot.migrate=false")
	}
	return rig.New(t, o)
}

// blobs are the digests of the layers of an image, bottom first.
func blobs(t *testing.T, img v1.Image) []string {
	t.Helper()
	layers, err := img.Layers()
	require.NoError(t, err)
	var all []string
	for _, l := range layers {
		d, err := l.Digest()
		require.NoError(t, err)
		all = append(all, d.String())
	}
	return all
}

// start runs a call in the background and returns a function that waits for its end.
func start(call func() error) (wait func() error) {
	done := make(chan error, 1)
	go func() { done <- call() }()
	return func() error { return <-done }
}

// pushHeld stores an image under the name app:1 of which the link keeps layer 2 back, half of it, until release is called.
func pushHeld(t *testing.T, r *rig.Rig, seed uint64) (digests []string, release func()) {
	t.Helper()
	img, err := r.PushTiny(soon(t), "app:1", app(seed))
	require.NoError(t, err)
	digests = blobs(t, img)
	return digests, r.Link.Hold(digests[2], half)
}

// layer is what nhybridctl inspect --json tells of one.
type layer struct {
	Index        int
	Digest       string
	SnapshotID   string `json:"snapshot_id"`
	Layer, State string
	Uncompressed int64
	NVMBytes     int64 `json:"nvm_bytes"`
	HDDBytes     int64 `json:"hdd_bytes"`
	Tier         string
	Durable      bool
	LDL          bool
	Error        string
	Decision     *struct {
		Tier, Reason, Policy, Image string
		Layers, LDL, Downloading    int
		BytesLeft                   int64 `json:"bytes_left"`
		NVMFree                     int64 `json:"nvm_free"`
		Size                        int64
		Admitted, Sequential        bool
		Files                       []struct{ Place, Rule string }
	}
}

func inspect(t *testing.T, r *rig.Rig, name string) []layer {
	t.Helper()
	return inspectIn(t, r, r.Namespace, name)
}

func inspectIn(t *testing.T, r *rig.Rig, namespace, name string) []layer {
	t.Helper()
	var answer struct{ Layers []layer }
	ctl(t, r, &answer, "inspect", "--namespace", namespace, r.Ref(name))
	return answer.Layers
}

// numbers are the numbers of layers in the store, bottom first.
func numbers(layers []layer) (all []string) {
	for _, l := range layers {
		all = append(all, l.Layer)
	}
	return all
}

// ctl decodes what a command of nhybridctl prints with --json.
func ctl(t *testing.T, r *rig.Rig, answer any, args ...string) {
	t.Helper()
	out, err := r.Nhybridctl(soon(t), append(args, "--json")...)
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal([]byte(out), answer), "%s", out)
}

// tiers writes the tiers that were decided for layers as a word, bottom first: "hhnn". Where they stand changes with time.
func tiers(layers []layer) string {
	var b strings.Builder
	for _, l := range layers {
		if l.Decision == nil {
			b.WriteString("?")
			continue
		}
		b.WriteString((l.Decision.Tier + "?")[:1])
	}
	return b.String()
}

// onNVM are the bytes of layers that stand on NVM.
func onNVM(layers []layer) (sum int64) {
	for _, l := range layers {
		sum += l.NVMBytes
	}
	return sum
}

// inLog tells whether a line of the daemon's log holds all the words.
func inLog(r *rig.Rig, words ...string) bool {
	for line := range strings.SplitSeq(r.Daemon.Log(), "\n") {
		if !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(line, w) }) {
			return true
		}
	}
	return false
}

func awaitLog(t *testing.T, r *rig.Rig, words ...string) {
	t.Helper()
	await(t, func(context.Context) error {
		if !inLog(r, words...) {
			return fmt.Errorf("no line of the daemon's log holds all of %q", words)
		}
		return nil
	})
}

// awaitStored waits until layers stand whole in the store, whoever asks for them.
func awaitStored(t *testing.T, r *rig.Rig, digests ...string) {
	t.Helper()
	for _, d := range digests {
		awaitLog(t, r, "layer stored", d)
	}
}

// but is all digests but the one at an index.
func but(digests []string, i int) []string { return slices.Delete(slices.Clone(digests), i, i+1) }

// awaitDone waits until the link has passed blobs on whole.
func awaitDone(t *testing.T, r *rig.Rig, digests ...string) {
	t.Helper()
	for _, d := range digests {
		require.NoError(t, r.Link.Await(soon(t), link.Done(d)), "blob %s", d)
	}
}

// settled waits until the daemon has nothing left to do.
func settled(t *testing.T, r *rig.Rig) {
	t.Helper()
	await(t, func(ctx context.Context) error { return busyWith(ctx, r) })
}

// busyWith is nil when the daemon has nothing left to do, and else says what.
func busyWith(ctx context.Context, r *rig.Rig) error {
	var status struct {
		NotDurable int64 `json:"not_durable"`
		Queues     []struct {
			Name             string
			Waiting, Running int64
			LastError        string `json:"last_error"`
		}
	}
	out, err := r.Nhybridctl(ctx, "status", "--json")
	if err != nil {
		return err
	}
	if err := json.Unmarshal([]byte(out), &status); err != nil {
		return err
	}
	for _, q := range status.Queues {
		if q.Waiting+q.Running > 0 {
			return fmt.Errorf("queue %s: %d waiting, %d running, last error %q", q.Name, q.Waiting, q.Running, q.LastError)
		}
	}
	if status.NotDurable > 0 {
		return fmt.Errorf("%d layers are not durable", status.NotDurable)
	}
	return nil
}

// ofSnapshot matches the name of what belongs to one snapshot below the roots.
var ofSnapshot = regexp.MustCompile(`^\.?[0-9]+(\.[a-z]+)*$`)

// leftovers are files and mounts of snapshots on either tier.
func leftovers(r *rig.Rig) (found []string, err error) {
	for _, root := range []string{r.NVM, r.HDD, filepath.Join(r.Dir, "state")} {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err == nil && ofSnapshot.MatchString(d.Name()) {
				found = append(found, path)
				if d.IsDir() {
					return fs.SkipDir
				}
			}
			return nil // what goes while we look is gone
		})
		if err != nil {
			return nil, err
		}
	}
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(r.Dir))
	if err != nil {
		return nil, err
	}
	for _, m := range mounts {
		if m.FSType == "erofs" || m.FSType == "overlay" {
			found = append(found, m.Mountpoint)
		}
	}
	return found, nil
}

// awaitEmpty waits until both tiers hold nothing of any snapshot.
func awaitEmpty(t *testing.T, r *rig.Rig) {
	t.Helper()
	await(t, func(context.Context) error {
		found, err := leftovers(r)
		if err == nil && len(found) > 0 {
			err = fmt.Errorf("left over: %q", found)
		}
		return err
	})
	var usage struct {
		Tiers []struct {
			Name                           string
			Layers, Uppers, Views, Orphans int64
		}
		Orphans []struct{ Key string }
	}
	ctl(t, r, &usage, "du")
	require.Len(t, usage.Tiers, 2)
	for _, tier := range usage.Tiers {
		require.Zero(t, tier.Layers, "layers on %s", tier.Name)
		require.Zero(t, tier.Views, "views on %s", tier.Name)
		require.Zero(t, tier.Orphans, "what nobody needs on %s", tier.Name)
	}
	require.Empty(t, usage.Orphans)
}

// removeImage removes an image and waits for containerd's garbage collection.
func removeImage(t *testing.T, r *rig.Rig, name string) {
	t.Helper()
	_, err := r.Ctr(soon(t), "images", "rm", "--sync", r.Ref(name))
	require.NoError(t, err)
}
