// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package placement

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"math/rand"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestOnePassByHand follows a small pull: 2 downloads share 10 MB/s, 2 cores unpack 100 MB/s each.
func TestOnePassByHand(t *testing.T) {
	layers := []ImageLayer{{Digest: "a", Compressed: 10 * mb, Uncompressed: 30 * mb}, {Digest: "b", Compressed: 30 * mb, Uncompressed: 60 * mb}}
	fast := Options{Bandwidth: 10 * mb, Concurrent: 2, Unpacks: 2, Unpack: 100 * mb, Cores: 2, NVMWrite: 1e12, HDDWrite: 50 * mb, Commit: 1, BlobCommit: 0.5}
	slow, shared := fast, fast
	slow.HDDWrite, shared.HDDWrite, shared.ContentOnHDD = 10*mb, 10*mb, true
	for _, tc := range []struct {
		name, policy      string
		o                 Options
		returned, durable float64
		nvm               int64
	}{
		// a has come at 2 s, unpacked on the way, is in the content store at 2.5 and committed at 3.5 s; b at 4, 4.5, 5.5 s.
		{"the disk keeps up", "hdd", fast, 5.5, 5.5, 0},
		{"and so drain has no need of NVM", "drain", fast, 5.5, 5.5, 0},
		{"90 MB at 10 MB/s", "hdd", slow, 5.5, 9, 0},
		{"all on NVM", "nvm", slow, 5.5, 5.5, 90 * mb},
		// At 2 s the disk has taken 20 of 70 MB: a is on it at 7, in the content store at 7.5. At 4 s it has 40 of 130.
		{"blobs on the same disk", "hdd", shared, 14.5, 14.5, 0},
		// a is unpacked from 2 to 2.3 s while b downloads, b from 4 to 4.6 s.
		{"lass", "lass", slow, 5.6, 5.6, 60 * mb},
		{"boundary", "boundary=1", slow, 5.5, 5.5, 60 * mb},
	} {
		tc.o.Policy = tc.policy
		p, err := Predict(layers, tc.o)
		require.NoError(t, err)
		assert.InDelta(t, 4, p.Downloaded, 1e-6, tc.name)
		assert.InDelta(t, tc.returned, p.Returned, 1e-6, tc.name)
		assert.InDelta(t, tc.durable, p.Durable, 1e-6, tc.name)
		assert.Equal(t, tc.nvm, p.NVMBytes, tc.name)
		assert.Equal(t, p.NVMBytes, p.HoleBytes, tc.name)
		assert.Equal(t, int64(90*mb), p.Bytes)
		assert.Equal(t, 1, p.LDL)
	}

	// drain uses the slow disk for as long as it can: of 90 MB it takes what 10 MB/s can write until 5 s, 4 of the download and 1 of
	// the commit.
	slow.Policy = "drain"
	p, err := Predict(layers, slow)
	require.NoError(t, err)
	assert.InDelta(t, 5.5, p.Durable, 0.02)
	assert.InDelta(t, 40*mb, p.NVMBytes, 3*mb)
	assert.InDelta(t, 4.0/9, 1-p.NVMSaved(), 0.04)

	// A third of the files is hot: NVM has it beside the pack, and the disk keeps up.
	fast.Policy, fast.Hot = "drain", 1.0/3
	p, err = Predict(layers, fast)
	require.NoError(t, err)
	assert.InDelta(t, 30*mb, p.NVMBytes, 0.2*mb)
	assert.Zero(t, p.HoleBytes)
	assert.InDelta(t, 5.5, p.Durable, 1e-6)

	// One core makes 15 MB/s of the 25 that arrive, so it is never idle: 90 MB take 6 s.
	fast.Hot, fast.Cores, fast.Unpack = 0, 1, 15*mb
	p, err = Predict(layers, fast)
	require.NoError(t, err)
	assert.InDelta(t, 7, p.Returned, 1e-6)
}

func TestOnePassSharesBlobs(t *testing.T) {
	a := ImageLayer{Digest: "a", Compressed: 10 * mb, Uncompressed: 30 * mb}
	p, err := Predict([]ImageLayer{a, {Compressed: mb}, a, {}}, Options{Policy: "nvm", Bandwidth: 10 * mb, Commit: 0, NVMWrite: 1e12})
	require.NoError(t, err)
	assert.Equal(t, int64(30*mb), p.NVMBytes, "a layer is stored once")
	assert.InDelta(t, 1.1, p.Downloaded, 1e-6)
}

func randomPull(r *rand.Rand) ([]ImageLayer, Options) {
	var layers []ImageLayer
	for range 1 + r.Intn(10) {
		c := int64(1) << r.Intn(27)
		c += r.Int63n(c)
		layers = append(layers, ImageLayer{Digest: fmt.Sprint(r.Intn(30)), Compressed: c, Uncompressed: c + r.Int63n(4*c)})
	}
	log := func() float64 { return 1e6 * float64(int64(1)<<r.Intn(10)) }
	return layers, Options{Bandwidth: log(), Unpack: log(), HDDWrite: log(), NVMWrite: 1e15, Concurrent: 1 + r.Intn(5), Unpacks: 1 + r.Intn(5),
		Cores: float64(1+r.Intn(8)) / 2, Commit: r.Float64() * float64(r.Intn(2)), BlobCommit: r.Float64() * float64(r.Intn(2))}
}

// The promises of drain over random images and hardware: where the disk is its own, a pull is durable as early as with all on NVM, but
// for the files that the unpackers have in hand at its end; and it never takes more NVM than there is.
func TestOnePassDrainIsNeverLate(t *testing.T) {
	r := rand.New(rand.NewSource(5))
	saved := 0
	for range 150 {
		layers, o := randomPull(r)
		predict := func(policy string) Prediction {
			o.Policy = policy
			p, err := Predict(layers, o)
			require.NoError(t, err)
			require.GreaterOrEqual(t, p.Durable, p.Returned)
			require.GreaterOrEqual(t, p.Returned, p.Downloaded)
			return p
		}
		drain, nvm, hdd := predict("drain"), predict("nvm"), predict("hdd")
		file := float64(max(leastFile, drain.Bytes/filesPerPull))
		require.LessOrEqual(t, drain.Durable, nvm.Durable+float64(o.Unpacks)*file/o.HDDWrite+1e-6, "%+v %+v", layers, o)
		require.InDelta(t, nvm.Returned, drain.Returned, 1e-6, "where nothing waits for the disk, the place of files is of no account to containerd")
		require.LessOrEqual(t, nvm.Durable, hdd.Durable+1e-6)
		require.Equal(t, nvm.Bytes, nvm.NVMBytes)
		require.Zero(t, hdd.NVMBytes)
		if drain.NVMBytes < nvm.NVMBytes {
			saved++
		}
		bound := max(float64(nvm.Bytes)/(o.Unpack*o.Cores), nvm.Downloaded)
		require.GreaterOrEqual(t, nvm.Returned, bound-1e-6)
		require.GreaterOrEqual(t, hdd.Durable, float64(hdd.Bytes)/o.HDDWrite-1e-6)

		o.NVMSize = 1 + r.Int63n(nvm.Bytes)
		o.Hot = float64(r.Intn(3)) / 2
		o.ContentOnHDD = r.Intn(2) == 0
		for _, policy := range []string{"drain", "nvm", "lass"} {
			require.LessOrEqual(t, predict(policy).NVMBytes, o.NVMSize, policy)
		}
	}
	assert.Greater(t, saved, 75, "and it saves NVM")
}

// Storing layers while they download is never later than storing them after.
func TestOnePassIsNoLaterThanUnpackingAfterwards(t *testing.T) {
	r := rand.New(rand.NewSource(6))
	earlier := 0
	for range 150 {
		layers, o := randomPull(r)
		o.Commit, o.BlobCommit, o.Cores, o.Policy = 0, 0, float64(o.Unpacks), "nvm"
		p, err := Predict(layers, o)
		require.NoError(t, err)
		rep, err := Simulate([]Image{{Name: "x", Layers: layers}}, o)
		require.NoError(t, err)
		require.LessOrEqual(t, p.Durable, rep.Images[0].TTotal["nvm"]*(1+1e-9)+1e-6, "%+v %+v", layers, o)
		if p.Durable < 0.9*rep.Images[0].TTotal["nvm"] {
			earlier++
		}
	}
	assert.Greater(t, earlier, 40)
}

// TestOnePassHub holds the figures that docs/placement.md states.
func TestOnePassHub(t *testing.T) {
	images := readHub(t)
	for name, tc := range map[string]struct {
		onHDD                 bool
		saved, lassSaved      float64 // per cent
		drain, lass, nvm, hdd float64 // seconds
	}{
		"blobs elsewhere":  {false, 73.2, 39.5, 2.35, 3.49, 2.35, 3.30},
		"blobs on the HDD": {true, 38.4, 48.9, 2.48, 3.99, 2.35, 4.71},
	} {
		rep, err := SimulateOnePass(images, Options{Bandwidth: 125e6, ContentOnHDD: tc.onHDD, Commit: 0.05, BlobCommit: 0.05})
		require.NoError(t, err)
		all := rep.All
		assert.Equal(t, 142, all.Images)
		assert.InDelta(t, tc.saved, 100*all.NVMSaved["drain"], 0.05, name)
		assert.InDelta(t, tc.lassSaved, 100*all.NVMSaved["lass"], 0.05, name)
		for policy, want := range map[string]float64{"drain": tc.drain, "lass": tc.lass, "nvm": tc.nvm, "hdd": tc.hdd} {
			assert.InDelta(t, want, all.TTotal[policy], 0.005, "%s %s", name, policy)
		}
		if !tc.onHDD {
			for _, i := range rep.Images {
				file := float64(max(leastFile, i.Uncompressed/filesPerPull))
				assert.LessOrEqual(t, i.TTotal["drain"], i.TTotal["nvm"]+3*file/rep.Options.HDDWrite+1e-6, i.Name)
			}
		}
	}
}

// The daemon places files by what it takes rates for. How long things last follows from what they are.
func TestTakenRatesPlaceFiles(t *testing.T) {
	layers := []ImageLayer{{Digest: "a", Compressed: 100 * mb, Uncompressed: 300 * mb}}
	o := Options{Bandwidth: 100 * mb, Unpack: 150 * mb, Cores: 2, HDDWrite: 100 * mb, Policy: "drain"}
	predict := func(taken Taken) Prediction {
		o.Taken = taken
		p, err := Predict(layers, o)
		require.NoError(t, err)
		return p
	}
	exact := predict(Taken{})
	assert.Equal(t, exact, predict(Taken{HDDWrite: o.HDDWrite, Unpack: 2 * o.Unpack}), "with the true rates nothing changes")
	assert.Positive(t, exact.NVMBytes)
	assert.Less(t, predict(Taken{HDDWrite: 10000 * mb}).NVMBytes, exact.NVMBytes/10, "the disk seems to be in time until the end")
	assert.Greater(t, predict(Taken{HDDWrite: 50 * mb}).NVMBytes, exact.NVMBytes)
	assert.Less(t, predict(Taken{Unpack: mb}).NVMBytes, exact.NVMBytes/10, "the pull seems to be long")
	assert.Zero(t, predict(Taken{Commit: 100}).NVMBytes)
	o.Taken = Taken{Commit: -1}
	_, err := Predict(layers, o)
	assert.True(t, errdefs.IsInvalidArgument(err))
}

// A report of the one-pass model has the form of the paper's: images, categories and all, each with nvm_saved.
func TestOnePassReport(t *testing.T) {
	images := []Image{
		{Category: "c", Name: "empty", Layers: []ImageLayer{{}}},
		{Category: "d", Name: "twins", Layers: []ImageLayer{{Digest: "a", Compressed: mb, Uncompressed: 3 * mb}, {Digest: "a", Compressed: mb, Uncompressed: 3 * mb}}},
	}
	rep, err := SimulateOnePass(images, Options{Policy: "boundary=1"})
	require.NoError(t, err)
	assert.Equal(t, []string{"drain", "lass", "nvm", "hdd", "boundary=1"}, rep.Policies)
	assert.Equal(t, int64(mb), rep.Images[1].Compressed)
	assert.Equal(t, int64(3*mb), rep.Images[1].Uncompressed)
	assert.InDelta(t, 3*mb/2, rep.All.UTotal["nvm"], 1)
	assert.Zero(t, rep.All.UTotal["hdd"])
	b, err := json.Marshal(rep)
	require.NoError(t, err)
	type group struct {
		Name     string             `json:"name"`
		Images   int                `json:"images"`
		NVMSaved map[string]float64 `json:"nvm_saved"`
	}
	var got struct {
		Images, Categories []group
		All                group
	}
	require.NoError(t, json.Unmarshal(b, &got))
	require.Len(t, got.Images, 2)
	require.Len(t, got.Categories, 2)
	assert.Equal(t, "all", got.All.Name)
	assert.Equal(t, 2, got.All.Images)
	assert.Contains(t, got.All.NVMSaved, "boundary=1")

	var out bytes.Buffer
	require.NoError(t, rep.WriteTable(&out, true))
	assert.Contains(t, out.String(), "twins")

	_, err = SimulateOnePass([]Image{{Name: "x"}}, Options{})
	assert.True(t, errdefs.IsInvalidArgument(err))
	_, err = SimulateOnePass(images, Options{Hot: 2})
	assert.True(t, errdefs.IsInvalidArgument(err))
}

// Rounding must not make events that bring nothing forward: each pull ends, after a bounded number of them.
func TestOnePassEnds(t *testing.T) {
	r := rand.New(rand.NewSource(9))
	size := func() int64 { return []int64{0, 1, 5, 1000, 1 << 20, 1e15, r.Int63n(1e15), r.Int63n(1e9)}[r.Intn(8)] }
	for range 30 {
		_, o := randomPull(r)
		o, err := o.complete()
		require.NoError(t, err)
		o.ContentOnHDD = r.Intn(2) == 0
		var layers []ImageLayer
		for range 1 + r.Intn(30) {
			layers = append(layers, ImageLayer{Digest: fmt.Sprint(r.Intn(60)), Compressed: size(), Uncompressed: size()})
		}
		for _, policy := range []string{"drain", "lass", "nvm", "hdd"} {
			s := newPass(layers, o, mustPolicy(policy))
			steps := 0
			for s.settle(); s.step(); s.settle() {
				steps++
				require.Less(t, steps, 10*filesPerPull, "%+v %+v", layers, o)
			}
			require.Equal(t, len(layers), s.committed, "%+v %+v", layers, o)
		}
	}
}

func TestPredictRefuses(t *testing.T) {
	ok := []ImageLayer{{Compressed: 1, Uncompressed: 1}}
	for name, o := range map[string]Options{"cores": {Cores: -1}, "commit of a layer": {Commit: -1}, "commit of a blob": {BlobCommit: math.NaN()},
		"hot": {Hot: 1.1}, "choose one of": {Policy: "best"}} {
		_, err := Predict(ok, o)
		assert.ErrorContains(t, err, name)
		assert.True(t, errdefs.IsInvalidArgument(err))
	}
	for _, layers := range [][]ImageLayer{nil, {{Compressed: -1}}, {{Compressed: 1, Uncompressed: math.MaxInt64}}} {
		_, err := Predict(layers, Options{})
		assert.True(t, errdefs.IsInvalidArgument(err), layers)
	}
}
