// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package tree keeps the metadata half of a layer: names, types, owners, modes, times, xattrs, hard links and
// whiteouts.
//
// [Capture] reads them once from the directory of a layer. [Write] merges the captures of a chain into one EROFS image
// in which each non-empty regular file is a hole that carries trusted.overlay.metacopy and a trusted.overlay.redirect
// into the data roots. Mounted as the lower directory of an overlay with two data-only directories below it, the image
// shows what overlayfs would show over the layers themselves. Both formats are described in docs/tree.md.
//
// All functions are safe for concurrent use; none of them keeps state between calls.
package tree

import (
	"context"
	"errors"
	"iter"

	"golang.org/x/sys/unix"
)

// Stats sums up a captured layer.
type Stats struct {
	Entries int64 // names, whiteouts and the root included
	Files   int64 // names of regular files
	Dirs    int64 // directories, the root included
	Inodes  int64 // distinct inodes below and including the layer's directory, whiteouts too
	// Bytes is the disk usage, 512 times st_blocks over the distinct inodes, as continuity's fs.DiskUsage counts it.
	Bytes int64
	// DataBytes is the sum of the sizes of the distinct non-empty regular files that have their data in this layer.
	DataBytes int64
	// Unreachable counts the regular files whose redirect is longer than the kernel looks up (PATH_MAX, 4096 bytes
	// with the terminator). They are visible in the tree; opening them fails with ENAMETOOLONG.
	Unreachable int64
}

// TreeStats sums up an image.
type TreeStats struct {
	Entries int64 // visible names, the root included
	Inodes  int64
	Bytes   int64 // size of the image
}

// Chain is the captures of a chain of layers, as paths of capture files, bottom layer first.
type Chain []string

// Entry is one name in the merged tree of a chain.
type Entry struct {
	Path     string // absolute; "/" is the root
	Mode     uint32 // st_mode
	UID, GID uint32
	Size     int64 // regular files and symlinks
	Sec      int64 // modification time, seconds since 1970
	Nsec     uint32
	Rdev     uint64 // st_rdev of device nodes
	Nlink    uint32 // visible names of the inode; 1 for a directory
	Inode    uint64 // names of one inode have the same number; it means nothing outside of one iteration
	Xattrs   map[string][]byte
	Target   string // of a symlink
	Redirect string // "/<layer>/<path>": where the data of a non-empty regular file stand below a data root
	Layer    string // id of the layer the entry comes from, of a directory the topmost one
}

// Entries iterates over the merged tree of the chain in path order: names compare bytewise within a directory, and a
// directory comes before what is in it. An error ends the iteration.
func (c Chain) Entries(ctx context.Context) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		if err := c.entries(ctx, yield); err != nil && !errors.Is(err, errStop) {
			yield(Entry{}, err)
		}
	}
}

func (c Chain) entries(ctx context.Context, yield func(Entry, error) bool) error {
	layers, err := c.open()
	if err != nil {
		return err
	}
	// The number of visible names of an inode is known only after all of them: count first, where there are any.
	links := map[uint64]uint32{}
	if err := merge(ctx, layers, visitor{enter: func(v *visible) error {
		if v.ino.multi {
			links[v.id()]++
		}
		return nil
	}}); err != nil {
		return err
	}
	return merge(ctx, layers, visitor{enter: func(v *visible) error {
		e := Entry{
			Path: "/" + string(v.path), Mode: v.ino.mode, UID: v.ino.uid, GID: v.ino.gid, Size: int64(v.ino.size),
			Sec: v.ino.sec, Nsec: v.ino.nsec, Rdev: v.ino.rdev, Nlink: 1, Inode: v.id(),
			Target: string(v.ino.target), Layer: v.layer.id,
		}
		if v.ino.multi {
			e.Nlink = links[e.Inode]
		}
		if v.ino.hasData() {
			e.Redirect = string(v.redirect(nil))
		}
		for name, value := range v.ino.eachXattr {
			if e.Xattrs == nil {
				e.Xattrs = map[string][]byte{}
			}
			e.Xattrs[string(name)] = append([]byte{}, value...)
		}
		if !yield(e, nil) {
			return errStop
		}
		return nil
	}})
}

var errStop = errors.New("iteration stopped")

func isDir(mode uint32) bool { return mode&unix.S_IFMT == unix.S_IFDIR }
func isReg(mode uint32) bool { return mode&unix.S_IFMT == unix.S_IFREG }
