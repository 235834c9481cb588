// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"context"
	"errors"
	"path/filepath"

	"github.com/nhybrid/nhybrid/integration/bench/lab"
	"github.com/nhybrid/nhybrid/integration/hddsim"
	"github.com/nhybrid/nhybrid/integration/hddsim/block"
	"github.com/nhybrid/nhybrid/integration/rig"
)

// sizes of the emulated devices, in bytes. Both take memory only for what is written to them.
type sizes struct {
	HDD int64 `json:"hdd_bytes"`
	NVM int64 `json:"nvm_bytes"`
}

// stand is a pair of new, empty devices, each with an ext4. All of it is in memory, so that the machine's own disk has
// no part in what is measured.
type stand struct {
	dir string
	hdd *hddsim.Disk
	nvm *rig.NVM
}

func newStand(ctx context.Context, dir string, z sizes) (_ *stand, err error) {
	s := &stand{dir: dir}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if err := block.Mount("bench", dir, "tmpfs", 0, "mode=0711,size=90%"); err != nil {
		return nil, err
	}
	// Programs start on it at no cost; arm gives it its timing.
	if s.hdd, err = hddsim.Start(ctx, hddsim.Options{Dir: filepath.Join(dir, "h"), Size: z.HDD, Model: &hddsim.Model{}}); err != nil {
		return nil, err
	}
	if s.nvm, err = rig.NewNVM(ctx, filepath.Join(dir, "n"), z.NVM); err != nil {
		return nil, err
	}
	return s, nil
}

// arm brings what preparations have written to the devices and makes the HDD as slow as one.
func (s *stand) arm() error {
	if err := errors.Join(lab.SyncFS(s.hdd.Mountpoint()), lab.SyncFS(s.nvm.Mountpoint())); err != nil {
		return err
	}
	return s.hdd.SetModel(hddsim.HDD())
}

// Close takes both devices down, with what is mounted from them.
func (s *stand) Close() error {
	var errs []error
	if s.hdd != nil {
		errs = append(errs, s.hdd.SetModel(hddsim.Model{}))
	}
	// Trees of the daemon are mounted from files on NVM and hold its filesystem.
	errs = append(errs, block.UnmountBelow(filepath.Join(s.dir, "state")))
	if s.nvm != nil {
		errs = append(errs, s.nvm.Close())
	}
	if s.hdd != nil {
		errs = append(errs, s.hdd.Close())
	}
	return errors.Join(append(errs, rig.Remove(s.dir))...)
}
