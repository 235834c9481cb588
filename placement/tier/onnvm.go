// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package tier

import (
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/placement"
)

// Entry is one name that a layer has on NVM.
type Entry struct {
	Redirect string // "/<layer id>/<path>"; "/<layer id>" for the layer's own directory
	Size     int64  // bytes
	Bytes    int64  // bytes that the inode occupies; other names of it have the same
	Inode    uint64
	Links    uint64 // names of the inode, in all directories
	Mode     fs.FileMode
}

// Data tells whether the entry is read through the data root; the rest of a layer
// (directories, links, devices, empty files) is metadata and read from the tree.
func (e Entry) Data() bool { return e.Mode.IsRegular() && e.Size > 0 }

// OnNVM goes through what stands of a layer on NVM, directories before what is in
// them; nothing stands of a layer that is not there, nor of what is removed
// meanwhile. It ends after the first error.
func (s *Store) OnNVM(id string) iter.Seq2[Entry, error] {
	root := s.DataRoot(placement.NVM)
	return func(yield func(Entry, error) bool) {
		if err := checkRedirect("/" + id + "/x"); err != nil {
			yield(Entry{}, err)
			return
		}
		err := filepath.WalkDir(filepath.Join(root, id), func(path string, d fs.DirEntry, err error) error {
			var info fs.FileInfo
			if err == nil {
				info, err = d.Info()
			}
			if errors.Is(err, os.ErrNotExist) {
				return nil
			}
			if err != nil {
				return err
			}
			st := stat(info)
			if !yield(Entry{
				Redirect: path[len(root):], Size: info.Size(), Bytes: 512 * st.Blocks,
				Inode: st.Ino, Links: uint64(st.Nlink), Mode: info.Mode(), //nolint:unconvert // its size differs between architectures
			}, nil) {
				return fs.SkipAll
			}
			return nil
		})
		if err != nil {
			yield(Entry{}, fmt.Errorf("list layer %q on NVM: %w", id, err))
		}
	}
}

// Occupied is how many bytes a layer occupies on NVM, directories included.
func (s *Store) Occupied(id string) (bytes int64, err error) {
	linked := map[uint64]bool{}
	for e, err := range s.OnNVM(id) {
		if err != nil {
			return 0, err
		}
		if e.Links > 1 && !e.Mode.IsDir() {
			if linked[e.Inode] {
				continue
			}
			linked[e.Inode] = true
		}
		bytes += e.Bytes
	}
	return bytes, nil
}

// DemoteAll takes all names that one file has on NVM off it, since the space is
// free only without the last; see [Store.Demote] for what it wants. It looks at
// all of them before it removes the first. Of the bytes that the file occupied it
// tells which are free now and which are still held by somebody, as far as pins,
// which may be nil, can tell.
func (s *Store) DemoteAll(names []string, pins *Pins) (freed, held int64, err error) {
	left := names[:0:0]
	var st unix.Stat_t
	for _, name := range names {
		at, err := s.Stands(name)
		if err != nil {
			return 0, 0, err
		}
		if at.NVM < 0 {
			continue
		}
		if at.HDD != at.NVM {
			return 0, 0, notAtHome(name, at)
		}
		left = append(left, name)
	}
	if len(left) == 0 {
		return 0, 0, nil
	}
	path := func(name string) string { return filepath.Join(s.DataRoot(placement.NVM), name) }
	if err := unix.Lstat(path(left[0]), &st); err != nil {
		return 0, 0, fmt.Errorf("demote %q: %w", left[0], err)
	}
	pin := pins.prepare(path(left[0]), 512*st.Blocks)
	for _, name := range left {
		if err := os.Remove(path(name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return 0, 0, fmt.Errorf("demote %q: %w", name, err)
		}
	}
	if pins.watch(pin) {
		return 0, pin.bytes, nil
	}
	return 512 * st.Blocks, 0, nil
}

func notAtHome(name string, at Standing) error {
	return fmt.Errorf("demote %q: it is not on HDD as it is on NVM (%d and %d bytes): %w", name, at.HDD, at.NVM, errdefs.ErrFailedPrecondition)
}

// Prune removes from NVM what stands of a layer in its tree alone: links,
// devices, pipes and empty files, and then the directories that are empty. The
// layer's own directory stays, and so does all that is in a directory that HDD
// does not have: containerd's applier reads owner and mode of a directory from
// whichever tier has it. It returns the bytes that came free.
func (s *Store) Prune(id string) (freed int64, err error) {
	var dirs []Entry
	home := map[string]bool{}
	for e, err := range s.OnNVM(id) {
		if err != nil {
			return freed, err
		}
		if e.Mode.IsDir() {
			st, err := os.Lstat(filepath.Join(s.DataRoot(placement.HDD), e.Redirect))
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				return freed, fmt.Errorf("prune layer %q: %w", id, err)
			}
			if home[e.Redirect] = err == nil && st.IsDir(); home[e.Redirect] && e.Redirect != "/"+id {
				dirs = append(dirs, e)
			}
			continue
		}
		if e.Data() || !home[filepath.Dir(e.Redirect)] {
			continue
		}
		if err := os.Remove(filepath.Join(s.DataRoot(placement.NVM), e.Redirect)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return freed, fmt.Errorf("prune layer %q: %w", id, err)
		}
		if e.Links == 1 {
			freed += e.Bytes
		}
	}
	for _, e := range slices.Backward(dirs) { // what is in a directory comes before it
		switch err := unix.Rmdir(filepath.Join(s.DataRoot(placement.NVM), e.Redirect)); {
		case err == nil:
			freed += e.Bytes
		case !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.ENOENT):
			return freed, fmt.Errorf("prune %q: %w", e.Redirect, err)
		}
	}
	return freed, nil
}
