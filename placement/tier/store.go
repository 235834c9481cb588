// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package tier owns the directories of the two tiers: staging directories, which
// containers write to, and the numbered data files on NVM.
//
//	<tier>/s/<id>/{fs,work}   staging: the writable directory of a snapshot
//	<nvm>/d/<layer>/<hh>/<n>  a data file of a layer
//
// All methods may be called from several goroutines at once, as long as calls
// for one snapshot or one data file do not overlap.
package tier

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/placement"
)

const storeIDFile = "store-id"

// Tiers lists both tiers, in the order in which the kernel looks for data.
var Tiers = [...]placement.Tier{placement.NVM, placement.HDD}

// Store is the pair of roots.
type Store struct {
	roots  [2]string // by placement.Tier
	state  string
	id     string
	former string
	pins   [2]*os.File // by placement.Tier
}

// Open prepares the two roots and checks that they belong together. Both must
// be absolute; the HDD root is created if missing, the NVM root only below an
// existing parent directory, since a missing one mostly means that the device
// is not mounted. state is a directory for what does not outlive the machine's
// run, best on a tmpfs; several stores may share it.
//
// Errors: ErrInvalidArgument for a path that cannot be used, ErrFailedPrecondition
// for a root that belongs to another store or is read-only.
func Open(hdd, nvm, state string) (*Store, error) {
	s := &Store{}
	s.roots[placement.HDD], s.roots[placement.NVM] = filepath.Clean(hdd), filepath.Clean(nvm)
	for _, t := range Tiers {
		if !filepath.IsAbs(s.roots[t]) {
			return nil, fmt.Errorf("%s root %q is not an absolute path: %w", t, s.roots[t], errdefs.ErrInvalidArgument)
		}
		// containerd takes lowerdir apart at colons and mount options at commas.
		if strings.ContainsAny(s.roots[t], ":,\\") {
			return nil, fmt.Errorf("%s root %q holds a character with a meaning in overlayfs mount options (colon, comma, backslash); choose another path: %w", t, s.roots[t], errdefs.ErrInvalidArgument)
		}
	}
	if within(s.roots[placement.HDD], s.roots[placement.NVM]) || within(s.roots[placement.NVM], s.roots[placement.HDD]) {
		return nil, fmt.Errorf("NVM root %q and HDD root %q contain each other; give each its own directory: %w", s.roots[placement.NVM], s.roots[placement.HDD], errdefs.ErrInvalidArgument)
	}
	// Before anything is made: what is refused may be the mount point of a device
	// that is not mounted.
	ids, err := s.ids()
	if err != nil {
		return nil, err
	}
	if err := s.refuse(ids); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(s.roots[placement.HDD], 0o700); err != nil {
		return nil, fmt.Errorf("create HDD root %q: %w", s.roots[placement.HDD], err)
	}
	if err := os.Mkdir(s.roots[placement.NVM], 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		if errors.Is(err, unix.EROFS) {
			return nil, readOnly(placement.NVM, s.roots[placement.NVM])
		}
		return nil, fmt.Errorf("create NVM root %q: %w", s.roots[placement.NVM], err)
	}
	for _, t := range Tiers {
		if err := s.makeDir(t, "s"); err != nil {
			return nil, err
		}
	}
	if err := s.makeDir(placement.NVM, "d"); err != nil {
		return nil, err
	}
	// Every writable directory is made in one of these. While they are open their
	// inodes stay in memory, so that a start does not wait for the HDD to find them.
	for _, t := range Tiers {
		f, err := os.Open(s.StagingRoot(t))
		if err != nil {
			return nil, errors.Join(fmt.Errorf("open staging root: %w", err), s.Close())
		}
		s.pins[t] = f
	}
	if err := s.pair(ids); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	s.state = filepath.Join(state, s.id)
	if err := os.MkdirAll(s.state, 0o711); err != nil {
		return nil, errors.Join(fmt.Errorf("create state directory: %w", err), s.Close())
	}
	return s, nil
}

// Close lets go of the roots. Nothing is unmounted or deleted.
func (s *Store) Close() error {
	var err error
	for t, f := range s.pins {
		if f != nil {
			err = errors.Join(err, f.Close())
		}
		s.pins[t] = nil
	}
	return err
}

func (s *Store) makeDir(t placement.Tier, name string) error {
	dir := filepath.Join(s.roots[t], name)
	err := os.Mkdir(dir, 0o700)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EROFS):
		return readOnly(t, s.roots[t])
	case !errors.Is(err, os.ErrExist):
		return fmt.Errorf("create %q: %w", dir, err)
	}
	st, err := os.Lstat(dir)
	if err != nil {
		return fmt.Errorf("look at %q: %w", dir, err)
	}
	// A symlink here would send every layer to wherever it points.
	if !st.IsDir() {
		return fmt.Errorf("%q is not a directory; remove it or choose another root: %w", dir, errdefs.ErrFailedPrecondition)
	}
	// Nobody but root may come to the programs of images, some of them setuid.
	// overlayfs reads with the rights of who mounts.
	if err := os.Chmod(dir, 0o700); errors.Is(err, unix.EROFS) {
		return readOnly(t, s.roots[t])
	} else if err != nil {
		return fmt.Errorf("close %q to others: %w", dir, err)
	}
	return nil
}

func readOnly(t placement.Tier, root string) error {
	return fmt.Errorf("%s root %q is read-only; remount its filesystem read-write: %w", t, root, errdefs.ErrFailedPrecondition)
}

// adoptFile in a new NVM root says that it is meant to take the place of a lost
// one although it stands where a device that is not mounted would leave it: on the
// filesystem of the HDD root, or of /.
const adoptFile = "adopt"

// ids are the store ids of the roots, by placement.Tier; "" for a root that is new.
func (s *Store) ids() (ids [2]string, err error) {
	for _, t := range Tiers {
		b, err := os.ReadFile(filepath.Join(s.roots[t], storeIDFile))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return ids, fmt.Errorf("read the store id of the %s root: %w", t, err)
		}
		ids[t] = strings.TrimSpace(string(b))
		if strings.ContainsAny(ids[t], "/.\x00") { // it becomes the name of a directory
			return ids, fmt.Errorf("store id %q of the %s root is damaged; put back the id of the other root's file %s: %w", ids[t], t, storeIDFile, errdefs.ErrFailedPrecondition)
		}
	}
	return ids, nil
}

// refuse says why roots with these ids cannot be one store. It makes nothing.
func (s *Store) refuse(ids [2]string) error {
	h, n := ids[placement.HDD], ids[placement.NVM]
	if _, err := os.Stat(filepath.Dir(s.roots[placement.NVM])); errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("NVM root %q: its parent directory does not exist; mount the NVM filesystem there first: %w", s.roots[placement.NVM], errdefs.ErrFailedPrecondition)
	}
	switch {
	case h == n, h == "" && n == "":
		return nil
	case h != "" && n != "":
		return fmt.Errorf("NVM root %q belongs to store %s, HDD root %q to store %s; correct nvm_root or root: %w",
			s.roots[placement.NVM], n, s.roots[placement.HDD], h, errdefs.ErrFailedPrecondition)
	case n != "":
		return fmt.Errorf("NVM root %q belongs to store %s, but HDD root %q is new; correct root, or empty the NVM root to begin anew: %w",
			s.roots[placement.NVM], n, s.roots[placement.HDD], errdefs.ErrFailedPrecondition)
	}
	if _, err := os.Lstat(filepath.Join(s.roots[placement.NVM], adoptFile)); err == nil {
		return nil
	}
	device := deviceOf(s.roots[placement.NVM])
	if device != deviceOf(s.roots[placement.HDD]) && device != deviceOf("/") {
		return nil
	}
	return fmt.Errorf("NVM root %q is new, and on the filesystem of the HDD root or of /: the NVM device is probably not mounted; mount it, or, if the old one is lost and this one is meant, create the empty file %q: %w",
		s.roots[placement.NVM], filepath.Join(s.roots[placement.NVM], adoptFile), errdefs.ErrFailedPrecondition)
}

// deviceOf is the device on which a directory stands, or would stand if it were
// made; 0 if nobody can tell.
func deviceOf(dir string) uint64 {
	for {
		var st unix.Stat_t
		switch err := unix.Stat(dir, &st); {
		case err == nil:
			return st.Dev
		case !errors.Is(err, unix.ENOENT) || dir == "/":
			return 0
		}
		dir = filepath.Dir(dir)
	}
}

// pair gives both roots one id where they have none. An NVM root without an id
// beside an HDD root with one is a replaced device, and is adopted: both get a
// new id, so that the old NVM root, should it come back, is refused with what it
// remembers.
func (s *Store) pair(ids [2]string) error {
	h, n := ids[placement.HDD], ids[placement.NVM]
	switch {
	case h != "" && h == n:
		s.id = h
		return nil
	case h == "":
		h = rand.Text()
	default:
		s.former, h = h, rand.Text()
		ids[placement.HDD] = ""
	}
	s.id = h
	// NVM last: with an id on HDD alone the next start adopts it again.
	for _, t := range [...]placement.Tier{placement.HDD, placement.NVM} {
		if ids[t] == "" {
			err := WriteFile(filepath.Join(s.roots[t], storeIDFile), func(f *os.File) error {
				_, err := f.WriteString(h + "\n")
				return err
			})
			if err != nil {
				return fmt.Errorf("write the store id of the %s root: %w", t, err)
			}
			// Its name too, and the root's: an NVM root that remembers a store
			// of which a power cut left nothing on HDD would be refused.
			if err := s.Sync(t); err != nil {
				return err
			}
		}
	}
	return nil
}

// State is the store's directory for what does not outlive the machine's run.
func (s *Store) State() string { return s.state }

// ID names the store; both roots carry it.
func (s *Store) ID() string { return s.id }

// Former is the id that the store had until this start, "" if it was the same:
// a new NVM root was adopted in the place of a lost one.
func (s *Store) Former() string { return s.former }

// Root is the directory of a tier.
func (s *Store) Root(t placement.Tier) string { return s.roots[t] }

// StagingRoot holds the staging directories of a tier.
func (s *Store) StagingRoot(t placement.Tier) string { return filepath.Join(s.roots[t], "s") }

// Staging is the staging directory of an active snapshot on a tier; it holds
// fs and work.
func (s *Store) Staging(t placement.Tier, id string) string {
	return filepath.Join(s.roots[t], "s", id)
}

// Upper is the writable directory of a snapshot on a tier.
func (s *Store) Upper(t placement.Tier, id string) string {
	return filepath.Join(s.Staging(t, id), "fs")
}

// Inodes tells the free and all inodes of a tier's filesystem. One that makes
// them as needed, and counts none, has plenty.
func (s *Store) Inodes(t placement.Tier) (free, total int64, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(s.roots[t], &st); err != nil {
		return 0, 0, fmt.Errorf("ask for the free inodes of %q: %w", s.roots[t], err)
	}
	if st.Files == 0 {
		return 1 << 40, 0, nil
	}
	return int64(st.Ffree), int64(st.Files), nil
}

// Space tells the free and the total bytes of a tier's filesystem. Free is
// what an unprivileged writer would get, so that the filesystem's own reserve
// is left alone.
func (s *Store) Space(t placement.Tier) (free, total int64, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(s.roots[t], &st); err != nil {
		return 0, 0, fmt.Errorf("ask for the free space of %q: %w", s.roots[t], err)
	}
	return int64(st.Bavail) * st.Bsize, int64(st.Blocks) * st.Bsize, nil
}

// Sync writes all that is dirty on a tier to its device.
//
// An error means that something was lost that had been written since the last
// call, and it is reported once: the kernel marks pages clean that it could not
// write. So the descriptor is one that is open since [Open], and sees every
// error from then on, whoever else syncs (errseq_t, Linux 5.8 for syncfs).
func (s *Store) Sync(t placement.Tier) error {
	f := s.pins[t]
	if f == nil {
		return fmt.Errorf("sync %s: the store is closed: %w", t, errdefs.ErrUnavailable)
	}
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return fmt.Errorf("sync the filesystem of %q: %w", s.roots[t], err)
	}
	return nil
}

// SameFilesystem reports that both roots stand on one filesystem, which is of
// use for nothing but a trial.
func (s *Store) SameFilesystem() bool {
	var a, b unix.Stat_t
	if unix.Stat(s.roots[0], &a) != nil || unix.Stat(s.roots[1], &b) != nil {
		return false
	}
	return a.Dev == b.Dev
}

// OnDevice tells whether path stands on the filesystem of a tier.
func (s *Store) OnDevice(t placement.Tier, path string) bool {
	var a, b unix.Stat_t
	return path != "" && unix.Stat(s.roots[t], &a) == nil && unix.Stat(path, &b) == nil && a.Dev == b.Dev
}

func within(dir, parent string) bool {
	return dir == parent || strings.HasPrefix(dir, strings.TrimSuffix(parent, "/")+"/")
}

// WriteFile makes a file that has its name only when it is whole and synced:
// fill writes it under another one. What stood there before is replaced.
func WriteFile(path string, fill func(*os.File) error) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*.tmp")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	if err = fill(f); err == nil {
		err = f.Sync()
	}
	if err2 := f.Close(); err == nil {
		err = err2
	}
	if err != nil {
		return err
	}
	if err = os.Rename(f.Name(), path); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync() // the name, too
}
