//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"bufio"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/integration/rig"
)

// event is one line of nhybridctl watch --json.
type event struct {
	Type, Image, Message string
	Layers               []struct {
		Index       int
		Digest      string
		State, Tier string
	}
}

// A person can follow a pull: what arrives, and what is decided.
func TestWatchFollowsAPull(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{DaemonArgs: lass})
	img, err := r.PushTiny(ctx, "app:1", small(1, 3))
	require.NoError(t, err)
	digests := blobs(t, img)
	last := r.Link.Hold(digests[0], half)
	defer last()
	wait := start(func() error { return r.Pull(ctx, "app:1") })
	awaitStored(t, r, digests[1:]...)

	watch, err := r.Command(ctx, "nhybridctl", "watch", "--json", "--once")
	require.NoError(t, err)
	out, err := watch.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, watch.Start())
	lines := bufio.NewScanner(out)
	var seen []event
	next := func() bool {
		if !lines.Scan() {
			return false
		}
		var e event
		require.NoError(t, json.Unmarshal(lines.Bytes(), &e), "%s", lines.Text())
		seen = append(seen, e)
		return true
	}
	require.True(t, next())
	require.Equal(t, "pull", seen[0].Type, "it begins with the pulls that run")
	require.Len(t, seen[0].Layers, 3)
	last()
	for next() {
	}
	require.NoError(t, watch.Wait(), "it ends with the pull")
	require.NoError(t, wait())
	count := map[string]int{}
	for _, e := range seen {
		count[e.Type]++
		if e.Type == "decision" {
			require.Equal(t, digests[0], e.Layers[0].Digest)
			require.Equal(t, "nvm", e.Layers[0].Tier)
			require.NotEmpty(t, e.Message)
		}
	}
	require.Equal(t, 1, count["pull"])
	require.Equal(t, 1, count["decision"])
	require.Equal(t, 1, count["done"])
	require.Positive(t, count["progress"])
}

// answerOfAPath is what nhybridctl why IMAGE PATH --json tells.
type answerOfAPath struct {
	Layers []layer
	File   struct {
		Path, Type, Tier, Target, Reason string
		Size                             int64
		LayerIndex                       int    `json:"layer_index"`
		DataPath                         string `json:"data_path"`
	}
}

func whyPath(t *testing.T, r *rig.Rig, path string) (answer answerOfAPath) {
	t.Helper()
	ctl(t, r, &answer, "why", r.Ref("app:1"), path)
	return answer
}

// Where a file of an image comes from, where its bytes are, and why.
func TestWhyOfAPath(t *testing.T) {
	t.Parallel()
	t.Run("lass", whyByLass)
	t.Run("drain", whyByDrain)
	t.Run("hdd", whyByHDD)
}

// The reason names the rules that the decision about the layer counts files for, and no others.
func whyByDrain(t *testing.T) {
	t.Parallel()
	r := newRig(t, rig.Options{DaemonArgs: []string{"--set", "placement.policy=drain", "--set", "hot.predict=off"}})
	_, err := r.PushTiny(soon(t), "app:1", app(2))
	require.NoError(t, err)
	require.NoError(t, r.Pull(soon(t), "app:1"))
	settled(t, r)
	words := map[string]string{
		"in-time": "the disk keeps up", "small": "too small for NVM", "no-room": "NVM has no room", "unknown": "a rate is not known yet", "layer": "as the whole layer",
	}
	for _, path := range []string{"/data/0/3", "/data/1/3", "/data/2/3"} {
		answer := whyPath(t, r, path)
		require.Equal(t, "hdd", answer.File.Tier, "it is too small to be late")
		reason := answer.File.Reason
		require.True(t, strings.HasPrefix(reason, "when its layer was stored (policy drain) it went to the pack ("), reason)
		require.True(t, strings.HasSuffix(reason, "it is not hot (it is not known to be used)"), reason)
		recorded := map[string]bool{}
		for _, s := range answer.Layers[0].Decision.Files {
			require.Equal(t, "pack", s.Place)
			recorded[s.Rule] = true
		}
		require.NotEmpty(t, recorded)
		for rule, word := range words {
			require.Equal(t, recorded[rule], strings.Contains(reason, word), "rule %s: %s", rule, reason)
		}
		require.Equal(t, len(recorded) > 1, strings.Contains(reason, "not recorded for one file"), reason)
	}
}

// A policy that puts all layers on HDD is the reason, and so are rules of the operator and what they have moved since.
func whyByHDD(t *testing.T) {
	t.Parallel()
	r := newRig(t, rig.Options{DaemonArgs: hot("--set", "placement.policy=hdd", "--set", "hot.predict=off")})
	_, err := r.PushTiny(soon(t), "app:1", app(2))
	require.NoError(t, err)
	require.NoError(t, r.Pull(soon(t), "app:1"))
	settled(t, r)
	const stored = "when its layer was stored (policy hdd) it went to the pack (as the whole layer: policy hdd puts every layer there); "
	answer := whyPath(t, r, "/data/1/3")
	require.Equal(t, "hdd", answer.File.Tier)
	require.Equal(t, stored+"it is not hot (it is not known to be used)", answer.File.Reason)
	steer(t, r, "profile", "pin", r.Ref("app:1"), "/data/1/3")
	steer(t, r, "profile", "exclude", r.Ref("app:1"), "/data/2/3")
	require.Equal(t, stored+"it is not hot (a rule excludes it)", whyPath(t, r, "/data/2/3").File.Reason)
	steer(t, r, "migrate", "now", "--wait")
	answer = whyPath(t, r, "/data/1/3")
	require.Equal(t, "nvm", answer.File.Tier)
	require.Equal(t, stored+"it was brought to NVM later; it is hot (it is pinned)", answer.File.Reason)
}

func whyByLass(t *testing.T) {
	t.Parallel()
	r := newRig(t, rig.Options{DaemonArgs: lass})
	layers := pullWithLast(t, r, "app:1", app(2), 2)
	require.Equal(t, only(2, 4), tiers(layers))
	settled(t, r)
	why := func(path string) answerOfAPath { return whyPath(t, r, path) }
	const early, last = "when its layer was stored (policy lass) it went to the pack (as the whole layer: it is stored while ",
		"when its layer was stored (policy lass) it went to NVM alone (as the whole layer: no other layer is downloading any more"
	for path, c := range map[string]struct {
		layer  int
		tier   string
		size   int64
		reason string
	}{"/data/0/3": {1, "hdd", 2500, early}, "/data/1/3": {2, "nvm", 2500, last}, "/data/2/3": {3, "hdd", 2500, early}} {
		answer := why(path)
		require.True(t, strings.HasPrefix(answer.File.Reason, c.reason), "%s: %s", path, answer.File.Reason)
		require.Equal(t, c.layer, answer.File.LayerIndex, path)
		require.Equal(t, c.tier, answer.File.Tier, path)
		require.Equal(t, "file", answer.File.Type, path)
		require.Equal(t, c.layer, answer.Layers[0].Index, path)
		if c.size > 0 {
			require.Equal(t, c.size, answer.File.Size, path)
		}
		root := map[string]string{"nvm": r.NVM + "/d", "hdd": r.HDD + "/p"}[c.tier]
		at, offset := answer.File.DataPath, int64(0)
		require.True(t, strings.HasPrefix(at, root+"/"), at)
		if c.tier == "hdd" {
			pack, off, ok := strings.Cut(at, ", at byte ")
			require.True(t, ok, at)
			at = pack
			var err error
			offset, err = strconv.ParseInt(off, 10, 64)
			require.NoError(t, err)
		}
		f, err := os.Open(at)
		require.NoError(t, err)
		sum := sha256.New()
		_, err = io.Copy(sum, io.NewSectionReader(f, offset, answer.File.Size))
		require.NoError(t, errors.Join(err, f.Close()))
		require.Equal(t, fmt.Sprintf("%x  %s", sum.Sum(nil), path), run(t, r, "app:1", "sha256sum", path))
	}
	for path, layer := range map[string]int{"/data/shared": 3, "/etc/passwd": 0} { // small ones
		answer := why(path)
		require.Equal(t, layer, answer.File.LayerIndex, path)
		require.Equal(t, "nvm", answer.File.Tier, path)
		require.Positive(t, answer.File.Size, path)
		require.True(t, strings.HasPrefix(answer.File.DataPath, r.NVM+"/v/"), answer.File.DataPath)
		require.FileExists(t, answer.File.DataPath)
		require.Equal(t, "it has no more than 256 bytes and stands in the metadata", answer.File.Reason, path)
	}
	require.Equal(t, "busybox", why("/bin/ls").File.Target)
	require.Equal(t, "directory", why("/data").File.Type)
	for _, path := range []string{"/none", "/data/shared/none"} {
		_, err := r.Nhybridctl(soon(t), "why", r.Ref("app:1"), path)
		require.ErrorContains(t, err, "no ", path)
		require.NotContains(t, err.Error(), "\n")
	}
}

// Shared bytes are told from an image's own, and all that stands is accounted for.
func TestUsageOfImages(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{DaemonArgs: []string{"--set", "background.write_back=false"}})
	for i, name := range []string{"a:1", "b:1"} {
		spec := app(3)
		spec.Layers = append(spec.Layers, int64(100_000*(i+1)))
		_, err := r.PushTiny(ctx, name, spec)
		require.NoError(t, err)
		require.NoError(t, r.Pull(ctx, name))
	}
	settled(t, r)
	var usage struct {
		Images []struct {
			Name      string
			NVMOwn    int64 `json:"nvm_own"`
			NVMShared int64 `json:"nvm_shared"`
			HDDOwn    int64 `json:"hdd_own"`
			HDDShared int64 `json:"hdd_shared"`
		}
		Tiers []struct {
			Name                           string
			Layers, Views, Parts, Metadata int64
		}
	}
	ctl(t, r, &usage, "du")
	require.Len(t, usage.Images, 2)
	var own, shared int64
	for _, i := range usage.Images {
		mine := i.NVMOwn + i.HDDOwn
		require.GreaterOrEqual(t, mine, int64(100_000), i.Name)
		require.Less(t, mine, int64(300_000), i.Name)
		own += mine
		shared = i.NVMShared + i.HDDShared
	}
	require.Equal(t, usage.Images[0].NVMShared+usage.Images[0].HDDShared, shared, "they share the same")
	require.Greater(t, shared, int64(3*2*half))
	require.InDelta(t, own+shared, usage.Tiers[0].Layers+usage.Tiers[1].Layers, 4096)
	var status struct {
		Tiers []struct {
			Name string
			Used int64
		}
	}
	ctl(t, r, &status, "status")
	for i, tier := range usage.Tiers {
		require.Positive(t, tier.Metadata, "the database, or its copy")
		require.Equal(t, tier.Name, status.Tiers[i].Name)
		require.Equal(t, tier.Layers+tier.Views+tier.Parts+tier.Metadata, status.Tiers[i].Used, "all of it on %s", tier.Name)
	}
	require.Positive(t, usage.Tiers[0].Views+usage.Tiers[1].Views)
}
