// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"errors"

	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/cmd/internal/config"
	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/host"
)

// Shares of a filesystem below which doctor warns, in per cent.
const (
	fewInodes = 5
	littleHDD = 1
)

// room looks at what a tier has left, in bytes and in inodes alike. NVM without room is normal: files go to HDD. An HDD
// without room fails pulls.
func room(f *findings, name string, d host.Dir, c config.Config) {
	more := "remove images (nhybridctl du shows what takes the room), or enlarge the filesystem"
	free := placement.FormatBytes(d.Free)
	switch reserve := c.Placement.NVMReserve.Of(d.Total); {
	case name == "nvm" && d.Free <= reserve:
		f.add(Warn, "remove images, or lower placement.nvm_reserve", "%s are free and %s are to stay free: new files go to HDD", free, placement.FormatBytes(reserve))
	case name == "hdd" && d.Free == 0:
		f.add(Fail, more, "the filesystem at %s is full: no pull succeeds", d.MountPoint)
	case name == "hdd" && d.Free < d.Total/100*littleHDD:
		f.add(Warn, more, "only %s of %s are free: pulls of larger images fail", free, placement.FormatBytes(d.Total))
	}
	if d.Inodes <= 0 { // the filesystem has no limit of them
		return
	}
	cure := "remove images, or make the filesystem anew with more inodes (mkfs.ext4 -N, mkfs.xfs -i maxpct=)"
	switch few := d.InodesFree < d.Inodes/100*fewInodes; {
	case name == "hdd" && d.InodesFree == 0:
		f.add(Fail, cure, "no inode of %d is free on %s: no pull succeeds", d.Inodes, d.MountPoint)
	case name == "nvm" && d.InodesFree == 0:
		f.add(Warn, cure, "no inode of %d is free on %s: new files go to HDD, and containers that write on NVM fail", d.Inodes, d.MountPoint)
	case name == "nvm" && few:
		f.add(Warn, cure, "only %d of %d inodes are free: new files soon go to HDD", d.InodesFree, d.Inodes)
	case few:
		f.add(Warn, cure, "only %d of %d inodes are free", d.InodesFree, d.Inodes)
	}
}

// noRoom tells whether a trial failed for want of room, and what d lacks then.
func noRoom(err error, d host.Dir) (lacks string, is bool) {
	if !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
		return "", false
	}
	return lack(d), true
}

// full tells whether nothing can be made on d.
func full(d host.Dir) bool { return d.Free == 0 || (d.Inodes > 0 && d.InodesFree == 0) }

func lack(d host.Dir) string {
	if d.Inodes > 0 && d.InodesFree == 0 {
		return "no inode is free on " + d.MountPoint
	}
	return d.MountPoint + " is full"
}

// probe has the kernel tried on d. Of a full filesystem, on which overlayfs may fail at any step, it tells what it lacks.
func probe(d host.Dir) (features host.Features, lacks string, err error) {
	features, err = host.Probe(d.Path, host.Image())
	if lacks, is := noRoom(err, d); is {
		return features, lacks, nil
	}
	if err == nil && !features.DataOnly && full(d) {
		return features, lack(d), nil
	}
	return features, "", err
}

const cureFull = "make room, and run nhybridctl doctor again"
