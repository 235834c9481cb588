// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import "fmt"

// Step is what is to be done next for a layer.
type Step int

// The steps. Each is done with the layer's run lock held.
const (
	Nothing Step = iota
	Unpack       // its blob, anew
	Pack         // its staging directory
	Sync         // both tiers
	Fill         // the holes of its pack
	Remove       // all of it
	Damage       // record what was found
)

// String names the step in logs.
func (s Step) String() string {
	return [...]string{"nothing", "unpack", "pack", "sync", "fill", "remove", "damage"}[s]
}

// Found is what stands of a layer.
type Found struct {
	Pack      bool // a pack that is whole as far as its length and footer tell
	Staged    bool // the staging directory
	NVM       bool // the directory of its NVM files
	SameBoot  bool // the machine has not gone down since the layer was stored
	Held      bool // a pull or a caller keeps it though no snapshot uses it
	Expired   bool // no snapshot ever used it, for long
	Running   bool // it is being unpacked right now
	WriteBack bool // holes are to be filled
	Wanted    bool // a caller waits for the layer
	Overdue   bool // it has waited long enough for pulls and starts to be on its devices
}

// powerCut is why a layer is damaged that was not durable.
const powerCut = "the machine went down before it was on the disk"

// mostRepairs bounds how often a layer is unpacked anew without being asked for.
const mostRepairs = 3

// next decides what is to be done for a layer, and why. busy: a pull or a start
// is under way, for which what can wait waits. It is a pure function, and all
// there is of recovery, too.
func next(l Layer, f Found, busy bool) (Step, string) {
	switch {
	case l.Users == 0 && !f.Held && !f.Running && (l.Used || f.Expired || l.State == Unpacking):
		return Remove, "no snapshot uses it"
	case f.Running:
		return Nothing, "it is being unpacked"
	case l.Damaged != "":
		if l.Blob == "" {
			return Nothing, "it came from no blob"
		}
		if l.Repairs >= mostRepairs && !f.Wanted {
			return Nothing, fmt.Sprintf("it was unpacked anew %d times; it is left to who needs it", l.Repairs)
		}
		return Unpack, l.Damaged
	}
	switch l.State {
	case Unpacking:
		if l.Users == 0 {
			return Nothing, "its unpacking failed, and who asked for it was told"
		}
		return Unpack, "its unpacking was interrupted"
	case Staged:
		if !f.Staged {
			return Damage, fmt.Sprintf("the directory that was committed is gone from %s", l.Tier)
		}
		return Pack, "it was committed by path"
	case Stored, Durable, Home:
		switch {
		case l.State == Stored && !f.SameBoot: // whatever stands there
			return Damage, powerCut
		case !f.Pack:
			return Damage, "its pack is gone, cut off or damaged"
		case l.State != Home && l.Holes > 0 && !f.NVM:
			return Damage, "a part of it stood on an NVM device that was lost"
		}
	default:
		return Nothing, fmt.Sprintf("state %q is not known", l.State)
	}
	switch {
	case l.State == Home:
		return Nothing, ""
	case l.State == Stored && (!busy || f.Overdue):
		return Sync, "it is not on its devices yet"
	case l.State == Stored:
		return Nothing, "a pull or a start goes first"
	case !f.WriteBack:
		return Nothing, "holes are not filled by themselves"
	case busy:
		return Nothing, "a pull or a start goes first"
	}
	return Fill, "its pack has holes"
}
