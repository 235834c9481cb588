// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package tier

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/placement"
)

// Prestage makes a staging directory, fs with the given owner and work, that
// belongs to nobody yet. Making directories may wait for the disk, so it is done
// before the transaction that gives out the id. It returns a name for [Store.Stage].
func (s *Store) Prestage(t placement.Tier, uid, gid int) (name string, err error) {
	name = ".new-" + rand.Text()
	if err := s.stage(name, t, uid, gid); err != nil {
		return "", errors.Join(err, s.Unprestage(t, name))
	}
	return name, nil
}

// Unprestage takes a directory of [Store.Prestage] back that was not used.
func (s *Store) Unprestage(t placement.Tier, name string) error {
	return os.RemoveAll(s.Staging(t, name))
}

// Stage gives a prestaged directory to a snapshot, by one rename. What a
// transaction that did not come to its end left there under the same id goes
// first. The other tier is not looked at: a start would wait for the HDD.
func (s *Store) Stage(id string, t placement.Tier, name string) error {
	err := os.Rename(s.Staging(t, name), s.Staging(t, id))
	if errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EEXIST) || errors.Is(err, unix.ENOTDIR) {
		if err := s.Unstage(id); err != nil {
			return fmt.Errorf("clear staging directory of %q: %w", id, err)
		}
		err = os.Rename(s.Staging(t, name), s.Staging(t, id))
	}
	if err != nil {
		return fmt.Errorf("give snapshot %q its staging directory: %w", id, err)
	}
	return nil
}

func (s *Store) stage(name string, t placement.Tier, uid, gid int) error {
	dir := s.Staging(t, name)
	if err := os.Mkdir(dir, 0o711); err != nil {
		return fmt.Errorf("create staging directory: %w", err)
	}
	for _, sub := range []struct {
		name string
		mode os.FileMode
	}{{"fs", 0o755}, {"work", 0o711}} {
		if err := os.Mkdir(filepath.Join(dir, sub.name), sub.mode); err != nil {
			return fmt.Errorf("create staging directory: %w", err)
		}
	}
	if uid > 0 || gid > 0 {
		if err := os.Lchown(filepath.Join(dir, "fs"), uid, gid); err != nil {
			return fmt.Errorf("give a staging directory its owner: %w", err)
		}
	}
	return nil
}

// Unstage removes the staging directory of a snapshot. It may take long on HDD,
// and may be called again after an interruption.
func (s *Store) Unstage(id string) error {
	var err error
	for _, t := range Tiers {
		err = errors.Join(err, os.RemoveAll(s.Staging(t, id)))
	}
	return err
}

// StagedOn tells on which tier the staging directory of a snapshot stands.
func (s *Store) StagedOn(id string) (placement.Tier, error) {
	for _, t := range Tiers {
		if isDir(s.Upper(t, id)) {
			return t, nil
		}
	}
	return 0, fmt.Errorf("staging directory of snapshot %q: %w", id, errdefs.ErrNotFound)
}

// Staged lists the names in the staging directories of both tiers. Half-made
// files and directories of an interrupted run, whose names begin with a dot, are deleted on
// the way: only the daemon that owns the store may call this, before it makes any.
func (s *Store) Staged() ([]string, error) {
	var all []string
	for _, t := range Tiers {
		dir := s.StagingRoot(t)
		names, err := readNames(dir)
		if err != nil {
			return nil, fmt.Errorf("list %q: %w", dir, err)
		}
		for _, n := range names {
			if n[0] == '.' {
				os.RemoveAll(filepath.Join(dir, n))
				continue
			}
			all = append(all, n)
		}
	}
	return all, nil
}

func readNames(dir string) ([]string, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return f.Readdirnames(-1)
}

func isDir(path string) bool {
	st, err := os.Lstat(path)
	return err == nil && st.IsDir()
}
