// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package placement

import (
	"fmt"
	"strings"
)

// Reason returns the decision as one sentence for a person.
func (d FileDecision) Reason() string {
	to := map[Place]string{
		PlacePack: "to the pack on HDD", PlaceNVM: "to NVM, and to the pack on HDD later", PlaceBoth: "to NVM and to the pack on HDD",
	}[d.Place]
	return to + ": " + d.because()
}

// because is the part of the sentence that follows where the file goes.
func (d FileDecision) because() string {
	in := d.Input
	switch d.Rule {
	case RuleHot:
		if !in.inTime(d.File.Size) && in.unknown() != "" {
			return fmt.Sprintf("it is %s; %s is not known yet, so the pack takes it too", d.heat(), in.unknown())
		}
		return fmt.Sprintf("it is %s; %s", d.heat(), d.deadline())
	case RuleInTime, RuleLate:
		return d.deadline()
	case RuleSmall:
		return fmt.Sprintf("%s, but a file below %s costs more on NVM than it spares the disk", d.deadline(), FormatBytes(LeastLate))
	case RuleUnknown:
		return in.unknown() + " is not known yet, and the pull does not wait for it"
	case RuleLayer:
		return fmt.Sprintf("policy %s places whole layers, and this layer goes to %s", d.Policy, strings.ToUpper(in.Tier.String()))
	case RuleNoRoom, RuleNoInode:
		wanted := d.deadline
		switch {
		case d.File.Hot:
			wanted = func() string { return "it is " + d.heat() }
		case in.Tier == NVM:
			wanted = func() string { return "policy " + d.Policy + " places its layer there" }
		}
		return fmt.Sprintf("it would go to NVM (%s), but %s", wanted(), d.shortage())
	}
	return "nothing was decided"
}

func (d FileDecision) heat() string {
	if d.File.HotBy == "" {
		return "hot"
	}
	return "hot by " + d.File.HotBy
}

// deadline says how the disk compares with the pull.
func (d FileDecision) deadline() string {
	in, size := d.Input, d.File.Size
	takes := fmt.Sprintf("the disk has it in %s (%s to write at %s)", seconds(in.disk(size)), FormatBytes(in.queue(size)), FormatRate(in.HDDRate))
	if in.inTime(size) {
		return fmt.Sprintf("%s, before the pull can end, in %s at the earliest", takes, seconds(in.rest()))
	}
	return fmt.Sprintf("%s, and the pull may end in %s", takes, seconds(in.rest()))
}

// shortage says what NVM lacks.
func (d FileDecision) shortage() string {
	in := d.Input
	if need := in.needs(d.File.Size); need > in.room() {
		return fmt.Sprintf("needs %s there and %s are left of %s free", FormatBytes(need), FormatBytes(in.room()), FormatBytes(in.NVMFree))
	}
	return fmt.Sprintf("needs up to %d inodes there and %d are left", 1+newDirs, in.NVMInodesFree)
}
