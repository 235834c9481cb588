// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	nvm, hdd       = "/nvm", "/hdd"
	nvmDev, hddDev = "/dev/pmem0", "/dev/vdb"
)

// span is a range of physical addresses, the last one included.
type span struct{ first, last uint64 }

// makeNamespace turns the NVDIMM into a block device that can be mapped (mode fsdax). Without it ext4 refuses DAX and XFS
// silently does without. The namespace is kept on the device, so it is made only once.
func (g *guest) makeNamespace(ctx context.Context) error {
	if g.boot == "first" {
		if _, err := output(ctx, "ndctl", "create-namespace", "--force", "--reconfig=namespace0.0", "--mode=fsdax", "--map=mem"); err != nil {
			return err
		}
	}
	if err := poll(ctx, func() error { _, err := os.Stat(nvmDev); return err }); err != nil {
		return err
	}
	var err error
	g.pmem, err = persistentMemory("/proc/iomem")
	return err
}

// persistentMemory reads from the map of physical addresses where there is persistent memory.
func persistentMemory(iomem string) ([]span, error) {
	f, err := os.Open(iomem)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var spans []span
	for lines := bufio.NewScanner(f); lines.Scan(); {
		where, what, _ := strings.Cut(lines.Text(), " : ")
		if !strings.HasPrefix(what, "Persistent Memory") {
			continue
		}
		var s span
		if _, err := fmt.Sscanf(strings.TrimSpace(where), "%x-%x", &s.first, &s.last); err != nil {
			return nil, fmt.Errorf("read %s line %q: %w", iomem, lines.Text(), err)
		}
		spans = append(spans, s)
	}
	if len(spans) == 0 {
		return nil, fmt.Errorf("find persistent memory in %s: %w", iomem, errNone)
	}
	return spans, nil
}

func (g *guest) isPmem(address uint64) bool {
	for _, s := range g.pmem {
		if s.first <= address && address <= s.last {
			return true
		}
	}
	return false
}

// makeFilesystems makes those of both tiers, on the first boot.
func (g *guest) makeFilesystems(ctx context.Context) error {
	// ext4 keeps project quotas in inodes that it wants to be told of; XFS always can.
	ext4 := []string{"-q", "-F", "-O", "quota,project", "-E", "quotatype=prjquota"}
	mkfs := append([]string{"mkfs.ext4"}, append(ext4, nvmDev)...)
	if g.fs == "xfs" {
		mkfs = []string{"mkfs.xfs", "-q", "-f", "-m", "reflink=0", nvmDev}
	}
	if _, err := output(ctx, mkfs[0], mkfs[1:]...); err != nil {
		return err
	}
	_, err := output(ctx, "mkfs.ext4", append(ext4, hddDev)...)
	return err
}

// mountTiers mounts the two tiers. After a power cut the journals are replayed.
func (g *guest) mountTiers(context.Context) error {
	if err := unix.Mount(nvmDev, nvm, g.fs, unix.MS_NOATIME, "dax=always,prjquota"); err != nil {
		return fmt.Errorf("mount %s of %s with DAX: %w", g.fs, nvmDev, err)
	}
	if err := unix.Mount(hddDev, hdd, "ext4", unix.MS_NOATIME, "prjquota"); err != nil {
		return fmt.Errorf("mount ext4 of %s: %w", hddDev, err)
	}
	return os.MkdirAll(filepath.Join(nvm, "nhybrid"), 0o711)
}

// daxMount shows that files on the NVM tier are mapped straight from the device, and those on the HDD tier are not.
func (g *guest) daxMount(ctx context.Context) error {
	for _, tier := range []struct {
		dir string
		dax bool
	}{{nvm, true}, {hdd, false}} {
		name := filepath.Join(tier.dir, "trial")
		if err := g.trialMapping(ctx, name, tier.dax); err != nil {
			return fmt.Errorf("map a file on %s: %w", tier.dir, err)
		}
		if err := os.Remove(name); err != nil {
			return err
		}
	}
	return nil
}

func (g *guest) trialMapping(ctx context.Context, name string, dax bool) error {
	if err := os.WriteFile(name, make([]byte, 2*os.Getpagesize()), 0o600); err != nil {
		return err
	}
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, name, 0, unix.STATX_BASIC_STATS, &st); err != nil {
		return fmt.Errorf("stat: %w", err)
	}
	if got := st.Attributes&unix.STATX_ATTR_DAX != 0; got != dax {
		return fmt.Errorf("statx says DAX %v, want %v", got, dax)
	}
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	page, err := unix.Mmap(int(f.Fd()), 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED_VALIDATE|unix.MAP_SYNC)
	if dax && err != nil {
		return fmt.Errorf("MAP_SYNC: %w", err)
	}
	if err == nil {
		err = unix.Munmap(page)
		if !dax {
			return errors.New("MAP_SYNC: it is granted, and should not be")
		}
	}
	if !dax && !errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("MAP_SYNC: want it refused as not supported: %w", err)
	}
	out, err := output(ctx, "probe", name)
	if err != nil {
		return err
	}
	return g.checkProbe(out, "file", dax)
}

// checkProbe looks at what the probe has printed of a kind of page (text or file): if it lies in persistent memory or not.
func (g *guest) checkProbe(out, kind string, want bool) error {
	var text, file uint64
	if _, err := fmt.Sscanf(strings.TrimSpace(out), "text=%x file=%x", &text, &file); err != nil {
		return fmt.Errorf("read the probe's %q: %w", out, err)
	}
	address := text
	if kind == "file" {
		address = file
	}
	if got := g.isPmem(address); got != want {
		return fmt.Errorf("%s page at %#x: in persistent memory %v, want %v", kind, address, got, want)
	}
	return nil
}
