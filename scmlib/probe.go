// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scmlib

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/scmlib/internal/persist"
)

// probe is what can be learned about the file behind a mapping.
type probe struct {
	fstype  string
	mount   string
	opts    string
	under   string // where the data of this filesystem lies, if it is memory after all: "loop over tmpfs"
	upper   *probe // of an overlay, where it can be seen
	dax     bool
	mapSync bool
	eadr    bool
}

var fsNames = map[int64]string{
	unix.TMPFS_MAGIC: "tmpfs", unix.RAMFS_MAGIC: "ramfs", unix.HUGETLBFS_MAGIC: "hugetlbfs", unix.OVERLAYFS_SUPER_MAGIC: "overlay",
	unix.EXT4_SUPER_MAGIC: "ext4", unix.XFS_SUPER_MAGIC: "xfs", unix.BTRFS_SUPER_MAGIC: "btrfs", unix.F2FS_SUPER_MAGIC: "f2fs",
	0x2fc12fc1: "zfs", 0xca451a4e: "bcachefs", unix.FUSE_SUPER_MAGIC: "fuse", unix.NFS_SUPER_MAGIC: "nfs", unix.V9FS_MAGIC: "9p",
}

func probeFile(f *os.File, path string) *probe {
	p := &probe{eadr: eadr("/sys/bus/nd/devices")}
	var sfs unix.Statfs_t
	if unix.Fstatfs(int(f.Fd()), &sfs) == nil {
		if p.fstype = fsNames[sfs.Type]; p.fstype == "" {
			p.fstype = fmt.Sprintf("filesystem %#x", uint64(sfs.Type))
		}
	}
	var stx unix.Statx_t
	if unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_BASIC_STATS|unix.STATX_MNT_ID, &stx) == nil {
		p.dax = stx.Attributes&unix.STATX_ATTR_DAX != 0
		p.under = memoryUnder("/sys/dev/block", stx.Dev_major, stx.Dev_minor)
		if stx.Mask&unix.STATX_MNT_ID != 0 {
			p.readMount("/proc/self/mountinfo", stx.Mnt_id)
		}
	}
	if p.mount == "" {
		p.mount = "the mount that holds " + path
	}
	if p.fstype == "overlay" {
		p.upper = upperOf(p.opts)
	}
	return p
}

// readMount finds the mount in mountinfo (proc(5)): id, parent, device, root, mount point, options, optional fields, "-", type, source, super options.
func (p *probe) readMount(file string, id uint64) {
	b, err := os.ReadFile(file)
	if err != nil {
		return
	}
	for l := range strings.Lines(string(b)) {
		f := strings.Fields(l)
		if len(f) < 6 || f[0] != fmt.Sprint(id) {
			continue
		}
		for i := 6; i+3 < len(f); i++ {
			if f[i] == "-" {
				p.fstype, p.opts = f[i+1], f[5]+","+f[i+3]
				p.mount = fmt.Sprintf("%s %q on %q", f[i+1], f[i+2], f[4])
				return
			}
		}
	}
}

// memoryUnder tells whether a block device is memory in disguise: a RAM disk (major 1), zram, or a loop device over a memory filesystem (major 7).
func memoryUnder(sys string, major, minor uint32) string {
	dev := filepath.Join(sys, fmt.Sprintf("%d:%d", major, minor))
	name, _ := os.Readlink(dev)
	base := filepath.Base(name)
	switch {
	case major == 1 && strings.HasPrefix(base, "ram"):
		return "a RAM disk"
	case strings.HasPrefix(base, "zram"):
		return "zram"
	case major == 7:
		back, err := os.ReadFile(filepath.Join(dev, "loop/backing_file"))
		if err != nil {
			return "a loop device whose file cannot be seen"
		}
		var s unix.Statfs_t
		if unix.Statfs(strings.TrimSpace(string(back)), &s) != nil {
			return "a loop device whose file cannot be seen"
		}
		switch n := fsNames[s.Type]; n {
		case "tmpfs", "ramfs", "hugetlbfs":
			return "a loop device over " + n
		}
	}
	return ""
}

// upperOf looks at the upper directory of an overlay. In a container it is usually out of sight.
func upperOf(opts string) *probe {
	for o := range strings.SplitSeq(opts, ",") {
		dir, ok := strings.CutPrefix(o, "upperdir=")
		if !ok {
			continue
		}
		f, err := os.OpenFile(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil
		}
		defer f.Close()
		p := probeFile(f, dir)
		if p.fstype == "overlay" {
			return nil
		}
		return p
	}
	return nil
}

// eadr tells whether power loss spares the caches: every region of persistent memory must say so (Documentation/ABI/testing/sysfs-bus-nvdimm).
func eadr(dir string) bool {
	domains, _ := filepath.Glob(filepath.Join(dir, "region*"))
	for _, d := range domains {
		b, err := os.ReadFile(filepath.Join(d, "persistence_domain"))
		if err != nil || strings.TrimSpace(string(b)) != "cpu_cache" {
			return false
		}
	}
	return len(domains) > 0
}

// verdict is what a mapping gives, and whose doing it is.
type verdict struct {
	gran   Granularity
	dur    Durability
	why    string
	blame  string // filesystem and mount
	mode   Mode
	forced bool
}

// judge decides what may be promised. It is the only place that does.
func (p *probe) judge(mode Mode) verdict {
	v := verdict{blame: p.mount, mode: mode}
	memory := p.fstype == "tmpfs" || p.fstype == "ramfs" || p.fstype == "hugetlbfs"
	switch {
	case p.mapSync && p.eadr:
		v.gran, v.dur, v.why = Byte, PowerLoss, "MAP_SYNC is accepted, and every persistence domain holds the processor caches"
	case p.mapSync:
		v.gran, v.dur, v.why = CacheLine, PowerLoss, "MAP_SYNC is accepted"
	case memory:
		v.gran, v.dur, v.why = CacheLine, ProcessCrash, p.fstype+" is memory of the system: nothing in it survives a crash of the system"
	default:
		v.gran = Page
		v.dur, v.why = p.pageDurability()
	}
	if persist.Best() == persist.None && v.gran == CacheLine {
		v.gran, v.why = Page, v.why+"; this processor has no known instruction to flush a cache line"
	}
	if (mode == Volume || mode == Storage) && v.gran < Page {
		v.gran, v.why = Page, v.why+"; msync by choice of mode "+mode.String()
	}
	return v
}

func (p *probe) pageDurability() (Durability, string) {
	has := func(opt string) bool { return strings.Contains(","+p.opts+",", ","+opt+",") }
	dax := "it is not mounted with DAX"
	if p.dax {
		dax = "the file is DAX, but MAP_SYNC was refused"
	}
	switch p.fstype {
	case "ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "bcachefs":
		switch {
		case p.under != "":
			return ProcessCrash, fmt.Sprintf("%s; %s lies on %s", dax, p.fstype, p.under)
		case has("nobarrier") || has("barrier=0"):
			return ProcessCrash, fmt.Sprintf("%s; %s is mounted without barriers", dax, p.fstype)
		}
		return PowerLoss, fmt.Sprintf("%s: msync through the page cache of %s", dax, p.fstype)
	case "overlay":
		switch {
		case has("volatile"):
			return ProcessCrash, "overlayfs is mounted volatile: it does not sync"
		case p.upper == nil:
			return ProcessCrash, "overlayfs refuses MAP_SYNC, and what lies under it cannot be seen from here; use a mount of its own for the region"
		case p.upper.fstype == "tmpfs" || p.upper.fstype == "ramfs":
			return ProcessCrash, "overlayfs refuses MAP_SYNC; its upper directory is on " + p.upper.fstype
		}
		d, why := p.upper.pageDurability()
		return d, "overlayfs refuses MAP_SYNC; its upper directory: " + why
	}
	return ProcessCrash, "nothing is known of what " + p.fstype + " does with msync"
}

// override applies SCM_FORCE_GRANULARITY and SCM_FORCE_DURABILITY, which exist for tests.
func (v *verdict) override(getenv func(string) string) error {
	switch s := getenv("SCM_FORCE_GRANULARITY"); s {
	case "":
	case "byte", "cacheline", "page":
		v.gran = map[string]Granularity{"byte": Byte, "cacheline": CacheLine, "page": Page}[s]
		v.forced = true
	default:
		return fmt.Errorf("SCM_FORCE_GRANULARITY=%q: use byte, cacheline or page", s)
	}
	switch s := getenv("SCM_FORCE_DURABILITY"); s {
	case "":
	case "volatile", "process", "power":
		v.dur = map[string]Durability{"volatile": Volatile, "process": ProcessCrash, "power": PowerLoss}[s]
		v.forced = true
	default:
		return fmt.Errorf("SCM_FORCE_DURABILITY=%q: use volatile, process or power", s)
	}
	return nil
}

// satisfies names what is missing and whose fault it is.
func (v *verdict) satisfies(o *Options) error {
	want := o.Require.Granularity
	if o.Mode == Mapping && (want == AnyGranularity || want > CacheLine) {
		want = CacheLine
	}
	if want != AnyGranularity && v.gran > want {
		return fmt.Errorf("%w: %s is required, %s gives %s: %s", ErrGranularity, want, v.blame, v.gran, v.why)
	}
	if v.dur < o.Require.Durability {
		return fmt.Errorf("%w: it must survive %s, %s gives %s: %s", ErrDurability, o.Require.Durability, v.blame, v.dur, v.why)
	}
	return nil
}
