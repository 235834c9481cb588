// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"os"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/internal/erofs"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

const (
	// learningAhead is how far the kernel reads ahead on a view while a start is traced that finds its packs in the page cache:
	// the trace then tells what the program touched, and each page costs a copy and no request to the disk.
	learningAhead = 16 << 10
	// warmShare is the share of the packs' bytes that must be cached for that.
	warmShare = 0.9
)

// StartBegins prepares the view of a chain for a start that is traced. Files of a pack are read through the view, with its
// read-ahead, and what is read ahead counts as touched. A start right after a pull does not need it: the packs are cached. One
// that must read the disk does: with the short read-ahead it makes twice as many requests.
func (s *Store) StartBegins(ctx context.Context, view string, chain []LayerID) {
	bytes := int64(pack.ViewReadAhead)
	held, cached := s.packsCached(chain)
	if float64(cached) >= warmShare*float64(held) {
		bytes = learningAhead
	}
	log.G(ctx).WithFields(log.Fields{"view": view, "held": held, "cached": cached, "read_ahead": bytes}).Debug("a start begins")
	s.views.readAhead(ctx, view, bytes)
}

// StartsEnded is called when no start that has the view is traced any more.
func (s *Store) StartsEnded(ctx context.Context, view string) {
	s.views.readAhead(ctx, view, pack.ViewReadAhead)
}

func (v *views) readAhead(ctx context.Context, id string, bytes int64) {
	v.mu.Lock()
	ahead, ok := v.ahead[id]
	v.mu.Unlock()
	if !ok {
		return // a process before this one has mounted it
	}
	if err := ahead.Set(bytes); err != nil {
		log.G(ctx).WithError(err).WithField("view", id).Debug("the kernel reads ahead on a view as before")
	}
}

func (v *views) mounted(id string, ahead erofs.ReadAhead) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.ahead[id] = ahead
}

func (v *views) forgetReadAhead(id string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	delete(v.ahead, id)
}

// packsCached is how many bytes the packs of some layers hold, and how many of them are in the page cache: none where one cannot
// be read. Their mount keeps their inodes in memory, so that asking reads nothing.
func (s *Store) packsCached(chain []LayerID) (held, cached int64) {
	for _, id := range chain {
		h, c, err := cachedOf(s.PackPath(id))
		if err != nil {
			return 1, 0
		}
		held, cached = held+h, cached+c
	}
	return held, cached
}

// cachedOf is how many bytes a file has, without its holes, and how many of them are in the page cache.
func cachedOf(path string) (bytes, cached int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return 0, 0, err
	}
	var c unix.Cachestat_t
	if err := unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{}, &c, 0); err != nil {
		return 0, 0, err
	}
	return st.Blocks * 512, int64(c.Cache) * int64(os.Getpagesize()), nil
}
