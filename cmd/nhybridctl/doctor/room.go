// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"errors"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/cmd/internal/config"
	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/control"
	"github.com/nhybrid/nhybrid/snapshotter/host"
	"github.com/nhybrid/nhybrid/snapshotter/store"
)

// room looks at what a tier has left, in bytes and in inodes alike, and says it in the daemon's words. NVM without room is normal:
// files go to HDD. An HDD without room fails pulls.
func room(f *findings, name string, d host.Dir, c config.Config) {
	t, r := placement.HDD, store.Room{Free: d.Free, Total: d.Total, InodesFree: d.InodesFree, Inodes: d.Inodes}
	if name == "nvm" {
		t = placement.NVM
		r.Reserve, r.InodesReserve = c.Placement.NVMReserve.Of(d.Total), c.Placement.NVMReserve.Inodes(d.Total, d.Inodes)
	}
	for _, s := range r.Shortages(t) {
		level := Warn
		if strings.Contains(s, store.NoPull) {
			level = Fail
		}
		text, cure := control.Cure(s)
		f.add(level, cure, "%s", text)
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
