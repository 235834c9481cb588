// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package region

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// errLeft is the cause of an error where a directory is no region any more, but could not be removed.
var errLeft = fmt.Errorf("it is left there, and removed when that is possible: %w", errdefs.ErrUnavailable)

// unlessLeft is err, or nil where nothing failed but the removal of what is nobody's: Problems names it, and nobody has to wait for it.
func unlessLeft(err error) error {
	if errors.Is(err, errLeft) {
		return nil
	}
	return err
}

// discard removes a directory. It is gone at once from where it was; its blocks are free when this returns. An error is errLeft if only the latter failed.
func (s *Store) discard(dir string) error {
	away := filepath.Join(s.root, "tmp", randomID())
	err := os.Rename(dir, away)
	if errors.Is(err, unix.EPERM) {
		err = errors.Join(clearTree(dir), os.Rename(dir, away))
	}
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove region: %w", err)
	}
	s.step("moved away")
	return s.erase(away)
}

// erase removes a directory that is nobody's. One that cannot be removed is in Problems, and tried again by retryErase. s.mu is not held.
func (s *Store) erase(dir string) error {
	err := os.RemoveAll(dir)
	if errors.Is(err, unix.EPERM) {
		err = errors.Join(clearTree(dir), os.RemoveAll(dir))
	}
	name, rerr := filepath.Rel(s.root, dir)
	if rerr != nil {
		return errors.Join(err, rerr)
	}
	if err != nil {
		err = fmt.Errorf("what was a region takes room in %q and cannot be removed: %w: %w", dir, err, errLeft)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	_, known := s.left[name]
	if err == nil {
		delete(s.left, name)
		return nil
	}
	s.left[name] = err
	if !known {
		log.L.WithError(err).Warn("cannot remove a region")
	}
	return err
}

// retryErase tries again what could not be removed.
func (s *Store) retryErase() {
	s.mu.Lock()
	names := slices.Collect(maps.Keys(s.left))
	s.mu.Unlock()
	for _, name := range names {
		_ = s.erase(filepath.Join(s.root, name)) // it stays in Problems
	}
}

// sweep removes what an earlier daemon had in the making or on its way out.
func (s *Store) sweep() error {
	tmp := filepath.Join(s.root, "tmp")
	entries, err := os.ReadDir(tmp)
	if err != nil {
		return fmt.Errorf("sweep %q: %w", tmp, err)
	}
	for _, e := range entries {
		if err := unlessLeft(s.erase(filepath.Join(tmp, e.Name()))); err != nil {
			return fmt.Errorf("sweep %q: %w", tmp, err)
		}
	}
	return nil
}

// clearTree makes all that is immutable or append-only below a directory, and itself, removable.
func clearTree(dir string) error {
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() && !d.Type().IsRegular() {
			return err
		}
		f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		return errors.Join(clearFlags(f), f.Close())
	})
}
