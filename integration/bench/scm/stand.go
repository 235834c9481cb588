// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/client"

	"github.com/nhybrid/nhybrid/integration/bench/lab"
	"github.com/nhybrid/nhybrid/integration/hddsim/block"
	"github.com/nhybrid/nhybrid/integration/rig"
	"github.com/nhybrid/nhybrid/scmlib"
)

// stand is the emulated memory and the programs on it.
//
// Storage class memory is emulated by memory: what is mapped byte by byte lies on a tmpfs, since a machine without such memory has no other mapping
// that is no page cache; what is a file with a filesystem under it, and the root filesystems of containers, lies on ext4 on a loop device over another tmpfs.
// Both are the same DRAM. The store of regions is the directory r of the NVM tier: there the tmpfs is mounted.
type stand struct {
	dir  string
	nvm  *rig.NVM
	rig  *rig.Rig
	bin  string // copies of the programs, and the workers
	kind string // of CDI devices
	spec string // their specification
}

const imageName = "scm-bench:1"

// bytesDir is where files lie on the memory that is mapped byte by byte; filesDir those on a filesystem.
func (s *stand) bytesDir() string { return filepath.Join(s.dir, "m") }
func (s *stand) filesDir() string { return filepath.Join(s.nvm.Mountpoint(), "files") }

func (s *stand) program(name string) string { return filepath.Join(s.bin, name) }

// newStand makes the emulated memory, starts containerd and the daemon, and unpacks the image with the workers.
func newStand(ctx context.Context, o *options) (_ *stand, err error) {
	s := &stand{}
	if s.dir, err = lab.Scratch(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if err := block.Mount("bench", s.dir, "tmpfs", 0, "mode=0711,size=90%"); err != nil {
		return nil, err
	}
	s.bin = filepath.Join(s.dir, "bin")
	found, err := lab.FindPrograms(o.bin)
	if err != nil {
		return nil, err
	}
	if err := lab.CopyPrograms(found, s.bin); err != nil {
		return nil, err
	}
	hook, err := os.ReadFile(filepath.Join(found, "nhybrid-scm-hook"))
	if err != nil {
		return nil, fmt.Errorf("%w: run `make tools build` first, or say --bin", err)
	}
	if err := os.WriteFile(s.program("nhybrid-scm-hook"), hook, 0o755); err != nil {
		return nil, err
	}
	if err := build(ctx, s.dir, s.bin); err != nil {
		return nil, err
	}
	if s.nvm, err = rig.NewNVM(ctx, filepath.Join(s.dir, "n"), o.nvmBytes()); err != nil {
		return nil, err
	}
	tier := filepath.Join(s.nvm.Mountpoint(), "nhybrid")
	memory := "mode=0700,huge=" + o.huge
	if err := errors.Join(
		block.Mount("scm", filepath.Join(tier, "r"), "tmpfs", 0, memory),
		block.Mount("scm", s.bytesDir(), "tmpfs", 0, memory),
		os.MkdirAll(s.filesDir(), 0o700),
	); err != nil {
		return nil, err
	}
	id := strings.ToLower(filepath.Base(s.dir))
	s.kind, s.spec = id+".nhybrid.io/scm", filepath.Join("/var/run/cdi", id+".json")
	s.rig, err = rig.Start(ctx, rig.Options{
		Dir: filepath.Join(s.dir, "c"), Bin: s.bin, NVM: tier,
		DaemonArgs: []string{
			"--set", "scm.cdi_spec=" + s.spec, "--set", "scm.cdi_kind=" + s.kind, "--set", "scm.limit=0", "--set", "scm.rate=0",
			"--set", fmt.Sprintf("scm.pool=%s=%d", o.attachSize(), poolReady), "--log-level", "info",
		},
	})
	if err != nil {
		return nil, err
	}
	img, err := benchImage(ctx, s.bin)
	if err != nil {
		return nil, err
	}
	return s, errors.Join(s.rig.Push(ctx, imageName, img), s.rig.Pull(ctx, imageName))
}

// Close takes all of it down.
func (s *stand) Close() error {
	var errs []error
	if s.rig != nil {
		errs = append(errs, s.rig.Close())
		_ = os.Remove(s.spec) // there, if the daemon came so far
	}
	if s.nvm != nil {
		errs = append(errs, block.UnmountBelow(s.nvm.Mountpoint()), s.nvm.Close())
	}
	return errors.Join(append(errs, rig.Remove(s.dir))...)
}

// durability is what a sync of a file at a place outlives, in the words of scmlib, which looks for what lies under its filesystem. The root filesystems of
// containers and volumes are on the same one.
func (s *stand) durability(p place) (string, error) {
	dir := s.filesDir()
	if p == onMemory {
		dir = s.bytesDir()
	}
	path := filepath.Join(dir, "probe")
	r, err := scmlib.Open(path, scmlib.Options{Create: true, Size: 1 << 20})
	if err != nil {
		return "", fmt.Errorf("find out how durable files in %q are: %w", dir, err)
	}
	return r.Durability().String(), errors.Join(r.Close(), os.Remove(path))
}

// client is containerd's, and the context for it.
func (s *stand) client(ctx context.Context) (context.Context, *client.Client, error) {
	c, err := s.rig.Client()
	return s.rig.Context(ctx), c, err
}
