// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package tier

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/placement"
)

// ErrStoring is returned by [Store.Swing] when something has been written to
// the staging directory: its tier is settled.
var ErrStoring = fmt.Errorf("storing has begun: %w", errdefs.ErrFailedPrecondition)

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

// Link makes the staging directory of an extraction reachable by [Store.Linked].
func (s *Store) Link(id string, t placement.Tier) error {
	if err := os.Remove(s.link(id)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove stale link of %q: %w", id, err)
	}
	if err := os.Symlink(s.Staging(t, id), s.link(id)); err != nil {
		return fmt.Errorf("link staging directory of %q: %w", id, err)
	}
	return nil
}

// Linked is the upper directory of an extraction, through the link.
func (s *Store) Linked(id string) string { return filepath.Join(s.link(id), "fs") }

func (s *Store) link(id string) string { return filepath.Join(s.state, "l", id) }

// StagedOn tells on which tier the staging directory of a snapshot stands:
// where its link leads, or, without a link, where it is found.
func (s *Store) StagedOn(id string) (placement.Tier, error) {
	to, err := os.Readlink(s.link(id))
	linked := err == nil
	for _, t := range Tiers {
		dir := s.Staging(t, id)
		if (!linked || to == dir) && isDir(filepath.Join(dir, "fs")) {
			return t, nil
		}
	}
	return 0, fmt.Errorf("staging directory of snapshot %q: %w", id, errdefs.ErrNotFound)
}

// Swing moves the staging directory of an extraction to another tier, as long
// as nothing has been written to it; otherwise it returns [ErrStoring] and
// leaves all as it was.
//
// The applier opens every entry by its whole path, so it follows the link at
// each one. The order makes a torn layer impossible to overlook: the new
// directory exists before the link leads to it, and the old one goes by rmdir,
// which refuses if a write came in between. The link then swings back; should
// writes have reached both sides by then, [Store.Commit] refuses the layer.
func (s *Store) Swing(id string, to placement.Tier) error {
	from, err := s.StagedOn(id)
	if err != nil || from == to {
		return err
	}
	oldFS := filepath.Join(s.Staging(from, id), "fs")
	if empty, err := isEmpty(oldFS); err != nil {
		return fmt.Errorf("look into staging directory of %q: %w", id, err)
	} else if !empty {
		return ErrStoring
	}
	var st unix.Stat_t
	if err := unix.Lstat(oldFS, &st); err != nil {
		return fmt.Errorf("stat %q: %w", oldFS, err)
	}
	if err := os.RemoveAll(s.Staging(to, id)); err != nil {
		return fmt.Errorf("clear staging directory of %q: %w", id, err)
	}
	if err := s.stage(id, to, int(st.Uid), int(st.Gid)); err != nil {
		return errors.Join(err, os.RemoveAll(s.Staging(to, id)))
	}
	if err := s.relink(id, to); err != nil {
		return errors.Join(err, os.RemoveAll(s.Staging(to, id)))
	}
	if err := unix.Rmdir(oldFS); err == nil {
		return os.RemoveAll(s.Staging(from, id))
	} else if !errors.Is(err, unix.ENOTEMPTY) {
		return fmt.Errorf("remove %q: %w", oldFS, err)
	}
	if err := s.relink(id, from); err != nil {
		return err
	}
	if err := unix.Rmdir(filepath.Join(s.Staging(to, id), "fs")); err == nil {
		os.RemoveAll(s.Staging(to, id))
	}
	return ErrStoring
}

// relink replaces the link by a rename, so that there is a link at every moment.
func (s *Store) relink(id string, to placement.Tier) error {
	tmp := filepath.Join(s.state, "l", "."+id)
	os.Remove(tmp)
	if err := os.Symlink(s.Staging(to, id), tmp); err != nil {
		return fmt.Errorf("link staging directory of %q: %w", id, err)
	}
	if err := os.Rename(tmp, s.link(id)); err != nil {
		os.Remove(tmp)
		return fmt.Errorf("swing link of %q: %w", id, err)
	}
	return nil
}

// Commit turns the staging directory into the data of a layer, by one rename,
// and returns its tier. Committing again what is committed is no error.
// A layer with content on both tiers is refused with ErrAborted.
func (s *Store) Commit(id string) (placement.Tier, error) {
	t, err := s.StagedOn(id)
	if err != nil {
		for _, done := range Tiers {
			if isDir(s.Data(done, id)) {
				return done, nil
			}
		}
		return 0, err
	}
	other := placement.HDD
	if t == placement.HDD {
		other = placement.NVM
	}
	if isDir(filepath.Join(s.Staging(other, id), "fs")) {
		return 0, fmt.Errorf("layer %q was written to while it changed tier; pull the image again: %w", id, errdefs.ErrAborted)
	}
	if err := os.Rename(filepath.Join(s.Staging(t, id), "fs"), s.Data(t, id)); err != nil {
		return 0, fmt.Errorf("commit staging directory of %q: %w", id, err)
	}
	return t, nil
}

// Uncommit takes a [Store.Commit] back, for a transaction that failed after it.
func (s *Store) Uncommit(id string, t placement.Tier) error {
	// Unstage may have been there in between.
	if err := os.MkdirAll(filepath.Join(s.Staging(t, id), "work"), 0o711); err != nil {
		return fmt.Errorf("take back the commit of %q: %w", id, err)
	}
	return os.Rename(s.Data(t, id), filepath.Join(s.Staging(t, id), "fs"))
}

// Unstage removes what [Store.Commit] leaves of the staging directory.
func (s *Store) Unstage(id string) error {
	err := os.Remove(s.link(id))
	if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	for _, t := range Tiers {
		err = errors.Join(err, os.RemoveAll(s.Staging(t, id)))
	}
	return err
}

// Remove deletes all that stands of a snapshot on both tiers. It may take long
// on HDD, and may be called again after an interruption.
func (s *Store) Remove(id string) error {
	err := s.Unstage(id)
	for _, t := range Tiers {
		err = errors.Join(err, os.RemoveAll(s.Data(t, id)))
	}
	return err
}

// IDs lists the ids of all snapshots of which something stands on a tier, and
// whatever else has a name there. Half-made files and directories of an interrupted
// run, whose names begin with a dot, are deleted on the way: only the daemon that owns the
// store may call this, before it moves anything.
func (s *Store) IDs() (map[string]bool, error) {
	ids := map[string]bool{}
	for _, dir := range []string{
		s.DataRoot(placement.NVM), s.DataRoot(placement.HDD),
		filepath.Join(s.roots[placement.NVM], "s"), filepath.Join(s.roots[placement.HDD], "s"),
		filepath.Join(s.state, "l"),
	} {
		names, err := readNames(dir)
		if err != nil {
			return nil, fmt.Errorf("list %q: %w", dir, err)
		}
		for _, n := range names {
			if n[0] == '.' {
				os.RemoveAll(filepath.Join(dir, n))
				continue
			}
			ids[n] = true
		}
	}
	return ids, nil
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

func isEmpty(dir string) (bool, error) {
	f, err := os.Open(dir)
	if err != nil {
		return false, err
	}
	defer f.Close()
	_, err = f.Readdirnames(1)
	if errors.Is(err, io.EOF) {
		return true, nil
	}
	return false, err
}
