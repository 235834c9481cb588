// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package placement

import (
	"encoding/json"
	"math"
	"math/rand"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// pulling is a pull in its middle: 100 MB to arrive in 8 s, 200 MB to unpack in 1 s, and 50 MB for the disk, which takes 0.5 s.
func pulling() FileInput {
	return FileInput{NVMFree: 1e9, NVMReserve: 100 * mb, NVMInodesFree: 1000, Backlog: 50 * mb, HDDRate: 100 * mb,
		Left: 100 * mb, Bandwidth: 12.5 * mb, ToUnpack: 200 * mb, UnpackRate: 200 * mb}
}

func TestPlaceFile(t *testing.T) {
	hot := File{Path: "bin/a", Size: mb, Hot: true, HotBy: "profile"}
	cold := File{Path: "share/a", Size: mb}
	late := func(in *FileInput) { in.Backlog = 900 * mb }
	full := func(in *FileInput) { in.NVMFree = in.NVMReserve }
	for _, tc := range []struct {
		name   string
		file   File
		change []func(*FileInput)
		place  Place
		rule   Rule
		reason string
	}{
		{"hot, disk in time", hot, nil, PlaceBoth, RuleHot,
			"to NVM and to the pack on HDD: it is hot by profile; the disk has it in 0.51 s (51.0 MB to write at 100 MB/s), before the pull can end, in 8.00 s at the earliest"},
		{"hot, disk late", hot, []func(*FileInput){late}, PlaceNVM, RuleHot, "to NVM, and to the pack on HDD later: it is hot by profile; the disk has it in 9.01 s"},
		{"hot, NVM full", hot, []func(*FileInput){full}, PlacePack, RuleNoRoom, "it would go to NVM (it is hot by profile), but needs 1.02 MB there and 0 B are left of 100 MB free"},
		{"hot, NVM full, disk late", hot, []func(*FileInput){full, late}, PlacePack, RuleNoRoom, "it is hot by profile"},
		{"hot, nobody says why", File{Size: 1, Hot: true}, nil, PlaceBoth, RuleHot, "it is hot; the disk"},
		{"cold, disk in time", cold, nil, PlacePack, RuleInTime, "to the pack on HDD: the disk has it in 0.51 s"},
		{"cold, disk late", cold, []func(*FileInput){late}, PlaceNVM, RuleLate, "(901 MB to write at 100 MB/s), and the pull may end in 8.00 s"},
		{"cold, disk late, just large enough", File{Size: LeastLate}, []func(*FileInput){late}, PlaceNVM, RuleLate, ""},
		{"cold, disk late, small", File{Size: LeastLate - 1}, []func(*FileInput){late}, PlacePack, RuleSmall,
			"and the pull may end in 8.00 s, but a file below 16.4 kB costs more on NVM than it spares the disk"},
		{"cold, disk late, small, NVM full", File{Size: 1}, []func(*FileInput){late, full}, PlacePack, RuleSmall, ""},
		{"cold, disk late, small, behind a hole", File{Size: 1}, []func(*FileInput){late, func(in *FileInput) { in.Hole = true }}, PlaceNVM, RuleLate, ""},
		{"the last follower", File{Size: 1}, []func(*FileInput){late, func(in *FileInput) { in.Hole, in.Followers = true, MostFollowers-1 }}, PlaceNVM, RuleLate, ""},
		{"enough followers", File{Size: 1}, []func(*FileInput){late, func(in *FileInput) { in.Hole, in.Followers = true, MostFollowers }}, PlacePack, RuleSmall, ""},
		{"hot, disk late, small, behind a hole", File{Size: 1, Hot: true}, []func(*FileInput){late, func(in *FileInput) { in.Hole = true }}, PlaceNVM, RuleHot, ""},
		{"hot, disk late, small", File{Size: LeastLate - 1, Hot: true}, []func(*FileInput){late}, PlaceBoth, RuleHot, ""},
		{"cold, disk late, NVM full", cold, []func(*FileInput){late, full}, PlacePack, RuleNoRoom, "it would go to NVM (the disk has it in 9.01 s"},
		{"cold, disk late, no inodes", cold, []func(*FileInput){late, func(in *FileInput) { in.NVMInodesFree = 2 }}, PlacePack, RuleNoInode, "needs up to 3 inodes there and 2 are left"},
		{"three inodes are enough", cold, []func(*FileInput){late, func(in *FileInput) { in.NVMInodesFree = 3 }}, PlaceNVM, RuleLate, ""},
		{"a filesystem without a limit of inodes", cold, []func(*FileInput){late, func(in *FileInput) { in.NVMInodesFree = -1 }}, PlaceNVM, RuleLate, ""},
		{"promised to others", cold, []func(*FileInput){late, func(in *FileInput) { in.NVMPromised = 899 * mb }}, PlacePack, RuleNoRoom, ""},
		{"blobs on the same disk", cold, []func(*FileInput){func(in *FileInput) { in.ContentOnHDD, in.HDDRate = true, 18.8*mb }}, PlaceNVM, RuleLate, "151 MB to write"},
		{"blobs elsewhere", cold, []func(*FileInput){func(in *FileInput) { in.HDDRate = 18.8 * mb }}, PlacePack, RuleInTime, "51.0 MB to write"},
		{"unpacking takes longer than the link", cold, []func(*FileInput){late, func(in *FileInput) { in.UnpackRate = 20 * mb }}, PlacePack, RuleInTime, "in 10 s at the earliest"},
		{"containerd's commit counts", cold, []func(*FileInput){late, func(in *FileInput) { in.Commit = 1.01 }}, PlacePack, RuleInTime, "in 9.01 s at the earliest"},
		{"all has come and is unpacked but for this file", File{Size: 200 * mb}, []func(*FileInput){func(in *FileInput) { in.Left, in.Bandwidth, in.Backlog = 0, 0, 0 }}, PlaceNVM, RuleLate, ""},
		{"HDD rate unknown", cold, []func(*FileInput){late, func(in *FileInput) { in.HDDRate = 0 }}, PlacePack, RuleUnknown, "the rate of the HDD is not known yet, and the pull does not wait for it"},
		{"bandwidth unknown", cold, []func(*FileInput){late, func(in *FileInput) { in.Bandwidth = 0 }}, PlacePack, RuleUnknown, "the bandwidth is not known yet"},
		{"bandwidth unknown and of no account", cold, []func(*FileInput){func(in *FileInput) { in.Bandwidth = 0 }}, PlacePack, RuleInTime, "in 1.00 s at the earliest"},
		{"rate of unpacking unknown", cold, []func(*FileInput){late, func(in *FileInput) { in.UnpackRate = 0 }}, PlacePack, RuleUnknown, "the rate of unpacking is not known yet"},
		{"hot, rates unknown", hot, []func(*FileInput){func(in *FileInput) { in.HDDRate, in.Bandwidth, in.UnpackRate = 0, 0, 0 }}, PlaceBoth, RuleHot, "hot by profile; the rate of the HDD is not known yet, so the pack takes it too"},
		{"the tier of the layer is of no account", cold, []func(*FileInput){func(in *FileInput) { in.Tier = NVM }}, PlacePack, RuleInTime, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			in := pulling()
			for _, change := range tc.change {
				change(&in)
			}
			d := parse(t, "drain").PlaceFile(tc.file, in)
			assert.Equal(t, tc.place, d.Place, d.Reason())
			assert.Equal(t, tc.rule, d.Rule, d.Reason())
			assert.Contains(t, d.Reason(), tc.reason)
			assert.Equal(t, d.Place.OnNVM(), d.NVMBytes() > 0)
		})
	}
}

// A layer of small files does not leave the pack, and behind a large one that does only so many follow.
func TestSmallFilesStayInThePack(t *testing.T) {
	in := pulling()
	in.Backlog = 900 * mb
	p := parse(t, "drain")
	place := func(size int64) Place {
		d := p.PlaceFile(File{Size: size}, in)
		in.After(d)
		return d.Place
	}
	for range 1000 {
		require.Equal(t, PlacePack, place(LeastLate-1))
	}
	for range 3 {
		require.Equal(t, PlaceNVM, place(LeastLate))
		for range MostFollowers {
			require.Equal(t, PlaceNVM, place(300))
		}
		for range 1000 {
			require.Equal(t, PlacePack, place(300))
		}
	}
	require.Equal(t, PlaceNVM, place(mb))
	in.Backlog = 0
	require.Equal(t, PlacePack, place(mb))
	in.Backlog = 900 * mb
	require.Equal(t, PlacePack, place(300), "the file before it is in the pack")
}

func TestWholeLayerPoliciesFollowTheirDecision(t *testing.T) {
	for name, want := range map[string]struct{ byFile, late bool }{
		"drain": {true, false}, "lass": {false, true}, "nvm": {}, "hdd": {}, "boundary=2": {},
	} {
		p := parse(t, name)
		assert.Equal(t, want.byFile, p.ByFile(), name)
		assert.Equal(t, want.late, p.Late(), name)
		if p.ByFile() {
			continue
		}
		for _, hot := range []bool{false, true} {
			in := pulling()
			d := p.PlaceFile(File{Size: mb, Hot: hot}, in)
			assert.Equal(t, PlacePack, d.Place)
			assert.Contains(t, d.Reason(), "policy "+name+" places whole layers, and this layer goes to HDD")
			in.Tier = NVM
			d = p.PlaceFile(File{Size: mb, Hot: hot}, in)
			assert.Equal(t, PlaceNVM, d.Place)
			assert.Equal(t, RuleLayer, d.Rule)
			in.NVMFree = 0
			d = p.PlaceFile(File{Size: mb}, in)
			assert.Equal(t, PlacePack, d.Place)
			assert.Equal(t, RuleNoRoom, d.Rule)
			assert.Contains(t, d.Reason(), "policy "+name+" places its layer there")
		}
	}
}

// randomFileInput is a random state of a pull, nonsense included.
func randomFileInput(r *rand.Rand) (File, FileInput) {
	number := func() int64 {
		return []int64{0, -1, 1, 4096, 1e6, 1e9, 1 << 40, math.MaxInt64, math.MinInt64}[r.Intn(9)]
	}
	rate := func() float64 { return []float64{0, -1, 1, 1e6, 1e9, math.Inf(1), math.NaN()}[r.Intn(7)] }
	f := File{Size: number(), Hot: r.Intn(2) == 0}
	return f, FileInput{Tier: Tier(r.Intn(2)), NVMFree: number(), NVMReserve: number(), NVMPromised: number(), NVMInodesFree: number(), Backlog: number(),
		HDDRate: rate(), ContentOnHDD: r.Intn(2) == 0, Left: number(), Bandwidth: rate(), ToUnpack: number(), UnpackRate: rate(), Commit: rate()}
}

func TestPlaceFileAnything(t *testing.T) {
	r := rand.New(rand.NewSource(1))
	for range 50000 {
		f, in := randomFileInput(r)
		for _, name := range []string{"lass", "drain", "nvm", "hdd", "boundary=2"} {
			d := parse(t, name).PlaceFile(f, in)
			require.NotEmpty(t, d.Reason())
			require.True(t, d.Place.OnNVM() || d.Place.InPack())
			if d.Place.OnNVM() {
				require.GreaterOrEqual(t, in.NVMFree, d.NVMBytes(), "%+v", d)
				require.NotZero(t, in.NVMInodesFree)
			}
		}
	}
}

// More room never takes a file from NVM, more for the disk to do never brings one into the pack, and what is hot is never
// further from NVM than what is not.
func TestPlaceFileIsMonotone(t *testing.T) {
	r := rand.New(rand.NewSource(2))
	p := parse(t, "drain")
	moved := map[string]int{}
	for range 50000 {
		f := File{Size: r.Int63n(100 * mb), Hot: r.Intn(3) == 0}
		in := FileInput{NVMFree: r.Int63n(400 * mb), NVMReserve: r.Int63n(100 * mb), NVMInodesFree: r.Int63n(8) - 1, Backlog: r.Int63n(1000 * mb), ContentOnHDD: r.Intn(2) == 0,
			HDDRate: float64(r.Int63n(200 * mb)), Left: r.Int63n(200 * mb), Bandwidth: float64(1 + r.Int63n(100*mb)), ToUnpack: r.Int63n(500 * mb), UnpackRate: float64(1 + r.Int63n(300*mb))}
		before := p.PlaceFile(f, in)
		check := func(what string, change func(*File, *FileInput), ok func(after Place) bool) {
			f, in := f, in
			change(&f, &in)
			after := p.PlaceFile(f, in)
			require.True(t, ok(after.Place), "%s: %s\nbefore %+v\nafter %+v", what, after.Reason(), before, after)
			if after.Place != before.Place {
				moved[what]++
			}
		}
		staysOnNVM := func(after Place) bool { return after.OnNVM() || !before.Place.OnNVM() }
		staysInPack := func(after Place) bool { return after.InPack() || !before.Place.InPack() }
		staysOutOfPack := func(after Place) bool { return !after.InPack() || before.Place.InPack() }
		some := 1 + r.Int63n(300*mb)
		check("more NVM", func(_ *File, in *FileInput) { in.NVMFree += some }, staysOnNVM)
		check("hot", func(f *File, _ *FileInput) { f.Hot = true }, staysOnNVM)
		check("more backlog", func(_ *File, in *FileInput) { in.Backlog += some }, staysOutOfPack)
		if in.HDDRate > 0 {
			check("faster disk", func(_ *File, in *FileInput) { in.HDDRate += float64(some) }, staysInPack)
		}
		if !in.ContentOnHDD {
			check("more to arrive", func(_ *File, in *FileInput) { in.Left += some }, staysInPack)
		}
		check("more to unpack", func(_ *File, in *FileInput) { in.ToUnpack += some }, staysInPack)
		check("a longer commit", func(_ *File, in *FileInput) { in.Commit++ }, staysInPack)
	}
	for _, what := range []string{"more NVM", "hot", "more backlog", "faster disk", "more to arrive", "more to unpack", "a longer commit"} {
		assert.Greater(t, moved[what], 100, what+" moves files at all")
	}
}

// Whatever comes, files that are placed one after the other never take more of NVM than what is free above the reserve.
func TestFilesStayInTheirRoom(t *testing.T) {
	r := rand.New(rand.NewSource(3))
	for range 300 {
		in := pulling()
		in.NVMReserve, in.NVMInodesFree = r.Int63n(50*mb), 10+r.Int63n(2000)
		in.NVMFree = in.NVMReserve + r.Int63n(200*mb)
		free, inodes := in.NVMFree, in.NVMInodesFree
		p := parse(t, []string{"drain", "nvm"}[r.Intn(2)])
		in.Tier, in.Backlog = NVM, r.Int63n(1500*mb)
		var taken, files int64
		for range 3000 {
			f := File{Size: r.Int63n(1 << r.Intn(24)), Hot: r.Intn(4) == 0}
			d := p.PlaceFile(f, in)
			if !d.Place.OnNVM() {
				continue
			}
			taken += d.NVMBytes()
			files++
			require.LessOrEqual(t, taken, free-in.NVMReserve)
			require.LessOrEqual(t, files, inodes)
			if r.Intn(2) == 0 { // some are written by now, some are promised
				in.NVMFree -= d.NVMBytes()
			} else {
				in.NVMPromised += d.NVMBytes()
			}
			in.NVMInodesFree--
		}
	}
}

// Sums of sizes must not wrap around: a nonsensical reserve left room for everything.
func TestAdmissionDoesNotOverflow(t *testing.T) {
	in := world(2, 0, 1, 2, 3, 4)
	in.NVMReserve, in.NVMPromised = math.MaxInt64, math.MaxInt64
	in.NVMFree = 1 << 62
	d := parse(t, "nvm").Decide(in)
	assert.Equal(t, HDD, d.Tier, d.Reason)
	for i := range in.Layers { // a manifest may say so
		in.Layers[i] = Layer{Compressed: math.MaxInt64}
	}
	in.Index, in.Sequential = 0, false
	_, left := in.Downloading()
	assert.Positive(t, left)
	assert.Positive(t, Footprint(math.MaxInt64))
	assert.Positive(t, FileFootprint(math.MaxInt64))
}

func TestFileFootprint(t *testing.T) {
	for size, want := range map[int64]int64{-1: 0, 0: 0, 1: 4096, 4096: 4096 + 16, 4097: 8192 + 16, 1 << 20: 1<<20 + 4096} {
		assert.Equal(t, want, FileFootprint(size), size)
	}
}

func TestFileDecisionJSON(t *testing.T) {
	d := parse(t, "drain").PlaceFile(File{Path: "etc/passwd", Size: 1000, Hot: true, HotBy: "static analysis"}, pulling())
	b, err := json.Marshal(d)
	require.NoError(t, err)
	var back FileDecision
	require.NoError(t, json.Unmarshal(b, &back))
	assert.Equal(t, d, back)
	assert.Contains(t, string(b), `"place":"both","rule":"hot","policy":"drain"`)
	assert.Error(t, json.Unmarshal([]byte(`{"place":"tape"}`), &back))
	_, err = Place(7).MarshalText()
	assert.Error(t, err)
	assert.Equal(t, "place(7)", Place(7).String())
}

func TestRest(t *testing.T) {
	for _, tc := range []struct {
		name           string
		blobs          []Progress
		left, toUnpack int64
	}{
		{"nothing", nil, 0, 0},
		{"not begun", []Progress{{Compressed: 10 * mb}, {Compressed: 5 * mb}}, 15 * mb, 15 * mb},
		{"too little read for a ratio", []Progress{{Compressed: 10 * mb, Arrived: 2 * mb, Read: mb, Unpacked: 3 * mb}}, 8 * mb, 9 * mb},
		{"the ratio so far", []Progress{{Compressed: 10 * mb, Arrived: 6 * mb, Read: 4 * mb, Unpacked: 12 * mb}}, 4 * mb, 18 * mb},
		{"a bomb counts as the largest layer known", []Progress{{Compressed: 10 * mb, Arrived: 6 * mb, Read: 4 * mb, Unpacked: 4000 * mb}}, 4 * mb, 27 * mb},
		{"arrived, not read", []Progress{{Compressed: 10 * mb, Arrived: 10 * mb, Read: 5 * mb, Unpacked: 5 * mb}}, 0, 5 * mb},
		{"done", []Progress{{Compressed: 10 * mb, Arrived: 10 * mb, Read: 10 * mb, Unpacked: 30 * mb}}, 0, 0},
		{"more than the manifest says", []Progress{{Compressed: 10, Arrived: 20, Read: 30, Unpacked: 40}}, 0, 0},
	} {
		left, toUnpack := Rest(tc.blobs)
		assert.Equal(t, tc.left, left, tc.name)
		assert.Equal(t, tc.toUnpack, toUnpack, tc.name)
	}
	left, toUnpack := Rest([]Progress{{Compressed: math.MaxInt64, Arrived: math.MinInt64}, {Compressed: math.MaxInt64}, {Compressed: -5, Read: -5}})
	assert.Positive(t, left)
	assert.Positive(t, toUnpack)
}

func TestShareMayHold(t *testing.T) {
	for name, c := range map[string]struct {
		h    Share
		size int64
		want bool
	}{
		"one of several":          {Share{Rule: RuleInTime, Files: 3, Bytes: 100}, 40, true},
		"more than all have":      {Share{Rule: RuleInTime, Files: 3, Bytes: 100}, 101, false},
		"the only one":            {Share{Rule: RuleLate, Files: 1, Bytes: 100}, 100, true},
		"another than that":       {Share{Rule: RuleLate, Files: 1, Bytes: 100}, 99, false},
		"a small one":             {Share{Rule: RuleSmall, Files: 9, Bytes: 9 * LeastLate}, LeastLate - 1, true},
		"too large for the small": {Share{Rule: RuleSmall, Files: 9, Bytes: 9 * LeastLate}, LeastLate, false},
	} {
		assert.Equal(t, c.want, c.h.MayHold(c.size), name)
	}
}

func TestSummary(t *testing.T) {
	p := parse(t, "drain")
	var s Summary
	in := pulling()
	for range 3 {
		s.Add(p.PlaceFile(File{Size: 10 * mb}, in))
	}
	assert.Equal(t, HDD, s.Decision(p, world(0, 0)).Tier)
	s.Add(p.PlaceFile(File{Size: mb, Hot: true, HotBy: "profile"}, in))
	d := s.Decision(p, world(0, 0))
	assert.Equal(t, HDD, d.Tier, "the pack has all of it")
	assert.True(t, d.Admitted)
	in.Backlog = 2000 * mb
	s.Add(p.PlaceFile(File{Size: 2 * mb}, in))
	s.Add(p.PlaceFile(File{Size: 3 * mb, Hot: true, HotBy: "profile"}, in))
	d = s.Decision(p, world(0, 0))
	assert.Equal(t, NVM, d.Tier, "some of it stands on NVM alone")
	assert.Equal(t, "drain", d.Policy)
	assert.Equal(t, 2, d.LDL)
	assert.Equal(t, "layer 0 to NVM: 30.0 MB in 3 files to the pack (the disk keeps up); 1.00 MB in 1 file to NVM and the pack (hot by profile); "+
		"2.00 MB in 1 file to NVM alone (the disk would be late); 3.00 MB in 1 file to NVM alone (hot by profile)", d.Reason)
	assert.Equal(t, int64(30*mb), s.Bytes(PlacePack))
	assert.Equal(t, int64(6*mb), s.NVMBytes())
	in.NVMFree = 0
	s.Add(p.PlaceFile(File{Size: mb}, in))
	assert.False(t, s.Decision(p, world(0, 0)).Admitted)
	assert.True(t, strings.HasSuffix(s.Decision(p, world(0, 0)).Reason, "1.00 MB in 1 file to the pack (NVM has no room)"))
	s.Add(p.PlaceFile(File{Size: mb, Hot: true, HotBy: "profile"}, in))
	assert.True(t, strings.HasSuffix(s.Decision(p, world(0, 0)).Reason, "1.00 MB in 1 file to the pack (hot by profile, but NVM has no room)"))

	b, err := json.Marshal(d)
	require.NoError(t, err)
	var back Decision
	require.NoError(t, json.Unmarshal(b, &back))
	assert.Equal(t, d.Files, back.Files)
	assert.Equal(t, "layer 0 to HDD: all of it stands in the metadata", Summary{}.Decision(p, world(0, 0)).Reason)
}

func BenchmarkPlaceFile(b *testing.B) {
	p := parse(b, "drain")
	in := pulling()
	var s Summary
	for b.Loop() {
		s.Add(p.PlaceFile(File{Path: "a", Size: 1000, Hot: true, HotBy: "profile"}, in))
	}
}
