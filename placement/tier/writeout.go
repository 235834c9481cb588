// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package tier

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/placement"
)

const (
	// writeOutBytes bounds what one WriteOut has under way. An fsync of anybody
	// on the same ext4 waits for it, since a journal commit in ordered mode waits
	// for the data of all files that got their blocks in it. Measured on an
	// emulated hard disk that containerd's database shares (docs/bench.md): with
	// 8 MiB a pull took 19 s, with 0.5 MiB 14 s, and 11 s without.
	writeOutBytes = 512 << 10
	// writeOutFiles bounds the open files of one WriteOut.
	writeOutFiles = 512
)

// WriteOut starts writing the data of a layer to the device of its tier and
// waits for them, a few MiB at a time, so that others who wait for that device
// wait little. It calls progress with the bytes written after each piece; an
// error from there ends it. What it wrote is durable only after [Store.Sync]:
// metadata and the device's cache are not touched.
//
// A layer that is being stored may be written out too; what comes later is not seen.
func (s *Store) WriteOut(ctx context.Context, t placement.Tier, id string, progress func(int64) error) error {
	dir := s.Data(t, id)
	if staged := filepath.Join(s.Staging(t, id), "fs"); isDir(staged) {
		dir = staged
	}
	var batch []*os.File
	var bytes int64
	wait := func() error {
		var err error
		for _, f := range batch {
			if err == nil {
				err = unix.SyncFileRange(int(f.Fd()), 0, 0, unix.SYNC_FILE_RANGE_WAIT_BEFORE|unix.SYNC_FILE_RANGE_WRITE|unix.SYNC_FILE_RANGE_WAIT_AFTER)
			}
			f.Close()
		}
		n := bytes
		batch, bytes = batch[:0], 0
		if err == nil && n > 0 {
			err = progress(n)
		}
		return err
	}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		st, err := f.Stat()
		if err != nil || st.Size() == 0 {
			f.Close()
			return err
		}
		batch = append(batch, f)
		// Of a large file one piece at a time.
		for off := int64(0); off < st.Size(); off += writeOutBytes {
			n := min(writeOutBytes, st.Size()-off)
			if err := unix.SyncFileRange(int(f.Fd()), off, n, unix.SYNC_FILE_RANGE_WRITE); err != nil {
				return err
			}
			bytes += n
			if bytes >= writeOutBytes && off+n < st.Size() {
				if err := unix.SyncFileRange(int(f.Fd()), 0, off+n, unix.SYNC_FILE_RANGE_WAIT_BEFORE); err != nil {
					return err
				}
				if err := progress(bytes); err != nil {
					return err
				}
				bytes = 0
			}
		}
		if bytes >= writeOutBytes || len(batch) >= writeOutFiles {
			return wait()
		}
		return nil
	})
	if err == nil {
		err = wait()
	}
	for _, f := range batch {
		f.Close()
	}
	if errors.Is(err, os.ErrNotExist) {
		return nil // removed meanwhile
	}
	if err != nil {
		return fmt.Errorf("write layer %q to %s: %w", id, t, err)
	}
	return nil
}
