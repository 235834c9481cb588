// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package rig

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/integration/hddsim/block"
)

// NVM is an emulated persistent memory: ext4 on a loop device over a file in a tmpfs. It reads and writes about as fast
// as the real thing and has what tmpfs lacks: project quotas, and room that is its own.
type NVM struct {
	dir string
}

// NewNVM makes an NVM of size bytes below a directory, which Close removes. options are further ones of mkfs.ext4.
func NewNVM(ctx context.Context, dir string, size int64, options ...string) (_ *NVM, err error) {
	n := &NVM{dir: dir}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("make emulated NVM: %w", err), n.Close())
		}
	}()
	memory := filepath.Join(dir, "memory")
	// A little above size: tmpfs counts its own pages too.
	if err := block.Mount("nvm", memory, "tmpfs", 0, fmt.Sprintf("size=%d,mode=0700", size+size/64+1<<20)); err != nil {
		return nil, err
	}
	img := filepath.Join(memory, "disk")
	f, err := os.OpenFile(img, os.O_CREATE|os.O_RDWR|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		return nil, err
	}
	// Memory below memory: direct I/O spares the copy in the page cache of the tmpfs file, which is the file.
	loop, err := block.Attach(img)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, loop.Close()) }()
	if err := block.MakeExt4(ctx, loop.Path(), options...); err != nil {
		return nil, err
	}
	return n, block.Mount(loop.Path(), n.Mountpoint(), "ext4", unix.MS_NOATIME, "")
}

// Mountpoint is where its filesystem is mounted.
func (n *NVM) Mountpoint() string { return filepath.Join(n.dir, "nvm") }

// Close unmounts and removes it with all that is stored there.
func (n *NVM) Close() error {
	if err := errors.Join(block.UnmountBelow(n.dir), block.DetachBelow(n.dir)); err != nil {
		return fmt.Errorf("take down emulated NVM: %w", err)
	}
	return os.RemoveAll(n.dir)
}
