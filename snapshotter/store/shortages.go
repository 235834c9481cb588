// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"fmt"

	"github.com/nhybrid/nhybrid/placement"
)

// What helps against a shortage of bytes and of inodes.
const (
	CureRoom   = "remove images (nhybridctl du shows what takes the room), or enlarge the filesystem"
	cureInodes = "remove images, or make the filesystem anew with more inodes (mkfs.ext4 -N, mkfs.xfs -i maxpct=)"
)

// NoPull is what a shortage says that fails all pulls.
const NoPull = "no pull succeeds"

// HDD is short of bytes below one part of it in littleHDD, and of inodes below one in fewInodes.
const (
	littleHDD = 100
	fewInodes = 20
)

// Shortages says what a tier lacks, in bytes and in inodes: one line each, with the cure behind the last semicolon. The daemon's
// warnings and doctor use the same words, and the part before the colon names the shortage.
func (r Room) Shortages(t placement.Tier) (all []string) {
	free, total := placement.FormatBytes(r.Free), placement.FormatBytes(r.Total)
	switch {
	case t == placement.NVM && r.Free <= r.Reserve:
		all = append(all, fmt.Sprintf("NVM is full: %s free, the reserve is %s, so that layers and writable directories go to HDD%s; %s",
			free, placement.FormatBytes(r.Reserve), failing(r.Free), CureRoom))
	case t == placement.HDD && r.Free == 0:
		all = append(all, "HDD is full: "+NoPull+"; "+CureRoom)
	case t == placement.HDD && r.Free < r.Total/littleHDD:
		all = append(all, fmt.Sprintf("HDD is nearly full: %s of %s free, pulls of larger images fail; %s", free, total, CureRoom))
	}
	switch _, inodes := r.Left(); {
	case r.Inodes <= 0:
	case t == placement.NVM && inodes <= LeastInodes:
		all = append(all, fmt.Sprintf("NVM has too few inodes: %d of %d free, the reserve is %d, so that layers and writable directories go to HDD%s; %s",
			r.InodesFree, r.Inodes, r.InodesReserve, failing(r.InodesFree), cureInodes))
	case t == placement.HDD && r.InodesFree == 0:
		all = append(all, fmt.Sprintf("HDD has no inode free of %d: %s; %s", r.Inodes, NoPull, cureInodes))
	case t == placement.HDD && r.InodesFree < r.Inodes/fewInodes:
		all = append(all, fmt.Sprintf("HDD has few inodes: %d of %d free, without which pulls and containers fail; %s", r.InodesFree, r.Inodes, cureInodes))
	}
	return all
}

// failing says what nothing at all left on NVM means for the containers that write there.
func failing(free int64) string {
	if free > 0 {
		return ""
	}
	return ", and containers that write on NVM fail"
}
