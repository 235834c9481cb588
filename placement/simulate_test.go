// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package placement

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestHubFigures checks the simulator against figures that were computed from the same table by other means. They hold for
// compressed bytes, both for finding the largest layer and for weighing.
func TestHubFigures(t *testing.T) {
	rep, err := Simulate(readHub(t), Options{})
	require.NoError(t, err)

	want := map[string]struct {
		images int
		saved  float64 // per cent
	}{
		"distro": {18, 0.0}, "database": {19, 23.5}, "language": {32, 34.7}, "web server": {15, 13.9}, "web fwk": {5, 38.7}, "others": {53, 24.55},
	}
	require.Len(t, rep.Categories, len(want))
	for _, c := range rep.Categories {
		assert.Equal(t, want[c.Name].images, c.Images, c.Name)
		assert.InDelta(t, want[c.Name].saved, 100*c.NVMSaved.Largest, 0.05, c.Name)
	}
	assert.Equal(t, 142, rep.All.Images)
	assert.InDelta(t, 23.0, 100*rep.All.NVMSaved.Largest, 0.05)
	assert.InDelta(t, 32.4, 100*rep.All.NVMSavedPooled["largest3"], 0.05)
	assert.InDelta(t, 25.7, 100*rep.All.NVMSavedCompressed["strategy3"], 0.05, "three at a time, fair share, the last to finish")
}

func TestHubBehaviour(t *testing.T) {
	images := readHub(t)
	for _, o := range []Options{{}, {Bandwidth: 125e6}, {Bandwidth: 125e6, Unpack: 1e9}, {NVMSize: 200 * mb}, {Concurrent: 1}} {
		rep, err := Simulate(images, o)
		require.NoError(t, err)
		for _, i := range rep.Images {
			name := fmt.Sprintf("%s with %+v", i.Name, o)
			eps := 1e-6 * i.TTotal["hdd"]
			if o.NVMSize == 0 {
				assert.Zero(t, i.UTotal["hdd"]+i.NVMSavedStored["nvm"], name)
				assert.LessOrEqual(t, i.TTotal["drain"], i.TTotal["nvm"]+eps, "drain is as early as all on NVM: %s", name)
				assert.LessOrEqual(t, i.TTotal["drain_parallel"], i.TTotal["nvm_parallel"]+eps, "and in parallel: %s", name)
				assert.GreaterOrEqual(t, i.TTotal["sequential"], i.TTotal["nvm"]-eps, name)
			} else {
				for _, key := range []string{"nvm", "sequential", "parallel", "drain"} {
					assert.LessOrEqual(t, i.UTotal[key], float64(o.NVMSize), "%s %s", key, name)
				}
			}
			assert.LessOrEqual(t, i.TTotal["sequential"], i.TTotal["hdd"]+eps, name)
			assert.LessOrEqual(t, i.TReturned["parallel"], i.TReturned["sequential"]+eps, name)
			assert.GreaterOrEqual(t, i.TTotal["drain"], i.TReturned["drain"]-eps, name)
			assert.InDelta(t, 0, float64(i.Compressed)/rep.Options.Bandwidth-i.TTotal["strategy3"], i.TTotal["strategy3"], name)
			assert.Len(t, i.Tiers["parallel"], i.Layers)
		}
	}
}

// TestLateBindingIsStrategy3: where unpacking takes no time, late binding finds the paper's boundary without guessing it, and
// what LDL estimates at the start is what the link then does.
func TestLateBindingIsStrategy3(t *testing.T) {
	images := readHub(t)
	rep, err := Simulate(images, Options{Unpack: 1e18, NVMWrite: 1e18, HDDWrite: 1e18})
	require.NoError(t, err)
	for n, i := range rep.Images {
		assert.Equal(t, strings.Repeat("H", i.LDL)+strings.Repeat("N", i.Layers-i.LDL), i.Tiers["sequential"], i.Name)
		assert.InDelta(t, i.NVMSavedStored["strategy3"], i.NVMSavedStored["sequential"], 1e-9, i.Name)
		assert.GreaterOrEqual(t, i.NVMSaved.Parallel, i.NVMSaved.Sequential, i.Name)

		in := Input{Concurrency: 3}
		for _, l := range images[n].Layers {
			in.Layers = append(in.Layers, Layer{Digest: l.Digest, Compressed: l.Compressed})
		}
		assert.Equal(t, i.LDL, LDL(in), i.Name)
	}
}

// TestDrainIsNeverLate is the promise of drain over random images and hardware: no pull is durable later than with all on NVM.
func TestDrainIsNeverLate(t *testing.T) {
	r := rand.New(rand.NewSource(3))
	saved := 0
	for n := range 3000 {
		img := Image{Name: fmt.Sprint(n)}
		for range 1 + r.Intn(12) {
			c := int64(1) << r.Intn(28)
			c += r.Int63n(c)
			img.Layers = append(img.Layers, ImageLayer{Digest: fmt.Sprint(r.Intn(30)), Compressed: c, Uncompressed: c + r.Int63n(4*c)})
		}
		log := func() float64 { return 1e6 * float64(int64(1)<<r.Intn(10)) }
		// An NVM that takes no part in it: a slow one would make all on NVM late, and with it the measure.
		rep, err := Simulate([]Image{img}, Options{Bandwidth: log(), Unpack: log(), HDDWrite: log(), NVMWrite: 1e15, Concurrent: 1 + r.Intn(5), Unpacks: 1 + r.Intn(4)})
		require.NoError(t, err)
		i := rep.Images[0]
		if i.NVMSaved.Drain > 0 {
			saved++
		}
		for _, suffix := range []string{"", "_parallel"} {
			require.LessOrEqual(t, i.TTotal["drain"+suffix], i.TTotal["nvm"+suffix]*(1+1e-9)+1e-6, "%+v %+v", img, rep.Options)
		}
	}
	assert.Greater(t, saved, 500, "and it saves NVM")
}

// TestReplayByHand follows one small pull: 2 downloads at a time of 10 B/s, unpack 100 B/s, disk 50 B/s.
func TestReplayByHand(t *testing.T) {
	img := Image{Name: "x", Layers: []ImageLayer{{Digest: "a", Compressed: 10, Uncompressed: 100}, {Digest: "b", Compressed: 30, Uncompressed: 200}, {Digest: "c", Compressed: 10, Uncompressed: 100}, {Digest: "a", Compressed: 10, Uncompressed: 100}}}
	rep, err := Simulate([]Image{img}, Options{Bandwidth: 10, Concurrent: 2, Unpack: 100, NVMWrite: 1000, HDDWrite: 50})
	require.NoError(t, err)
	i := rep.Images[0]
	// a and b at 5 B/s each: a at 2 s; b and c: c at 4 s; b alone has 10 left of 30: 5 s. The fourth layer is a again.
	assert.Equal(t, 1, i.LDL)
	assert.Equal(t, 1, i.Largest)
	assert.Equal(t, "HNNN", i.Tiers["sequential"])
	// a is unpacked at 3 s and on the disk at 5 s; b, c, a after 5 s need 2+1+1 s.
	assert.InDelta(t, 9, i.TReturned["sequential"], 1e-9)
	assert.InDelta(t, 9, i.TTotal["sequential"], 1e-9)
	// Three slots: a 2-3 s, its twin takes the slot at 3 s; c 4-5 s; b 5-7 s. Disk: 100 B from 3 s, 100 from 5, 100 from 7.
	assert.Equal(t, "HNHH", i.Tiers["parallel"])
	assert.InDelta(t, 7, i.TReturned["parallel"], 1e-9)
	assert.InDelta(t, 9, i.TTotal["parallel"], 1e-9)
	// All on the disk: in order from 3 s; b is there at 7 s, so 7 + (200+100+100)/50.
	assert.InDelta(t, 15, i.TTotal["hdd"], 1e-9)
	assert.InDelta(t, 9, i.TReturned["hdd"], 1e-9)
}

func TestReportJSON(t *testing.T) {
	rep, err := Simulate([]Image{{Category: "c", Name: "empty", Layers: []ImageLayer{{}}}}, Options{Policy: "boundary=1"})
	require.NoError(t, err)
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
	zero := map[string]float64{"largest": 0, "sequential": 0, "parallel": 0, "drain": 0}
	assert.Equal(t, []group{{"empty", 1, zero}}, got.Images)
	assert.Equal(t, []group{{"c", 1, zero}}, got.Categories)
	assert.Equal(t, group{"all", 1, zero}, got.All)

	var out bytes.Buffer
	require.NoError(t, rep.WriteTable(&out, true))
	assert.Contains(t, out.String(), "empty")
}

func TestSimulateRefuses(t *testing.T) {
	ok := []Image{{Name: "x", Layers: []ImageLayer{{Compressed: 1, Uncompressed: 1}}}}
	for name, o := range map[string]Options{"bandwidth": {Bandwidth: -1}, "negative": {Concurrent: -1}, "choose one of": {Policy: "best"}, "HDD": {HDDWrite: -5}} {
		_, err := Simulate(ok, o)
		assert.ErrorContains(t, err, name)
		assert.True(t, errdefs.IsInvalidArgument(err))
	}
	_, err := Simulate([]Image{{Name: "x"}}, Options{})
	assert.True(t, errdefs.IsInvalidArgument(err))
}
