// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package tier

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/placement"
)

// Standing tells where the data of one file stand, in bytes; -1: not there.
type Standing struct{ NVM, HDD int64 }

// Stands looks a file up by its redirect, "/<layer id>/<path>".
func (s *Store) Stands(redirect string) (Standing, error) {
	at := Standing{-1, -1}
	var err error
	if at.NVM, err = s.StandsOn(placement.NVM, redirect); err == nil {
		at.HDD, err = s.StandsOn(placement.HDD, redirect)
	}
	return at, err
}

// StandsOn is the size of a file on one tier; -1: not there. It does not touch the other.
func (s *Store) StandsOn(t placement.Tier, redirect string) (int64, error) {
	if err := checkRedirect(redirect); err != nil {
		return -1, err
	}
	st, err := os.Lstat(filepath.Join(s.DataRoot(t), redirect))
	switch {
	case errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ENOTDIR):
		return -1, nil
	case err != nil:
		return -1, fmt.Errorf("look up %q on %s: %w", redirect, t, err)
	case !st.Mode().IsRegular():
		return -1, fmt.Errorf("%q on %s is no regular file: %w", redirect, t, errdefs.ErrFailedPrecondition)
	}
	return st.Size(), nil
}

// Promote copies one file from HDD to NVM, where the kernel looks first. It may
// be open, mapped or executed meanwhile: who has it open keeps the inode that it
// has, who opens it next gets the copy. It is on NVM under its name only when it
// is whole and synced, since a torn one would hide the good one. A file that is
// on NVM already is no work.
//
// Errors: ErrNotFound if it stands on neither tier.
func (s *Store) Promote(ctx context.Context, redirect string, pace func(int) error) (copied int64, err error) {
	at, err := s.Stands(redirect)
	if err != nil || at.NVM >= 0 {
		return 0, err
	}
	if at.HDD < 0 {
		return 0, fmt.Errorf("promote %q: %w", redirect, errdefs.ErrNotFound)
	}
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	src, dst := filepath.Join(s.DataRoot(placement.HDD), redirect), filepath.Join(s.DataRoot(placement.NVM), redirect)
	if err := s.makeParents(redirect); err != nil {
		return 0, fmt.Errorf("promote %q: %w", redirect, err)
	}
	tmp, err := os.CreateTemp(filepath.Join(s.roots[placement.NVM], "s"), ".up-")
	if err != nil {
		return 0, fmt.Errorf("promote %q: %w", redirect, err)
	}
	defer func() {
		tmp.Close()
		if err != nil {
			os.Remove(tmp.Name())
		}
	}()
	if copied, err = copyFile(src, tmp.Name(), pace); err == nil {
		if err = tmp.Sync(); err == nil {
			// Who needs it reads it from NVM. Cached, it would take memory for
			// nothing, and a trace could not tell what of it is touched.
			_ = unix.Fadvise(int(tmp.Fd()), 0, 0, unix.FADV_DONTNEED) // a hint
			err = os.Rename(tmp.Name(), dst)
		}
	}
	if err != nil {
		return copied, fmt.Errorf("promote %q: %w", redirect, err)
	}
	return copied, nil
}

// makeParents makes the directories of a file on NVM as they are on HDD.
func (s *Store) makeParents(redirect string) error {
	dir := ""
	for name := range strings.SplitSeq(strings.TrimPrefix(path.Dir(redirect), "/"), "/") {
		dir = path.Join(dir, name)
		dst := filepath.Join(s.DataRoot(placement.NVM), dir)
		info, err := os.Lstat(filepath.Join(s.DataRoot(placement.HDD), dir))
		if err != nil {
			return err
		}
		if !info.IsDir() {
			return fmt.Errorf("%q on HDD is no directory: %w", dir, errdefs.ErrFailedPrecondition)
		}
		// One that is there may be half made: the daemon can die before it has its owner.
		if have, err := os.Lstat(dst); err == nil && have.Mode() == info.Mode() && stat(have).Uid == stat(info).Uid && stat(have).Gid == stat(info).Gid {
			continue
		}
		if err := copyDir(info, dst); err != nil {
			return err
		}
	}
	return nil
}

// Demote takes one file off NVM and returns its bytes. It wants the same file
// on HDD, which the caller knows to be durable ([Store.WriteBack] and
// [Store.Sync] of the layer); without one it returns ErrFailedPrecondition and
// leaves all as it was. The space is free only when nobody has the file open
// any more. A file that is not on NVM is no work.
func (s *Store) Demote(redirect string) (bytes int64, err error) {
	at, err := s.Stands(redirect)
	if err != nil || at.NVM < 0 {
		return 0, err
	}
	if at.HDD != at.NVM {
		return 0, notAtHome(redirect, at)
	}
	if err := os.Remove(filepath.Join(s.DataRoot(placement.NVM), redirect)); err != nil {
		return 0, fmt.Errorf("demote %q: %w", redirect, err)
	}
	return at.NVM, nil
}

// checkRedirect refuses what could lead out of a layer.
func checkRedirect(redirect string) error {
	id, rest, ok := strings.Cut(strings.TrimPrefix(redirect, "/"), "/")
	if !strings.HasPrefix(redirect, "/") || !ok || id == "" || rest == "" || path.Clean(redirect) != redirect || strings.ContainsRune(redirect, 0) {
		return fmt.Errorf("%q is not of the form /<layer id>/<path>: %w", redirect, errdefs.ErrInvalidArgument)
	}
	return nil
}
