// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/integration/bench/lab"
	"github.com/nhybrid/nhybrid/integration/rig"
)

// removal is the seconds from the command that removes the image, whose only layer has the given number, until its pack and
// its files on NVM are gone and the filesystem of the HDD has the room back. The disk is armed and nothing is cached.
func (b *bench) removal(ctx context.Context, g *rig.Rig, w *watcher, s *stand, layer string) (float64, error) {
	if err := w.await(ctx, settled); err != nil {
		return 0, err
	}
	pack, onNVM := filepath.Join(g.HDD, "p", layer+".erofs"), filepath.Join(g.NVM, "d", layer)
	var st unix.Stat_t
	if err := unix.Stat(pack, &st); err != nil {
		return 0, fmt.Errorf("look at pack %q: %w", pack, err)
	}
	if err := lab.DropCaches(b.options.dropCaches); err != nil {
		return 0, err
	}
	before, err := lab.UsedBytes(s.hdd.Mountpoint())
	if err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	start := time.Now()
	removed := make(chan error, 1)
	go func() {
		_, err := g.Ctr(ctx, "images", "rm", "--sync", g.Ref(imageName))
		removed <- err
	}()
	for tick := time.NewTicker(time.Millisecond); ; {
		used, err := lab.UsedBytes(s.hdd.Mountpoint())
		if err != nil {
			return 0, err
		}
		if gone(pack) && gone(onNVM) && before-used >= 512*st.Blocks {
			seconds := time.Since(start).Seconds()
			return seconds, <-removed
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return 0, errors.Join(fmt.Errorf("remove the image: %d of %d bytes are free: %w", before-used, 512*st.Blocks, ctx.Err()), <-removed)
		}
	}
}

func gone(path string) bool {
	_, err := os.Lstat(path)
	return errors.Is(err, fs.ErrNotExist)
}
