// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/nhybrid/nhybrid/integration/bench/lab"
	"github.com/nhybrid/nhybrid/integration/hddsim"
	"github.com/nhybrid/nhybrid/integration/hddsim/block"
	"github.com/nhybrid/nhybrid/integration/rig"
)

// The variants: nhybrid, and containerd's overlayfs snapshotter with everything on one device.
const (
	hybrid     = "nhybrid"
	overlayNVM = "overlayfs-nvm"
	overlayHDD = "overlayfs-hdd"
)

var variants = []string{overlayNVM, hybrid, overlayHDD}

// place is a way to keep snapshots, ready to start containers.
type place struct {
	variant     string
	rig         *rig.Rig
	snapshotter string
	disk        *hddsim.Disk // that snapshots may stand on; nil: none
	nvm         *rig.NVM     // nil: none
}

// stand is all three variants side by side, each on devices of its own. One containerd has nhybrid and overlayfs on NVM,
// another one overlayfs on HDD. Their content and metadata, the programs and the devices are in memory: the only disk that
// a start can wait for is the emulated one, and on that there are image files alone.
type stand struct {
	dir    string
	places map[string]*place
	daemon *daemon
	// nvmEmpty is what the filesystem of nhybrid's NVM takes before nhybrid has seen it.
	nvmEmpty int64
}

// setup is what stands differ in.
type setup struct {
	size    int64  // of each device, in bytes
	config  string // of the daemon, TOML
	rate    float64
	hdd     bool // overlayfs on HDD is wanted
	overlay bool // overlayfs on NVM is wanted
}

// nvmReadAheadKiB is the read-ahead of nhybrid's NVM.
const nvmReadAheadKiB = 16

// patient is for stands whose starts all end by their sign of readiness: under strace a JVM may open nothing for seconds.
const patient = "[hot]\nquiet = '1m'\nwindow = '5m'\n"

func (b *bench) newStand(ctx context.Context, o setup) (_ *stand, err error) {
	s := &stand{dir: filepath.Join(b.dir, "s"), places: map[string]*place{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if err := block.Mount("bench", s.dir, "tmpfs", 0, "mode=0711,size=90%"); err != nil {
		return nil, err
	}
	own := &place{variant: hybrid, snapshotter: "nhybrid"}
	s.places[hybrid] = own
	if own.disk, err = s.disk(ctx, "h", o.size); err != nil {
		return nil, err
	}
	if own.nvm, err = rig.NewNVM(ctx, filepath.Join(s.dir, "n"), o.size); err != nil {
		return nil, err
	}
	// As docs/operations.md advises; overlayfs's has what the kernel gives it.
	if err := block.SetReadAhead(own.nvm.Mountpoint(), nvmReadAheadKiB); err != nil {
		return nil, err
	}
	if s.nvmEmpty, err = lab.UsedBytes(own.nvm.Mountpoint()); err != nil {
		return nil, err
	}
	options := rig.Options{
		Dir: filepath.Join(s.dir, "a"), Bin: b.bin, RegistryDir: b.registryDir, Rate: o.rate,
		HDD: filepath.Join(own.disk.Mountpoint(), "nhybrid"), NVM: filepath.Join(own.nvm.Mountpoint(), "nhybrid"),
		DaemonConfig: o.config,
	}
	if o.overlay {
		all := &place{variant: overlayNVM, snapshotter: "overlayfs"}
		s.places[overlayNVM] = all
		if all.nvm, err = rig.NewNVM(ctx, filepath.Join(s.dir, "o"), o.size); err != nil {
			return nil, err
		}
		options.ContainerdConfig = overlayConfig(all.nvm.Mountpoint())
	}
	if own.rig, err = rig.Start(ctx, options); err != nil {
		return nil, err
	}
	if o.overlay {
		s.places[overlayNVM].rig = own.rig
	}
	if s.daemon, err = newDaemon(own.rig); err != nil {
		return nil, err
	}
	if !o.hdd {
		return s, nil
	}
	docker := &place{variant: overlayHDD, snapshotter: "overlayfs"}
	s.places[overlayHDD] = docker
	if docker.disk, err = s.disk(ctx, "d", o.size); err != nil {
		return nil, err
	}
	docker.rig, err = rig.Start(ctx, rig.Options{
		Dir: filepath.Join(s.dir, "b"), Bin: b.bin, RegistryDir: b.registryDir, NoDaemon: true, Rate: o.rate,
		ContainerdConfig: overlayConfig(docker.disk.Mountpoint()),
	})
	return s, err
}

func overlayConfig(mountpoint string) string {
	return fmt.Sprintf("[plugins.'io.containerd.snapshotter.v1.overlayfs']\n  root_path = '%s/overlayfs'\n", mountpoint)
}

// disk makes one that costs nothing until arm.
func (s *stand) disk(ctx context.Context, name string, size int64) (*hddsim.Disk, error) {
	return hddsim.Start(ctx, hddsim.Options{Dir: filepath.Join(s.dir, name), Size: size, Model: &hddsim.Model{}})
}

// rigs are the containerds, each once.
func (s *stand) rigs() (rigs []*rig.Rig) {
	for _, v := range []string{hybrid, overlayHDD} {
		if p := s.places[v]; p != nil && p.rig != nil {
			rigs = append(rigs, p.rig)
		}
	}
	return rigs
}

// push stores an image in the registries.
func (s *stand) push(ctx context.Context, name string, img v1.Image) error {
	for _, g := range s.rigs() {
		if err := g.Push(ctx, name, img); err != nil {
			return err
		}
	}
	return nil
}

func (p *place) pull(ctx context.Context, name string) error {
	return p.rig.Pull(ctx, name, "--snapshotter", p.snapshotter)
}

// arm gives the disks their timing, once nothing is left to be written; disarm takes it away.
func (s *stand) arm() error { return s.setModel(hddsim.HDD()) }

func (s *stand) disarm() error { return s.setModel(hddsim.Model{}) }

func (s *stand) setModel(m hddsim.Model) error {
	if err := s.sync(); err != nil {
		return err
	}
	for _, p := range s.places {
		if p.disk != nil {
			if err := p.disk.SetModel(m); err != nil {
				return err
			}
		}
	}
	return nil
}

// sync brings everything that is dirty to the devices.
func (s *stand) sync() error {
	for _, p := range s.places {
		if p.disk != nil {
			if err := lab.SyncFS(p.disk.Mountpoint()); err != nil {
				return err
			}
		}
		if p.nvm != nil {
			if err := lab.SyncFS(p.nvm.Mountpoint()); err != nil {
				return err
			}
		}
	}
	return nil
}

// logs are the ends of the logs, for an error.
func (s *stand) logs() string {
	var b strings.Builder
	if p := s.places[hybrid]; p.rig != nil && p.rig.Daemon != nil {
		fmt.Fprintf(&b, "\nthe end of the daemon's log:\n%s", p.rig.Daemon.LogTail(4000))
	}
	return b.String()
}

// Close takes everything down.
func (s *stand) Close() error {
	var errs []error
	for _, p := range s.places {
		if p.disk != nil {
			errs = append(errs, p.disk.SetModel(hddsim.Model{})) // nobody waits for a disk that is thrown away
		}
	}
	if s.daemon != nil {
		errs = append(errs, s.daemon.close())
	}
	for _, g := range s.rigs() {
		errs = append(errs, g.Close())
	}
	// Trees of the daemon are mounted from files on NVM and hold its filesystem.
	errs = append(errs, block.UnmountBelow(filepath.Join(s.dir, "a")))
	for _, p := range s.places {
		if p.nvm != nil {
			errs = append(errs, p.nvm.Close())
		}
		if p.disk != nil {
			errs = append(errs, p.disk.Close())
		}
	}
	return errors.Join(append(errs, rig.Remove(s.dir))...)
}
