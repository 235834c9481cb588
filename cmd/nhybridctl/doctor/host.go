// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/cmd/internal/config"
	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/control"
	"github.com/nhybrid/nhybrid/snapshotter/host"
)

// Host looks at the kernel and at the filesystems of both tiers, by trial. It needs root. served is false if the daemon says that it serves no regions.
func Host(c config.Config, served bool) []Finding {
	k := &findings{area: "kernel"}
	if os.Geteuid() != 0 {
		k.add(Fail, "run nhybridctl doctor as root", "trial mounts need root")
		return k.all
	}
	nvm, nvmFound := tier("nvm", c.NVMRoot, c)
	hdd, hddFound := tier("hdd", c.Root, c)
	all := append(nvmFound, hddFound...)
	if nvm != nil && !nvm.ReadOnly {
		all = append(all, Regions(*nvm, c, served)...)
	}
	if nvm != nil {
		all = append(all, Trace(*nvm)...)
	}
	if nvm != nil && hdd != nil {
		t := &findings{area: "tiers"}
		if nvm.SameFilesystem(*hdd) {
			t.add(Warn, fmt.Sprintf("mount a fast device at %q", c.NVMRoot), "both tiers stand on the same filesystem, %s at %s: nothing gets faster and the reserve counts twice", nvm.Source, nvm.MountPoint)
		} else {
			t.ok("the tiers stand on two filesystems")
		}
		all = append(all, t.all...)
	}
	var lacks []string
	for _, d := range []*host.Dir{nvm, hdd} { // the kernel is the same on either
		if d == nil || d.ReadOnly {
			continue
		}
		features, what, err := probe(*d)
		if what != "" {
			lacks = append(lacks, what)
			continue
		}
		return append(kernel(features, err), all...)
	}
	if len(lacks) > 0 {
		k.add(Warn, cureFull, "the kernel was not tried: %s", strings.Join(lacks, ", "))
	} else {
		k.add(Warn, "cure the tiers first", "the kernel was not tried: no tier can be written to")
	}
	return append(k.all, all...)
}

// kernel says what a trial on a tier has shown.
func kernel(features host.Features, err error) []Finding {
	f := &findings{area: "kernel"}
	if err == nil {
		err = features.Check()
	}
	if err != nil {
		text, cure, _ := strings.Cut(control.ErrorMessage(err), "; ")
		f.add(Fail, cure, "%s", text)
		return f.all
	}
	how := "without metacopy=on"
	if features.Metacopy {
		how = "with metacopy=on"
	}
	f.ok("Linux %s: overlayfs has data-only layers, %s", features.Kernel, how)
	switch {
	case !features.UseLoop() && features.StackOK:
		f.ok("views are mounted from plain files")
	case features.UseLoop():
		f.ok("views are mounted through loop devices")
	default:
		f.add(Warn, "enable loop devices (CONFIG_BLK_DEV_LOOP)", "views are mounted from plain files, and on this kernel containers cannot mount an overlay of their own then")
	}
	if features.IDMap {
		f.ok("views can be id-mapped, for pods with user namespaces")
	} else {
		f.add(Warn, "run Linux 5.19 or newer with CONFIG_USER_NS", "views cannot be id-mapped: pods with user namespaces do not start")
	}
	return f.all
}

// tier looks at one tier; what it stands on is nil where there is nothing to look at.
func tier(name, root string, c config.Config) (*host.Dir, []Finding) {
	f := &findings{area: name}
	dir, err := host.Existing(root)
	if err != nil {
		f.add(Fail, "choose another directory in the configuration", "%s", control.ErrorMessage(err))
		return nil, f.all
	}
	if name == "nvm" && dir != root && dir != filepath.Dir(root) {
		f.add(Fail, fmt.Sprintf("mount the NVM filesystem at %q, or set nvm_root", filepath.Dir(root)), "%q does not exist, nor does the directory above it", root)
		return nil, f.all
	}
	d, err := host.Facts(dir)
	if err != nil {
		f.add(Fail, "see dmesg for errors of the device", "%s", control.ErrorMessage(err))
		return nil, f.all
	}
	if d.ReadOnly {
		f.add(Fail, fmt.Sprintf("mount -o remount,rw %s; look in dmesg why it is so", d.MountPoint), "%q is read-only", root)
		return &d, f.all
	}
	f.ok("%s is on %s (%s at %s), %s of %s free", root, d.Filesystem, d.Source, d.MountPoint, placement.FormatBytes(d.Free), placement.FormatBytes(d.Total))
	if d.Inodes > 0 {
		f.ok("%d of %d inodes free", d.InodesFree, d.Inodes)
	}
	room(f, name, d, c)
	if name == "nvm" {
		nvm(f, d, c)
	} else if d.Rotational == host.No {
		f.ok("the device does not seek: it is not a disk that nhybrid would have to spare")
	}
	upper(f, d, c, name)
	return &d, f.all
}

// Read-ahead is counted with what starts touch. The kernel's default, 128 KiB, is made for disks that seek; docs/hif.md has
// what less of it saves.
const (
	mostReadAhead   = 512 << 10
	enoughReadAhead = 16 << 10
)

func nvm(f *findings, d host.Dir, c config.Config) {
	switch {
	case d.Rotational == host.Yes:
		f.add(Warn, "put nvm_root on persistent memory or a fast disk", "the NVM tier stands on a disk that has to seek")
	case d.DAX == host.Yes:
		f.ok("DAX: programs run from the device without a copy in the page cache")
	case strings.HasPrefix(d.Source, "/dev/pmem"):
		f.add(Warn, fmt.Sprintf("mount %s with -o dax=always (ext4, or xfs without reflink, on an fsdax namespace)", d.Source), "persistent memory without DAX: everything is copied to the page cache")
	default:
		f.ok("no DAX: files go through the page cache, as on any disk")
	}
	if c.Hot.Trace && d.DAX != host.Yes && d.ReadAhead > enoughReadAhead {
		text := fmt.Sprintf("the kernel reads %s ahead on this device, so that starts seem to touch more of large files than they do, and more of them stays on NVM",
			placement.FormatBytes(d.ReadAhead))
		cure := fmt.Sprintf("echo %d > /sys/class/bdi/%d:%d/read_ahead_kb, by a udev rule to keep it", enoughReadAhead>>10, unix.Major(d.Dev), unix.Minor(d.Dev))
		if d.ReadAhead > mostReadAhead {
			f.add(Warn, cure, "%s", text)
		} else {
			f.ok("%s; to change that, %s", text, cure)
		}
	}
}

// upper tries what only the tier of writable directories needs.
func upper(f *findings, d host.Dir, c config.Config, name string) {
	if name == "hdd" { // the NVM tier is tried with the kernel
		features, lacks, err := probe(d)
		switch {
		case lacks != "":
			f.add(Warn, cureFull, "whether overlayfs takes the filesystem for its writable directories was not tried: %s", lacks)
		case err != nil:
			f.add(Fail, "see dmesg for errors of the device", "overlayfs was not tried: %s", control.ErrorMessage(err))
		case !features.DataOnly:
			f.add(Fail, "use ext4 or xfs (with ftype=1)", "overlayfs does not take the filesystem for its writable directories")
		}
	}
	if c.Snapshot.UpperTier != name {
		return
	}
	if full(d) { // a trial would run into that limit, not into its own
		f.add(Warn, cureFull, "project quotas were not tried: %s", lack(d))
		return
	}
	switch err := host.TryProjectQuota(d.Path); {
	case err == nil:
		f.ok("project quotas: the label containerd.io/snapshot/max-size is honoured")
	case errors.Is(err, errdefs.ErrNotImplemented):
		f.add(Warn, "mount ext4 (tune2fs -O project,quota) or xfs with prjquota, if containers are to be limited", "no project quotas: the label containerd.io/snapshot/max-size is ignored")
	default:
		f.add(Warn, "see dmesg for errors of the device", "project quotas were not tried: %s", control.ErrorMessage(err))
	}
}

// Fsync measures what one small write takes until it is on the disk of dir: the median of a few.
func Fsync(dir string) (time.Duration, error) {
	file, err := os.CreateTemp(dir, ".nhybrid-doctor-")
	if err != nil {
		return 0, fmt.Errorf("measure fsync: %w", err)
	}
	defer os.Remove(file.Name())
	defer file.Close()
	var took []time.Duration
	for range 7 {
		start := time.Now()
		if _, err := file.WriteAt(make([]byte, 4096), 0); err != nil {
			return 0, fmt.Errorf("measure fsync: %w", err)
		}
		if err := unix.Fdatasync(int(file.Fd())); err != nil {
			return 0, fmt.Errorf("measure fsync: %w", err)
		}
		took = append(took, time.Since(start))
	}
	slices.Sort(took)
	return took[len(took)/2], nil
}
