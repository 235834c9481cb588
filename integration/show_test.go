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

// Where a file of an image comes from, and where its bytes are.
func TestWhyOfAPath(t *testing.T) {
	t.Parallel()
	r := newRig(t, rig.Options{DaemonArgs: lass})
	layers := pullWithLast(t, r, "app:1", app(2), 2)
	require.Equal(t, only(2, 4), tiers(layers))
	settled(t, r)
	why := func(path string) (answer struct {
		Layers []layer
		File   struct {
			Path, Type, Tier, Target string
			Size                     int64
			LayerIndex               int    `json:"layer_index"`
			DataPath                 string `json:"data_path"`
		}
	}) {
		ctl(t, r, &answer, "why", r.Ref("app:1"), path)
		return answer
	}
	for path, c := range map[string]struct {
		layer int
		tier  string
		size  int64
	}{"/data/0/3": {1, "hdd", 2500}, "/data/1/3": {2, "nvm", 2500}, "/data/2/3": {3, "hdd", 2500}} {
		answer := why(path)
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
