// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package operator

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/hif"
	"github.com/nhybrid/nhybrid/hif/plan"
	"github.com/nhybrid/nhybrid/snapshotter/control"
)

func decided(policy, reason string, shares ...*control.Share) *control.Decision {
	return &control.Decision{Policy: policy, Index: 1, Tier: "hdd", Reason: reason, Files: shares}
}

func share(place, rule, hotBy string, files, bytes int64) *control.Share {
	return &control.Share{Place: place, Rule: rule, HotBy: hotBy, Files: files, Bytes: bytes}
}

func TestReasonOfAFile(t *testing.T) {
	const large = 100_000
	hdd := decided("hdd", "layer 1 to HDD: policy hdd puts every layer there", share("pack", "layer", "", 9, 9*large))
	inTime := share("pack", "in-time", "", 9, 9*large)
	small := share("pack", "small", "", 9, 9000)
	both := share("both", "hot", "hot by profile", 5, 5*large)
	late := share("nvm", "late", "", 5, 5*large)
	full := share("pack", "no-room", "", 9, 9*large)
	drain := decided("drain", "", inTime, small, late)
	nvm := &control.Decision{Policy: "nvm", Index: 1, Tier: "nvm", Reason: "layer 1 to NVM: policy nvm puts every layer there", Files: []*control.Share{
		share("nvm", "layer", "", 5, 5*large), full,
	}}
	traced := &hif.Heat{Hot: true, Why: "50 % of the starts use it", Settled: true, Moves: true}
	cold := &hif.Heat{Why: "no start has used it", Settled: true, Moves: true}
	for name, c := range map[string]struct {
		f    facts
		want string
	}{
		"drain: in time": {
			facts{size: large, stands: "hdd", decision: drain, holes: 5 * large},
			"when its layer was stored (policy drain) it went to the pack (the disk keeps up)",
		},
		"drain: small, by one of two rules": {
			facts{size: 1000, stands: "hdd", decision: drain, holes: 5 * large},
			"when its layer was stored (policy drain) it went to the pack (the disk keeps up, or too small for NVM); which of these is not recorded for one file",
		},
		"drain: a size that one share of the two cannot hold": {
			facts{size: 9001, stands: "hdd", decision: drain, holes: 5 * large},
			"when its layer was stored (policy drain) it went to the pack (the disk keeps up)",
		},
		"drain: late, hole not filled": {
			facts{size: large, stands: "nvm", hole: true, decision: drain, holes: 5 * large},
			"when its layer was stored (policy drain) it went to NVM alone (the disk would be late); it stays there at least until its hole in the pack is filled",
		},
		"drain: late, moved after a start": {
			facts{size: large, stands: "hdd", hole: true, home: true, decision: drain, holes: 5 * large, heat: cold},
			"when its layer was stored (policy drain) it went to NVM alone (the disk would be late); it has left NVM since; " +
				"it is not hot (no start has used it), and only hot files of its layer stay on NVM",
		},
		"drain: hot by profile": {
			facts{size: large, stands: "nvm", home: true, decision: decided("drain", "", both), heat: traced},
			"when its layer was stored (policy drain) it went to NVM and the pack (hot by profile); it is hot (50 % of the starts use it)",
		},
		"drain: hot by profile, or brought up by a plan": {
			facts{size: large, stands: "nvm", home: true, decision: decided("drain", "", inTime, both), heat: traced},
			"when its layer was stored (policy drain) it went to the pack (the disk keeps up), or to NVM and the pack (hot by profile); which of these is not recorded for one file; " +
				"it was brought to NVM then or later; it is hot (50 % of the starts use it)",
		},
		"drain: full NVM": {
			facts{size: large, stands: "hdd", decision: decided("drain", "", full)},
			"when its layer was stored (policy drain) it went to the pack (NVM has no room)",
		},
		"drain: hot, full NVM then and now": {
			facts{size: large, stands: "hdd", home: true, decision: decided("drain", "", share("pack", "no-room", "hot by profile", 1, large)),
				heat: &hif.Heat{Hot: true, Why: "50 % of the starts use it", Moves: true, Denied: plan.Sum{Files: 3, Bytes: 3 * large}}},
			"when its layer was stored (policy drain) it went to the pack (hot by profile, but NVM has no room); it is hot (50 % of the starts use it); " +
				"the latest plan does not bring it to NVM, where 300 kB of hot files find no room",
		},
		"hdd": {
			facts{size: large, stands: "hdd", home: true, decision: hdd},
			"when its layer was stored (policy hdd) it went to the pack (as the whole layer: policy hdd puts every layer there)",
		},
		"hdd: hot": {
			facts{size: large, stands: "hdd", home: true, decision: hdd, heat: traced},
			"when its layer was stored (policy hdd) it went to the pack (as the whole layer: policy hdd puts every layer there); it is hot (50 % of the starts use it); " +
				"the latest plan does not bring it to NVM",
		},
		"hdd: hot and due": {
			facts{size: large, stands: "hdd", home: true, decision: hdd, heat: &hif.Heat{Hot: true, Why: "it is pinned", Moves: true, Comes: true}},
			"when its layer was stored (policy hdd) it went to the pack (as the whole layer: policy hdd puts every layer there); it is hot (it is pinned); it is to come to NVM",
		},
		"hdd: hot, and nothing moves": {
			facts{size: large, stands: "hdd", home: true, decision: hdd, heat: &hif.Heat{Hot: true, Why: "it is pinned"}},
			"when its layer was stored (policy hdd) it went to the pack (as the whole layer: policy hdd puts every layer there); it is hot (it is pinned); " +
				"it stays on HDD, since files are not moved, by the configuration (hot.migrate)",
		},
		"hdd: brought up by a plan": {
			facts{size: large, stands: "nvm", home: true, decision: hdd, heat: &hif.Heat{Hot: true, Why: "it is pinned", Moves: true}},
			"when its layer was stored (policy hdd) it went to the pack (as the whole layer: policy hdd puts every layer there); it was brought to NVM later; it is hot (it is pinned)",
		},
		"hdd: excluded": {
			facts{size: large, stands: "hdd", home: true, decision: hdd, heat: &hif.Heat{Why: "a rule excludes it", Moves: true}},
			"when its layer was stored (policy hdd) it went to the pack (as the whole layer: policy hdd puts every layer there); it is not hot (a rule excludes it)",
		},
		"lass": {
			facts{size: large, stands: "hdd", home: true, decision: decided("lass", "layer 1 to HDD: 1 other layer still downloads", share("pack", "layer", "", 9, 9*large))},
			"when its layer was stored (policy lass) it went to the pack (as the whole layer: 1 other layer still downloads)",
		},
		"lass: full NVM": {
			facts{size: large, stands: "hdd", home: true, decision: decided("lass", "layer 1 to HDD: it would go to NVM (no other layer is downloading any more), but needs 2.00 MB there and 0 B are left of 5.00 MB free",
				share("pack", "layer", "", 9, 9*large))},
			"when its layer was stored (policy lass) it went to the pack (as the whole layer: it would go to NVM (no other layer is downloading any more), " +
				"but needs 2.00 MB there and 0 B are left of 5.00 MB free)",
		},
		"nvm: at home": {
			facts{size: large, stands: "nvm", hole: true, home: true, decision: nvm, holes: 5 * large, heat: &hif.Heat{Why: "a rule excludes it", Moves: true, Leaves: "traced"}},
			"when its layer was stored (policy nvm) it went to NVM alone (as the whole layer: policy nvm puts every layer there); the pack has it too by now; " +
				"it is not hot (a rule excludes it); it is to leave NVM: traced",
		},
		"nvm: a file more than there was room": {
			facts{size: large, stands: "hdd", decision: nvm, holes: 5 * large},
			"when its layer was stored (policy nvm) it went to the pack (NVM has no room)",
		},
		"nvm: NVM failed": {
			facts{size: large, stands: "hdd", decision: nvm, holes: 3 * large},
			"when its layer was stored (policy nvm) it went to the pack (NVM has no room), or to the pack as NVM failed; which of these is not recorded for one file",
		},
		"hot for another image": {
			facts{size: large, stands: "nvm", hole: true, home: true, decision: drain, heat: &hif.Heat{Hot: true, Why: "it is pinned", Other: "b:1", Moves: true}},
			"when its layer was stored (policy drain) it went to NVM alone (the disk would be late); the pack has it too by now; it is hot for image b:1 (it is pinned)",
		},
		"parts": {
			facts{size: large, stands: "parts", home: true, decision: hdd, heat: traced},
			"when its layer was stored (policy hdd) it went to the pack (as the whole layer: policy hdd puts every layer there); " +
				"NVM has the parts of it that starts touch; the rest is read from the pack; it is hot (50 % of the starts use it)",
		},
		"parts that are not made yet": {
			facts{size: large, stands: "hdd", home: true, decision: hdd, heat: &hif.Heat{Hot: true, Why: "50 % of the starts use it", Moves: true, Parts: true}},
			"when its layer was stored (policy hdd) it went to the pack (as the whole layer: policy hdd puts every layer there); it is hot (50 % of the starts use it); " +
				"of a file of its size only the parts that starts touch belong on NVM",
		},
		"committed by path on HDD": {facts{size: large, stands: "hdd", home: true, directory: true}, "its layer was committed from a directory on HDD, and packed there"},
		"committed by path on NVM": {
			facts{size: large, stands: "nvm", hole: true, directory: true},
			"its layer was committed from a directory on NVM, where its files stayed; it stays there at least until its hole in the pack is filled",
		},
		"unpacked anew": {
			facts{size: large, stands: "hdd", home: true, repaired: true, decision: drain},
			"it went to the pack when its damaged layer was unpacked anew; by which rule is not known",
		},
		"without a decision": {
			facts{size: large, stands: "hdd", home: true},
			"it went to the pack when its layer was stored; no decision is recorded, as where the daemon was restarted during the pull",
		},
		"a decision without the file": {
			facts{size: large, stands: "hdd", decision: decided("drain", "", small)},
			"when its layer was stored (policy drain) it went to the pack, by no rule that is recorded",
		},
	} {
		require.Equal(t, c.want, c.f.reason(), name)
	}
}
