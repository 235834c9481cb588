// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/placement"
)

var now = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// world is a store in memory that carries plans out.
type world struct {
	images []Image
	layers map[string]*Layer
	sizes  map[string]map[string]int64 // by layer: all its files
	onNVM  map[string]bool             // by redirect
	space  Space                       // Free is derived
	other  int64                       // bytes on NVM that are of something else
	limits Limits
	moved  map[string][]string // by redirect: "up", "down"
}

func (w *world) nvm(id string) (n int64) {
	for redirect, size := range w.sizes[id] {
		if w.onNVM[redirect] {
			n += (size + block - 1) / block * block
		}
	}
	return n
}

func (w *world) input() Input {
	in := Input{Now: now, Space: w.space, Limits: w.limits}
	use := w.other
	for _, id := range slices.Sorted(maps.Keys(w.layers)) {
		l := *w.layers[id]
		l.NVM = w.nvm(id)
		use += l.NVM
		in.Layers = append(in.Layers, l)
	}
	in.Space.Free = w.space.Total - use
	for _, im := range w.images {
		im.Hot = slices.Clone(im.Hot)
		for i := range im.Hot {
			im.Hot[i].OnNVM = w.onNVM[im.Hot[i].Redirect]
		}
		in.Images = append(in.Images, im)
	}
	return in
}

func (w *world) apply(p Plan) {
	for _, r := range p.Down {
		w.layers[r.Layer].Tier = placement.HDD
		for redirect := range w.sizes[r.Layer] {
			if w.onNVM[redirect] && !r.Keep[redirect] {
				delete(w.onNVM, redirect)
				w.moved[redirect] = append(w.moved[redirect], "down")
			}
		}
	}
	for _, u := range p.Up {
		w.onNVM[u.Redirect] = true
		w.moved[u.Redirect] = append(w.moved[u.Redirect], "up")
	}
}

func (w *world) use() int64 { in := w.input(); return in.Space.Total - in.Space.Free }

func random(r *rand.Rand) *world {
	w := &world{layers: map[string]*Layer{}, sizes: map[string]map[string]int64{}, onNVM: map[string]bool{}, moved: map[string][]string{}}
	var total int64
	for i := range 2 + r.IntN(8) {
		id := fmt.Sprint(i)
		l := &Layer{ID: id, Tier: placement.Tier(r.IntN(2)), Used: now.Add(-time.Duration(r.IntN(30*24)) * time.Hour)}
		if r.IntN(8) == 0 {
			l.Fixed = "damaged"
		}
		l.Waiting = r.IntN(2) == 0
		w.layers[id], w.sizes[id] = l, map[string]int64{}
		for j := range r.IntN(20) {
			size := int64(math.Exp(r.Float64()*16)) + 1
			redirect := fmt.Sprintf("/%s/f%d", id, j)
			w.sizes[id][redirect] = size
			w.onNVM[redirect] = l.Tier == placement.NVM || r.IntN(4) == 0 || l.Waiting && r.IntN(2) == 0
			total += (size + block - 1) / block * block
		}
	}
	maps.DeleteFunc(w.onNVM, func(_ string, on bool) bool { return !on })
	ids := slices.Sorted(maps.Keys(w.layers))
	for i := range r.IntN(6) {
		im := Image{ID: fmt.Sprint("image", i), Knowledge: Knowledge(r.IntN(3)), Used: now.Add(-time.Duration(r.IntN(30*24)) * time.Hour)}
		for _, id := range ids {
			if r.IntN(2) == 0 {
				continue
			}
			im.Layers = append(im.Layers, id)
			for _, redirect := range slices.Sorted(maps.Keys(w.sizes[id])) {
				if r.IntN(2) == 0 {
					im.Hot = append(im.Hot, File{Redirect: redirect, Size: w.sizes[id][redirect], Weight: r.Float64(), Pinned: r.IntN(10) == 0})
				}
			}
		}
		r.Shuffle(len(im.Hot), func(a, b int) { im.Hot[a], im.Hot[b] = im.Hot[b], im.Hot[a] })
		w.images = append(w.images, im)
	}
	w.other = r.Int64N(1 << 20)
	w.space.Total = w.use() + r.Int64N(total+1<<20)
	w.space.Reserve = r.Int64N(w.space.Total/3 + 1)
	w.limits = Limits{High: 0.5 + r.Float64()/2, Low: 0.3 + r.Float64()/2, Gain: 1 + 2*r.Float64()}
	return w
}

// What has to hold of every plan, in many worlds, until nothing changes any more.
func TestProperties(t *testing.T) {
	var ups, downs, pressures, denied int
	for seed := range uint64(4000) {
		w := random(rand.New(rand.NewPCG(seed, 1)))
		fixed, pressing := false, false
		for range 6 {
			in := w.input()
			in.Pressing = pressing
			p := Decide(in)
			require.Equal(t, p, Decide(in), "seed %d: not deterministic", seed)
			check(t, seed, w, in, p)
			ups, downs, denied = ups+len(p.Up), downs+len(p.Down), denied+p.Denied.Files
			if p.Pressure {
				pressures++
			}
			pressing = p.Pressure
			before := maps.Clone(w.onNVM)
			w.apply(p)
			require.Equal(t, p.Use, w.use(), "seed %d: the plan's use is not what came of it", seed)
			if fixed = maps.Equal(before, w.onNVM); fixed {
				break
			}
		}
		require.True(t, fixed, "seed %d: no fixed point", seed)
		for redirect, moves := range w.moved {
			require.LessOrEqual(t, len(moves), 1, "seed %d: %s went %v", seed, redirect, moves)
		}
	}
	t.Log(ups, "up,", downs, "layers reduced,", pressures, "under pressure,", denied, "denied")
	require.NotZero(t, ups*downs*pressures*denied, "the worlds are too tame")
}

func check(t *testing.T, seed uint64, w *world, in Input, p Plan) {
	t.Helper()
	usable := in.Space.Total - in.Space.Reserve
	low := int64(min(in.Limits.Low, in.Limits.High) * float64(usable))
	if len(p.Up) > 0 {
		require.LessOrEqual(t, p.Use, low, "seed %d: came up above the low watermark", seed)
		require.GreaterOrEqual(t, p.Floor, in.Space.Reserve, "seed %d: into the reserve", seed)
	}
	hot, pinned, settled := map[string]bool{}, map[string]bool{}, map[string]bool{}
	for _, im := range in.Images {
		for _, id := range im.Layers {
			settled[id] = settled[id] || im.Knowledge == Traced
		}
		if im.Knowledge == Unknown {
			continue
		}
		for _, f := range im.Hot {
			hot[f.Redirect] = true
			pinned[f.Redirect] = pinned[f.Redirect] || f.Pinned
		}
	}
	seen := map[string]bool{}
	for _, u := range p.Up {
		require.True(t, hot[u.Redirect] && !w.onNVM[u.Redirect] && !seen[u.Redirect], "seed %d: %s", seed, u.Redirect)
		seen[u.Redirect] = true
		require.Empty(t, w.layers[layerOf(u.Redirect)].Fixed, "seed %d", seed)
		require.NotEmpty(t, u.Reason())
	}
	var leaves []string
	reduced := map[string]bool{}
	for _, r := range p.Down {
		l := w.layers[r.Layer]
		reduced[r.Layer] = true
		require.Empty(t, l.Fixed, "seed %d", seed)
		require.Equal(t, l.Tier == placement.HDD, r.AtHome)
		require.NotEmpty(t, r.Reason)
		left := map[string]bool{}
		for _, d := range r.Leave {
			left[d.Redirect] = true
			leaves = append(leaves, d.Redirect)
		}
		for redirect := range w.sizes[r.Layer] {
			// A file hot for any image leaves for want of space only, and the plan says so.
			if hot[redirect] && w.onNVM[redirect] {
				require.NotEqual(t, left[redirect], r.Keep[redirect], "seed %d: %s", seed, redirect)
			}
			require.False(t, r.Keep[redirect] && !hot[redirect], "seed %d: kept though cold: %s", seed, redirect)
		}
	}
	for id := range settled {
		if l := w.layers[id]; settled[id] && l.Fixed == "" && w.nvm(id) > 0 {
			require.True(t, reduced[id], "seed %d: settled layer %s is left as it is", seed, id)
		}
	}
	if len(p.Up) == 0 && !p.Pressure {
		require.Empty(t, leaves, "seed %d: something hot left for nothing", seed)
	}
	// A pinned file leaves only where what is pinned does not fit.
	for _, redirect := range leaves {
		if pinned[redirect] {
			rest := p.Use
			for id := range w.layers {
				for r, size := range w.sizes[id] {
					if w.layers[id].Fixed == "" && reduced[id] && hot[r] && !pinned[r] && (w.onNVM[r] && !slices.Contains(leaves, r)) {
						rest -= (size + block - 1) / block * block
					}
				}
			}
			require.Greater(t, rest+(w.sizes[layerOf(redirect)][redirect]+block-1)/block*block, low, "seed %d: pinned %s left first", seed, redirect)
		}
	}
	// Under pressure no layer that nobody started stays when a hot file leaves.
	if p.Pressure && len(leaves) > 0 && len(p.Up) == 0 {
		for id, l := range w.layers {
			if l.Fixed == "" && w.nvm(id) > 0 {
				require.True(t, reduced[id], "seed %d: layer %s stays", seed, id)
			}
		}
	}
}

func one(hot ...File) []Image {
	return []Image{{ID: "a", Knowledge: Traced, Used: now, Hot: hot, Layers: []string{"1"}}}
}

func TestOnlyHotFilesOfSettledLayersStay(t *testing.T) {
	in := Input{Now: now, Images: one(File{Redirect: "/1/hot", Size: 5000, Weight: 1, OnNVM: true}, File{Redirect: "/1/up", Size: 10, Weight: 0.5}),
		Layers: []Layer{{ID: "1", Tier: placement.NVM, NVM: 1 << 20}, {ID: "2", Tier: placement.NVM, NVM: 1 << 20}},
		Space:  Space{Free: 1 << 30, Total: 2 << 30}}
	p := Decide(in)
	require.Len(t, p.Down, 1)
	require.Equal(t, Reduction{Layer: "1", Keep: map[string]bool{"/1/hot": true, "/1/up": true}, Freed: 1<<20 - 8192, Reason: p.Down[0].Reason}, p.Down[0])
	require.Len(t, p.Up, 1)
	require.Equal(t, "50 % of the starts of image a use it", p.Up[0].Reason())

	in.Images[0].Knowledge = Unknown
	require.True(t, func() bool { p := Decide(in); return p.Empty() }(), "without knowledge all stays where it is")
	in.Images[0].Knowledge = Predicted
	p = Decide(in)
	require.Empty(t, p.Down)
	require.Len(t, p.Up, 1)
}

// What a pull has stored on NVM waits there for the first start, also when the
// pack is whole; it leaves when room is needed.
func TestWaitingLayerStaysUntilTraced(t *testing.T) {
	in := Input{Now: now, Layers: []Layer{{ID: "1", Tier: placement.HDD, Waiting: true, NVM: 1 << 20, Used: now}},
		Images: one(File{Redirect: "/1/hot", Size: 5000, Weight: 1, OnNVM: true}), Space: Space{Free: 1 << 30, Total: 2 << 30}}
	in.Images[0].Knowledge = Predicted
	p := Decide(in)
	require.Empty(t, p.Down)
	in.Layers[0].Waiting = false
	require.Len(t, Decide(in).Down, 1, "what came up later leaves when it is not hot any more")
	in.Layers[0].Waiting = true
	in.Images[0].Knowledge = Traced
	p = Decide(in)
	require.Len(t, p.Down, 1)
	require.True(t, p.Down[0].AtHome)
	require.EqualValues(t, 1<<20-8192, p.Down[0].Freed)
	in.Images[0].Knowledge = Predicted
	in.Space = Space{Free: 0, Total: 1 << 20}
	p = Decide(in)
	require.Len(t, p.Down, 1)
	require.Equal(t, map[string]bool{"/1/hot": true}, p.Down[0].Keep)
}

func TestOrderAndBenefit(t *testing.T) {
	in := Input{Now: now, Layers: []Layer{{ID: "1"}}, Space: Space{Free: 1 << 30, Total: 1 << 30}, Images: []Image{
		{ID: "old", Knowledge: Traced, Used: now.Add(-HalfLife), Layers: []string{"1"}, Hot: []File{{Redirect: "/1/c", Size: 1, Weight: 1}, {Redirect: "/1/b", Size: 1, Weight: 1}}},
		{ID: "new", Knowledge: Traced, Used: now, Layers: []string{"1"}, Hot: []File{{Redirect: "/1/b", Size: 1, Weight: 1}, {Redirect: "/1/a", Size: 150 << 20, Weight: 0.5}}},
	}}
	p := Decide(in)
	var got []string
	for _, u := range p.Up {
		got = append(got, fmt.Sprint(u.Redirect, " ", u.Image, " ", u.Benefit.Round(time.Millisecond)))
	}
	require.Equal(t, []string{"/1/b new 15ms", "/1/a new 505ms", "/1/c old 5ms"}, got)
}

// A file comes up in the place of one that is worth less than half of it per
// byte, and not of one that is worth little less.
func TestGain(t *testing.T) {
	for weight, comes := range map[float64]bool{0.6: false, 0.3: true} {
		in := Input{Now: now, Layers: []Layer{{ID: "1", NVM: 8 << 20}}, Space: Space{Free: 2 << 20, Total: 10 << 20},
			Images: one(File{Redirect: "/1/there", Size: 8 << 20, Weight: weight, OnNVM: true}, File{Redirect: "/1/new", Size: 8 << 20, Weight: 1})}
		p := Decide(in)
		require.Equal(t, comes, len(p.Up) == 1, "%v", p)
		require.Equal(t, comes, len(p.Down[0].Leave) == 1)
	}
}

// Once above the high watermark things leave until the low one, however many plans
// are made on the way; and no longer than anything can leave.
func TestPressureLastsUntilTheLowWatermark(t *testing.T) {
	const gib = 1 << 30
	in := Input{Now: now, Space: Space{Free: 1 * gib, Total: 20 * gib}} // 19 in use, high is 18, low is 16
	for i := range 15 {
		in.Layers = append(in.Layers, Layer{ID: fmt.Sprint(i), NVM: gib, Tier: placement.NVM, Used: now.Add(time.Duration(i) * time.Hour)})
	}
	p := Decide(in)
	require.True(t, p.Pressure)
	require.Len(t, p.Down, 3)
	// One has left; then an image comes, and a new plan is made.
	in.Layers, in.Space.Free = in.Layers[1:], 2*gib
	require.False(t, Decide(in).Pressure, "it was never above the high watermark")
	in.Pressing = true
	p = Decide(in)
	require.True(t, p.Pressure)
	require.Len(t, p.Down, 2, "the other two leave")
	in.Layers, in.Space.Free = in.Layers[2:], 4*gib
	p = Decide(in)
	require.True(t, p.Empty(), "the low watermark is reached")
	require.False(t, p.Pressure)
	// What is left is not of images.
	in.Layers, in.Space.Free = nil, 3*gib
	require.False(t, Decide(in).Pressure, "nothing can leave: images that come may stay up to the high watermark")
}

func TestNonsenseIsHarmless(t *testing.T) {
	nan := math.NaN()
	p := Decide(Input{Now: now, Limits: Limits{nan, nan, nan}, Space: Space{Free: 5, Total: -1, Reserve: 9}, Disk: Disk{-1, -1},
		Layers: []Layer{{ID: "1", NVM: -5, Tier: placement.NVM}, {ID: ""}},
		Images: []Image{{Knowledge: Traced, Layers: []string{"1", "9", ""}, Hot: []File{
			{Redirect: "", Size: 1}, {Redirect: "/", Size: 1, Weight: nan}, {Redirect: "/9/x", Size: 1, Weight: 1}, {Redirect: "/1/x", Size: -1}, {Redirect: "/1/y", Size: 1, Weight: nan, OnNVM: true},
			{Redirect: "/1/z", Size: math.MaxInt64, Weight: 7}}}}})
	for _, u := range p.Up {
		require.Less(t, u.Size, int64(math.MaxInt64))
	}
	require.True(t, func() bool { p := Decide(Input{}); return p.Empty() }())
}

func BenchmarkDecide(b *testing.B) {
	in := Input{Now: now, Space: Space{Free: 1 << 38, Total: 1 << 39}}
	for i := range 100 {
		id := fmt.Sprint(i)
		in.Layers = append(in.Layers, Layer{ID: id, NVM: 1 << 30})
		im := Image{ID: id, Knowledge: Traced, Used: now, Layers: []string{id}}
		for j := range 1000 {
			im.Hot = append(im.Hot, File{Redirect: fmt.Sprintf("/%s/usr/lib/%d", id, j), Size: int64(j * 1000), Weight: 1, OnNVM: j%2 == 0})
		}
		in.Images = append(in.Images, im)
	}
	for b.Loop() {
		Decide(in)
	}
}

func TestFateOfAFile(t *testing.T) {
	p := Plan{
		Up: []Promotion{{Redirect: "/1/01/1"}},
		Down: []Reduction{{
			Layer: "2", Keep: map[string]bool{"/2/01/1": true}, Leave: []Departure{{Redirect: "/2/02/2"}}, Reason: "traced",
		}},
	}
	require.True(t, p.Comes("/1/01/1"))
	require.False(t, p.Comes("/2/01/1"))
	for redirect, want := range map[string]string{"/2/01/1": "", "/2/02/2": "NVM is short", "/2/03/3": "traced"} {
		require.Equal(t, want, p.Leaves("2", redirect), redirect)
	}
	require.Empty(t, p.Leaves("1", "/1/01/1"))
}
