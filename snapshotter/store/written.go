// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// Written counts what the writable directory of an active snapshot takes, as continuity's fs.DiskUsage does, and tells on which
// tier it stands. It walks the directory, so it may take long, and ends with ctx; it holds no lock and no transaction. The
// container may go on writing: what vanishes meanwhile is not counted. ErrNotFound if there is no such directory.
func (s *Store) Written(ctx context.Context, id string) (placement.Tier, snapshots.Usage, error) {
	t, err := s.Tiers.StagedOn(id)
	if err != nil {
		return 0, snapshots.Usage{}, err
	}
	dir := s.Tiers.Upper(t, id)
	usage, err := written(ctx, dir)
	if err != nil {
		return 0, snapshots.Usage{}, fmt.Errorf("count directory %q: %w", dir, err)
	}
	return t, usage, nil
}

// written counts the inodes at and below dir and the bytes that they occupy, each inode once.
func written(ctx context.Context, dir string) (usage snapshots.Usage, err error) {
	root, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if vanished(err) {
		return usage, fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	if err != nil {
		return usage, err
	}
	defer unix.Close(root)
	type inode struct{ dev, ino uint64 }
	linked := map[inode]bool{} // inodes with several names
	count := func(st *unix.Stat_t) {
		if st.Nlink > 1 && st.Mode&unix.S_IFMT != unix.S_IFDIR {
			if linked[inode{st.Dev, st.Ino}] {
				return
			}
			linked[inode{st.Dev, st.Ino}] = true
		}
		usage.Inodes++
		usage.Size += st.Blocks * 512
	}
	var st unix.Stat_t
	if err := unix.Fstat(root, &st); err != nil {
		return usage, err
	}
	count(&st)
	for todo := []*directory{nil}; len(todo) > 0; {
		d := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if err := eachIn(ctx, root, d.path(), func(name string, st *unix.Stat_t) {
			count(st)
			if st.Mode&unix.S_IFMT == unix.S_IFDIR {
				todo = append(todo, &directory{d, name})
			}
		}); err != nil {
			return usage, err
		}
	}
	return usage, nil
}

// directory is one that is still to be read. Whole paths would let a container have us take gigabytes of memory for deep
// directories with many in them.
type directory struct {
	parent *directory // nil: the root is
	name   string
}

// path is that below the root; of nil, which is the root, "".
func (d *directory) path() string {
	var names []string
	for ; d != nil; d = d.parent {
		names = append(names, d.name)
	}
	slices.Reverse(names)
	return strings.Join(names, "/")
}

// eachIn calls fn for each name in a directory, by its path below root. It is opened piece by piece and no symlink is
// followed, since a container may change it and make it longer than PATH_MAX.
func eachIn(ctx context.Context, root int, path string, fn func(name string, st *unix.Stat_t)) error {
	const batch = 1024
	fd, err := pack.OpenBeneath(root, path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC)
	if vanished(err) {
		return nil
	}
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), "/"+path)
	defer f.Close()
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		names, err := f.Readdirnames(batch)
		for _, name := range names {
			var st unix.Stat_t
			if err := unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
				if vanished(err) {
					continue
				}
				return fmt.Errorf("stat %q: %w", name, err)
			}
			fn(name, &st)
		}
		if errors.Is(err, io.EOF) || vanished(err) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// vanished reports whether an error says that a name is gone, or is another file by now.
func vanished(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP)
}
