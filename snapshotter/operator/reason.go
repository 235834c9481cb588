// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package operator

import (
	"fmt"
	"slices"
	"strings"

	"github.com/nhybrid/nhybrid/hif"
	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/control"
)

// facts are what is known of why the data of one file stands where it does. Nothing is recorded for a single file: the pack says whether
// it left a hole, and the layer's decision how many files went where by which rule.
type facts struct {
	size   int64
	stands string // "nvm", "parts" or "hdd", as in control.File
	hole   bool   // the file went to NVM alone when the layer was stored
	home   bool   // the pack of the layer is whole

	// Of the layer.
	directory bool              // it was packed from a directory, not unpacked from a blob
	repaired  bool              // it was unpacked anew after damage
	holes     int64             // bytes that went to NVM alone
	decision  *control.Decision // nil: none is recorded

	heat *hif.Heat // nil: not known
}

// reason says why the data of the file stands where it does, as a clause.
func (f facts) reason() string {
	clauses := []string{f.stored(), f.since()}
	clauses = append(clauses, f.hot()...)
	return strings.Join(slices.DeleteFunc(clauses, func(s string) bool { return s == "" }), "; ")
}

// stored says where the file went when its layer was stored, and by which rule.
func (f facts) stored() string {
	to := "to the pack"
	if f.hole {
		to = "to NVM alone"
	}
	switch {
	case f.directory && f.hole:
		return "its layer was committed from a directory on NVM, where its files stayed"
	case f.directory:
		return "its layer was committed from a directory on HDD, and packed there"
	case f.repaired:
		return fmt.Sprintf("it went %s when its damaged layer was unpacked anew; by which rule is not known", to)
	case f.decision == nil:
		return fmt.Sprintf("it went %s when its layer was stored; no decision is recorded, as where the daemon was restarted during the pull", to)
	}
	when := fmt.Sprintf("when its layer was stored (policy %s) it went ", f.decision.GetPolicy())
	shares := f.candidates()
	rules := f.rules(shares)
	switch {
	case len(rules) == 0:
		return when + to + ", by no rule that is recorded"
	case len(rules) == 1 && len(shares) <= 1:
		return when + rules[0]
	}
	return when + strings.Join(rules, ", or ") + "; which of these is not recorded for one file"
}

// candidates are the recorded shares that the file may be one of.
func (f facts) candidates() (all []placement.Share) {
	for _, s := range f.decision.GetFiles() {
		if h, ok := s.Placed(); ok && (h.Place == placement.PlaceNVM) == f.hole && h.MayHold(f.size) {
			all = append(all, h)
		}
	}
	return all
}

// refused reports whether files that a rule sent to NVM alone may have gone to the pack since NVM failed: of such files the pack has
// fewer bytes of holes than the decision counts. Files that a later entry of the layer has replaced make the
// same difference, and a failure while a file goes to both places makes none.
func (f facts) refused() bool {
	return !f.hole && f.sentToNVM() > f.holes
}

// sentToNVM is the bytes that the recorded rules sent to NVM alone.
func (f facts) sentToNVM() (bytes int64) {
	for _, s := range f.decision.GetFiles() {
		if s.GetPlace() == placement.PlaceNVM.String() {
			bytes += s.GetBytes()
		}
	}
	return bytes
}

// rules words the shares, those of one place together: "to the pack (the disk keeps up, or too small for NVM)".
func (f facts) rules(shares []placement.Share) (all []string) {
	var to []string
	why := map[string][]string{}
	for _, h := range shares {
		because := h.Because()
		if cause := f.decision.Cause(); h.Rule == placement.RuleLayer && cause != "" {
			because += ": " + cause
		}
		if !slices.Contains(to, h.To()) {
			to = append(to, h.To())
		}
		why[h.To()] = append(why[h.To()], because)
	}
	for _, t := range to {
		all = append(all, fmt.Sprintf("%s (%s)", t, strings.Join(why[t], ", or ")))
	}
	if f.refused() {
		all = append(all, "to the pack as NVM failed")
	}
	return all
}

// since says what has changed since the layer was stored.
func (f facts) since() string {
	wentToNVM, wentToPack := f.hole, f.refused() || f.repaired && !f.hole
	if !f.directory && !f.repaired {
		for _, h := range f.candidates() {
			wentToNVM = wentToNVM || h.Place.OnNVM()
			wentToPack = wentToPack || h.Place == placement.PlacePack
		}
	}
	switch {
	case f.stands == "parts":
		return "NVM has the parts of it that starts touch; the rest is read from the pack"
	case f.stands == "nvm" && f.hole && f.home:
		return "the pack has it too by now"
	case f.stands == "nvm" && f.hole:
		return "it stays there at least until its hole in the pack is filled"
	case f.stands == "nvm" && f.repaired:
		return "a copy stands on NVM"
	case f.stands == "nvm" && !wentToNVM:
		return "it was brought to NVM later"
	case f.stands == "nvm" && wentToPack:
		return "it was brought to NVM then or later"
	case f.stands == "hdd" && wentToNVM && !wentToPack:
		return "it has left NVM since"
	}
	return ""
}

// hot says what is known of the starts that use the file, and what the latest plan does with it.
func (f facts) hot() (clauses []string) {
	h := f.heat
	switch {
	case h == nil || h.Why == "" && !h.Hot:
		return nil
	case h.Hot && h.Other != "":
		clauses = append(clauses, fmt.Sprintf("it is hot for image %s (%s)", h.Other, h.Why))
	case h.Hot:
		clauses = append(clauses, fmt.Sprintf("it is hot (%s)", h.Why))
	case h.Settled:
		clauses = append(clauses, fmt.Sprintf("it is not hot (%s), and only hot files of its layer stay on NVM", h.Why))
	default:
		clauses = append(clauses, fmt.Sprintf("it is not hot (%s)", h.Why))
	}
	switch {
	case f.stands == "nvm" && h.Leaves != "" && h.Moves:
		clauses = append(clauses, "it is to leave NVM: "+h.Leaves)
	case f.stands != "hdd" || !h.Hot:
	case !h.Moves:
		clauses = append(clauses, "it stays on HDD, since files are not moved, by the configuration (hot.migrate)")
	case h.Comes:
		clauses = append(clauses, "it is to come to NVM")
	case h.Parts:
		clauses = append(clauses, "of a file of its size only the parts that starts touch belong on NVM")
	case h.Denied.Files > 0:
		clauses = append(clauses, fmt.Sprintf("the latest plan does not bring it to NVM, where %s of hot files find no room", placement.FormatBytes(h.Denied.Bytes)))
	default:
		clauses = append(clauses, "the latest plan does not bring it to NVM")
	}
	return clauses
}
