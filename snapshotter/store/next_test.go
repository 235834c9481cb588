// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestNext(t *testing.T) {
	whole := Found{Pack: true, NVM: true, SameBoot: true, WriteBack: true, Staged: true}
	with := func(change func(*Found)) Found {
		f := whole
		change(&f)
		return f
	}
	used := func(s State) Layer { return Layer{State: s, Users: 1, Used: true, Blob: "sha256:x"} }
	holes := func(s State) Layer { l := used(s); l.Holes = 1; return l }
	for _, c := range []struct {
		name string
		l    Layer
		f    Found
		busy bool
		want Step
	}{
		{"whole", used(Home), whole, false, Nothing},
		{"stored", used(Stored), whole, false, Sync},
		{"stored during a pull", used(Stored), whole, true, Nothing},
		{"stored during pulls that never end", used(Stored), with(func(f *Found) { f.Overdue = true }), true, Sync},
		{"stored and waited for", used(Stored), with(func(f *Found) { f.Wanted = true }), true, Nothing},
		{"stored before a crash", used(Stored), with(func(f *Found) { f.SameBoot = false }), false, Damage},
		{"durable before a crash", holes(Durable), with(func(f *Found) { f.SameBoot = false }), false, Fill},
		{"durable", holes(Durable), whole, false, Fill},
		{"durable during a start", holes(Durable), whole, true, Nothing},
		{"durable, nobody fills", holes(Durable), with(func(f *Found) { f.WriteBack = false }), false, Nothing},
		{"durable and waited for", holes(Durable), with(func(f *Found) { f.Wanted = true }), true, Nothing},
		{"holes and NVM lost", holes(Durable), with(func(f *Found) { f.NVM = false }), false, Damage},
		{"whole and NVM lost", holes(Home), with(func(f *Found) { f.NVM = false }), false, Nothing},
		{"pack lost", used(Home), with(func(f *Found) { f.Pack = false }), false, Damage},
		{"by path", used(Staged), whole, true, Pack},
		{"by path, directory lost", used(Staged), with(func(f *Found) { f.Staged = false }), false, Damage},
		{"bound, unpacking interrupted", used(Unpacking), whole, true, Unpack},
		{"unpacking", used(Unpacking), with(func(f *Found) { f.Running = true }), false, Nothing},
		{"unpacking for nobody", Layer{State: Unpacking}, whole, false, Remove},
		{"unpacking for a pull", Layer{State: Unpacking}, with(func(f *Found) { f.Held, f.Running = true, true }), false, Nothing},
		{"failed for a pull", Layer{State: Unpacking}, with(func(f *Found) { f.Held = true }), false, Nothing},
		{"stored for a pull that has ended", Layer{State: Home}, whole, false, Nothing},
		{"and long ago", Layer{State: Home}, with(func(f *Found) { f.Expired = true }), false, Remove},
		{"no user any more", Layer{State: Home, Used: true}, whole, false, Remove},
		{"no user but held", Layer{State: Home, Used: true}, with(func(f *Found) { f.Held = true }), false, Nothing},
		{"damaged", Layer{State: Home, Users: 1, Damaged: "x", Blob: "sha256:x"}, whole, true, Unpack},
		{"damaged, by path", Layer{State: Home, Users: 1, Damaged: "x"}, whole, false, Nothing},
		{"damaged too often", Layer{State: Home, Users: 1, Damaged: "x", Blob: "sha256:x", Repairs: mostRepairs}, whole, false, Nothing},
		{"damaged too often and waited for", Layer{State: Home, Users: 1, Damaged: "x", Blob: "sha256:x", Repairs: mostRepairs}, with(func(f *Found) { f.Wanted = true }), false, Unpack},
		{"damaged without users", Layer{State: Home, Used: true, Damaged: "x"}, whole, false, Remove},
		{"of a later version", used("frozen"), whole, false, Nothing},
	} {
		got, why := next(c.l, c.f, c.busy)
		require.Equal(t, c.want, got, "%s: %s", c.name, why)
		if got != Nothing {
			require.NotEmpty(t, why, c.name)
		}
	}
}

// Whatever is found of whatever layer, a step leads to another state or ends:
// steps that change nothing would be done for ever.
func TestNextComesToAnEnd(t *testing.T) {
	bools := func(n int) (out [8]bool) {
		for i := range out {
			out[i] = n>>i&1 == 1
		}
		return out
	}
	for n := range 1 << 8 {
		b := bools(n)
		f := Found{Pack: b[0], Staged: b[1], NVM: b[2], SameBoot: b[3], Held: b[4], Expired: b[5], WriteBack: b[6], Wanted: b[7]}
		for _, state := range []State{Unpacking, Staged, Stored, Durable, Home} {
			for _, users := range []int{0, 1} {
				l := Layer{State: state, Users: users, Used: users > 0, Blob: "sha256:x", Holes: 1}
				for steps := 0; ; steps++ {
					require.Less(t, steps, 8, "%+v %+v", l, f)
					step, _ := next(l, f, false)
					switch step {
					case Nothing, Remove:
					case Unpack:
						l.State, l.Damaged, f.Pack, f.SameBoot, f.NVM = Stored, "", true, true, true
						l.Repairs++
						continue
					case Pack:
						l.State, f.Pack, f.SameBoot, f.NVM = Stored, true, true, true
						continue
					case Sync:
						l.State = Durable
						continue
					case Fill:
						l.State = Home
						continue
					case Damage:
						l.Damaged = "x"
						continue
					}
					break
				}
			}
		}
	}
}
