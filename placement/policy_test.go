// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package placement

import (
	"encoding/json"
	"math/rand"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const mb = 1000 * 1000

func parse(t testing.TB, name string) Policy {
	t.Helper()
	p, err := ParsePolicy(name)
	require.NoError(t, err)
	return p
}

// world is an image of five layers with room for everything, of which the layers named in here have arrived.
func world(index int, here ...int) Input {
	in := Input{Index: index, NVMFree: 100e9, HDDRate: 100 * mb, Bandwidth: 10 * mb, UnpackRate: 200 * mb, Concurrency: 3, Sequential: true}
	for i, c := range []int64{10, 40, 80, 20, 1} {
		l := Layer{Digest: string(rune('a' + i)), Compressed: c * mb}
		for _, h := range here {
			if h == i {
				l.Downloaded, l.Offset, l.Uncompressed, l.Exact = true, l.Compressed, 3*l.Compressed, true
			}
		}
		in.Layers = append(in.Layers, l)
	}
	return in
}

func TestParsePolicy(t *testing.T) {
	for _, name := range []string{"lass", "drain", "nvm", "hdd", "boundary=0", "boundary=12"} {
		assert.Equal(t, name, parse(t, name).Name())
	}
	for _, name := range []string{"", "LASS", "boundary", "boundary=", "boundary=-1", "boundary=x", "boundary=99999999"} {
		_, err := ParsePolicy(name)
		require.Error(t, err, name)
		assert.True(t, errdefs.IsInvalidArgument(err), name)
	}
	_, err := ParsePolicy("fast")
	for _, choice := range PolicyNames {
		assert.ErrorContains(t, err, choice)
	}
}

func TestLASS(t *testing.T) {
	late := func(i int) func(*Input) {
		return func(in *Input) { in.Layers[i].Arrived = time.Unix(int64(100+i), 0) }
	}
	for _, tc := range []struct {
		name   string
		in     Input
		change func(*Input)
		want   Tier
		ldl    int
		reason string
	}{
		{name: "others download", in: world(0, 0), want: HDD, ldl: 2, reason: "4 other layers still download, 141 MB to go"},
		{name: "one other downloads", in: world(3, 0, 1, 3, 4), change: func(in *Input) { in.Sequential = false }, want: HDD, ldl: 2, reason: "1 other layer still downloads, 80.0 MB to go"},
		{name: "the last one", in: world(2, 0, 1, 2, 3, 4), change: late(2), want: NVM, ldl: 2, reason: "it is the last to download"},
		{name: "above the last one", in: world(4, 0, 1, 2, 3, 4), change: late(2), want: NVM, ldl: 2, reason: "layer 2 was the last to download"},
		{name: "all were there", in: world(0, 0, 1, 2, 3, 4), want: NVM, ldl: -1, reason: "all layers were there before the pull"},
		{name: "asked before its own blob is there", in: world(2, 0, 1, 3, 4), want: NVM, ldl: 2, reason: "it is the last to download"},
		{name: "sequential: those below are stored, downloaded or not", in: world(3, 3, 4), want: NVM, ldl: -1},
		{name: "parallel: those below count", in: world(3, 3, 4), change: func(in *Input) { in.Sequential = false }, want: HDD, ldl: 2},
		{name: "a layer that is stored is never downloaded", in: world(3, 3, 4), change: func(in *Input) {
			in.Sequential = false
			for i := range 3 {
				in.Layers[i].Stored = true
			}
		}, want: NVM, ldl: -1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.change != nil {
				tc.change(&tc.in)
			}
			d := parse(t, "lass").Decide(tc.in)
			assert.Equal(t, tc.want, d.Tier, d.Reason)
			assert.Equal(t, tc.ldl, d.LDL)
			assert.Contains(t, d.Reason, tc.reason)
			assert.True(t, d.Admitted)
		})
	}
}

func TestDrain(t *testing.T) {
	drain := parse(t, "drain")

	// Layer 0 is 30 MB: written after 0.15 s, on the disk 0.3 s later. 141 MB at 10 MB/s need 14.1 s.
	d := drain.Decide(world(0, 0))
	assert.Equal(t, HDD, d.Tier)
	assert.Contains(t, d.Reason, "the disk has it in 0.45 s (30.0 MB to write at 100 MB/s)")
	assert.Contains(t, d.Reason, "at best")

	// The same with a disk that is 2 GB behind: 0.15 + 20.3 s.
	in := world(0, 0)
	in.HDDBacklog = 2000 * mb
	d = drain.Decide(in)
	assert.Equal(t, NVM, d.Tier, d.Reason)
	assert.Contains(t, d.Reason, "20 s only (2.03 GB to write")

	// What other layers of the image are writing to HDD counts too.
	in = world(0, 0, 4)
	in.Sequential = false
	in.Layers[4].Storing, in.Layers[4].Uncompressed = true, 2000*mb
	assert.Equal(t, NVM, drain.Decide(in).Tier)
	in.Layers[4].Tier = NVM
	assert.Equal(t, HDD, drain.Decide(in).Tier)

	// Nothing downloads, but unpacking what is above takes longer than the disk: (120+240+60+3)/200 = 2.1 s against 0.6 + 1.2 s.
	assert.Equal(t, HDD, drain.Decide(world(1, 0, 1, 2, 3, 4)).Tier)
	// And here it does not: (240+60+3)/200 = 1.5 s against 1.2 + 2.4 s.
	assert.Equal(t, NVM, drain.Decide(world(2, 0, 1, 2, 3, 4)).Tier)

	for name, forget := range map[string]func(*Input){
		"the rate of the HDD":   func(in *Input) { in.HDDRate = 0 },
		"the rate of unpacking": func(in *Input) { in.UnpackRate = 0 },
		"the bandwidth":         func(in *Input) { in.Bandwidth = 0 },
	} {
		in := world(0, 0)
		forget(&in)
		d := drain.Decide(in)
		assert.Equal(t, HDD, d.Tier)
		assert.Contains(t, d.Reason, name+" is not known yet, so by lass")
	}
	in = world(2, 0, 1, 2, 3, 4)
	in.Bandwidth = 0
	assert.NotContains(t, drain.Decide(in).Reason, "not known", "nothing downloads: no bandwidth is needed")
}

func TestRestOfPull(t *testing.T) {
	in := world(0, 0) // pending: 40, 80, 20, 1 MB at 10 MB/s; their least sizes unpack at 200 MB/s
	// up to 1: 4 + 141/200; up to 2: 12 + 101/200; up to 3: 14 + 21/200; up to 4: 14.1 + 1/200
	assert.InDelta(t, 14.105, restOfPull(in), 1e-9)
	in.UnpackRate = 1 * mb // now: 4+141, 12+101, 14+21, 14.1+1; and Σ = 30+141
	assert.InDelta(t, 171, restOfPull(in), 1e-9)
	in.Sequential = false // by size: 80: 8+80; 40: 12+40; 20: 14+20; 1: 14.1+1; and the largest layer, 80
	assert.InDelta(t, 88, restOfPull(in), 1e-9)
	in.Layers[2].Storing = true // it may be nearly written, so 4+40, 6+20, 6.1+1
	assert.InDelta(t, 44, restOfPull(in), 1e-9)
}

func TestAdmission(t *testing.T) {
	in := world(2, 0, 1, 2, 3, 4)
	need := Footprint(240 * mb)
	in.NVMFree, in.NVMReserve = need+1000, 1000
	for _, name := range []string{"lass", "nvm", "boundary=1"} {
		d := parse(t, name).Decide(in)
		assert.Equal(t, NVM, d.Tier, name)
		assert.True(t, d.Admitted)
	}
	tight := map[string]func(*Input){
		"one byte short":      func(in *Input) { in.NVMFree-- },
		"reserve":             func(in *Input) { in.NVMReserve++ },
		"other pulls":         func(in *Input) { in.NVMPromised = 1 },
		"layer being written": func(in *Input) { in.Layers[4].Storing, in.Layers[4].Tier = true, NVM },
		"no NVM at all":       func(in *Input) { in.NVMFree = 0 },
		"unknown size is taken to be large": func(in *Input) {
			in.Layers[2].Uncompressed, in.Layers[2].Exact = 0, false
		},
	}
	for name, change := range tight {
		t.Run(name, func(t *testing.T) {
			in := in
			in.Layers = append([]Layer(nil), in.Layers...)
			change(&in)
			for _, policy := range []string{"lass", "nvm", "boundary=1"} {
				d := parse(t, policy).Decide(in)
				assert.Equal(t, HDD, d.Tier, policy)
				assert.False(t, d.Admitted)
				assert.Contains(t, d.Reason, "layer 2 to HDD: it would go to NVM")
			}
			d := parse(t, "hdd").Decide(in)
			assert.True(t, d.Admitted, "a policy that does not want NVM is not refused it")
		})
	}
}

func TestBoundary(t *testing.T) {
	for i := range 5 {
		d := parse(t, "boundary=3").Decide(world(i, 0))
		assert.Equal(t, i >= 3, d.Tier == NVM, i)
	}
}

// TestDecideAnything feeds all policies with nonsense: no panic, and a sentence.
func TestDecideAnything(t *testing.T) {
	r := rand.New(rand.NewSource(1))
	number := func() int64 { return []int64{0, -1, 1, 1000, 1 << 40, 1<<63 - 1, -1 << 63}[r.Intn(7)] }
	rate := func() float64 { return []float64{0, -1, 1, 1e9}[r.Intn(4)] }
	for range 20000 {
		in := Input{Index: r.Intn(8) - 2, NVMFree: number(), NVMReserve: number(), NVMPromised: number(), HDDBacklog: number(), HDDRate: rate(),
			Bandwidth: rate(), UnpackRate: rate(), Concurrency: r.Intn(5) - 1, Sequential: r.Intn(2) == 0}
		for range r.Intn(5) {
			in.Layers = append(in.Layers, Layer{Digest: string(rune('a' + r.Intn(3))), Compressed: number(), Uncompressed: number(), Exact: r.Intn(2) == 0,
				Offset: number(), Downloaded: r.Intn(2) == 0, Storing: r.Intn(2) == 0, Stored: r.Intn(2) == 0, Tier: Tier(r.Intn(2))})
		}
		for _, name := range []string{"lass", "drain", "nvm", "hdd", "boundary=2"} {
			d := parse(t, name).Decide(in)
			require.NotEmpty(t, d.Reason)
			if in.Index < 0 || in.Index >= len(in.Layers) {
				require.Equal(t, HDD, d.Tier)
			}
		}
	}
}

func TestDecisionJSON(t *testing.T) {
	in := world(2, 0, 1, 2)
	in.Layers[2].Arrived = time.Unix(1, 0).UTC()
	d := parse(t, "drain").Decide(in)
	b, err := json.Marshal(d)
	require.NoError(t, err)
	var back Decision
	require.NoError(t, json.Unmarshal(b, &back))
	assert.Equal(t, d, back)
	for _, key := range []string{`"tier":"`, `"ldl":`, `"nvm_free":`, `"hdd_backlog":`, `"unpack_rate":`, `"arrived":"1970`} {
		assert.Contains(t, string(b), key)
	}
	assert.Equal(t, 1, strings.Count(string(b), "arrived"), "a time that is not known is left out")
	assert.Error(t, json.Unmarshal([]byte(`{"tier":"ssd"}`), &back))
	_, err = Tier(7).MarshalText()
	assert.Error(t, err)
}

func TestLDLShares(t *testing.T) {
	in := Input{Concurrency: 3, Layers: []Layer{{Digest: "a", Compressed: 100}, {Digest: "b", Compressed: 10}, {Digest: "c", Compressed: 10}, {Digest: "d", Compressed: 95}}}
	// Three at a time: b and c end when a lacks 90; then a and d share, and d has 95 to go.
	assert.Equal(t, 3, LDL(in))
	in.Concurrency = 0 // all at once: a is the largest
	assert.Equal(t, 0, LDL(in))
	in.Layers[0].Offset = 50
	assert.Equal(t, 3, LDL(in))
	in.Layers[3].Digest = "a" // the same blob as layer 0: it comes with it
	assert.Equal(t, 0, LDL(in))
}

// Where containerd's blobs share the disk, what still downloads has to be written there too.
func TestDrainCountsBlobsOnTheSameDisk(t *testing.T) {
	p, err := ParsePolicy("drain")
	require.NoError(t, err)
	in := Input{
		Layers: []Layer{
			{Digest: "a", Compressed: 50e6, Uncompressed: 100e6, Exact: true, Downloaded: true},
			{Digest: "b", Compressed: 100e6},
		},
		NVMFree: 100e9, HDDRate: 50e6, Bandwidth: 40e6, UnpackRate: 200e6, Sequential: true,
	}
	// 0.5 s + 100 MB / 50 MB/s = 2.5 s, before the 100 MB of b can have come, 2.5 s, and be unpacked, 0.5 s.
	require.Equal(t, HDD, p.Decide(in).Tier)
	in.ContentOnHDD = true // and now the disk has 100 MB more to take, by the time that b has come
	require.Equal(t, NVM, p.Decide(in).Tier)
	in.Bandwidth = 10e6 // 10 s
	require.Equal(t, HDD, p.Decide(in).Tier)
	in.Layers[1].Downloaded = true // nothing hides the disk any more
	require.Equal(t, NVM, p.Decide(in).Tier)
}

// A blob that is whole but for containerd's own sync keeps nobody from counting as last.
func TestWholeBlobIsNotDownloading(t *testing.T) {
	p, err := ParsePolicy("lass")
	require.NoError(t, err)
	in := Input{NVMFree: 100e9, Sequential: true, Layers: []Layer{
		{Digest: "a", Compressed: 10e6, Offset: 1e6}, {Digest: "b", Compressed: 20e6, Offset: 20e6},
	}}
	require.Equal(t, NVM, p.Decide(in).Tier)
	in.Layers[1].Offset--
	require.Equal(t, HDD, p.Decide(in).Tier)
}

// The layer whose blob containerd still syncs has no time of arrival; it came last all the same.
func TestWholeBlobIsLast(t *testing.T) {
	begin := time.Unix(1_700_000_000, 0)
	in := Input{Concurrency: 3, Sequential: true, Index: 1, NVMFree: 1e9, Layers: []Layer{
		{Digest: "a", Compressed: 10, Offset: 10, Downloaded: true, Stored: true, Arrived: begin},
		{Digest: "b", Compressed: 30, Offset: 30},
		{Digest: "c", Compressed: 20, Offset: 20, Downloaded: true, Arrived: begin.Add(time.Second)},
	}}
	assert.Equal(t, 1, LDL(in))
	p, err := ParsePolicy("lass")
	require.NoError(t, err)
	assert.Contains(t, p.Decide(in).Reason, "(it is the last to download)")
}
