// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package placement

import (
	"fmt"
	"strings"
)

// Share is the files of a layer that one rule sent to one place.
type Share struct {
	Place Place  `json:"place"`
	Rule  Rule   `json:"rule"`
	HotBy string `json:"hot_by,omitempty"`
	Files int64  `json:"files"`
	Bytes int64  `json:"bytes"` // of data
}

// Summary counts where the files of one layer went, and why. The zero value is empty and ready. Not for concurrent use.
type Summary struct {
	Shares []Share `json:"shares"` // in the order in which they began
}

// Add counts one decision.
func (s *Summary) Add(d FileDecision) {
	hotBy := ""
	if d.File.Hot {
		hotBy = d.heat()
	}
	for i := range s.Shares {
		if h := &s.Shares[i]; h.Place == d.Place && h.Rule == d.Rule && h.HotBy == hotBy {
			h.Files++
			h.Bytes += max(d.File.Size, 0)
			return
		}
	}
	s.Shares = append(s.Shares, Share{Place: d.Place, Rule: d.Rule, HotBy: hotBy, Files: 1, Bytes: max(d.File.Size, 0)})
}

// Bytes returns the bytes of data that went to one place.
func (s Summary) Bytes(p Place) int64 {
	var n int64
	for _, h := range s.Shares {
		if h.Place == p {
			n += h.Bytes
		}
	}
	return n
}

// NVMBytes returns the bytes of data on NVM.
func (s Summary) NVMBytes() int64 { return s.Bytes(PlaceNVM) + s.Bytes(PlaceBoth) }

// Decision returns what is recorded of a layer whose files were placed one by one. in is the state when its unpacking began. The tier
// is NVM if some of the data stands there alone, so that the layer needs NVM until its pack is whole; else HDD. Admitted is false
// if NVM had no room for a file that the policy wanted there.
func (s Summary) Decision(p Policy, in Input) Decision {
	d := Decision{Tier: HDD, Policy: p.Name(), LDL: LDL(in), Admitted: true, Input: in, Files: &s}
	var why []string
	for _, h := range s.Shares {
		if h.Place == PlaceNVM {
			d.Tier = NVM
		}
		d.Admitted = d.Admitted && h.Rule != RuleNoRoom && h.Rule != RuleNoInode
		why = append(why, h.Clause())
	}
	if len(why) == 0 {
		why = []string{"all of it stands in the metadata"}
	}
	d.Reason = fmt.Sprintf("layer %d to %s: %s", in.Index, strings.ToUpper(d.Tier.String()), strings.Join(why, "; "))
	return d
}

// Clause says what the share is and why, as a part of a sentence.
func (h Share) Clause() string {
	return fmt.Sprintf("%s in %s %s (%s)", FormatBytes(h.Bytes), count(int(h.Files), "file", "files"), h.To(), h.Because())
}

// To says where the files of the share were written, as a part of a sentence.
func (h Share) To() string {
	return map[Place]string{PlacePack: "to the pack", PlaceNVM: "to NVM alone", PlaceBoth: "to NVM and the pack"}[h.Place]
}

// Because says what the rule of the share found, as a part of a sentence.
func (h Share) Because() string {
	because := map[Rule]string{
		RuleHot: h.HotBy, RuleInTime: "the disk keeps up", RuleLate: "the disk would be late", RuleSmall: "too small for NVM", RuleNoRoom: "NVM has no room", RuleNoInode: "NVM has too few inodes",
		RuleUnknown: "a rate is not known yet", RuleLayer: "as the whole layer",
	}[h.Rule]
	if (h.Rule == RuleNoRoom || h.Rule == RuleNoInode) && h.HotBy != "" {
		return h.HotBy + ", but " + because
	}
	return because
}

// MayHold reports whether a file of the given size may be one of the share, which has only a number of files and their bytes.
func (h Share) MayHold(size int64) bool {
	if h.Bytes < size || h.Files == 1 && h.Bytes != size {
		return false
	}
	return h.Rule != RuleSmall || size < LeastLate
}
