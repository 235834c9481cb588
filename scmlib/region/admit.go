// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package region

import (
	"fmt"

	"github.com/containerd/errdefs"
)

// Quota is what a namespace may have. 0 does not limit.
type Quota struct {
	Bytes   int64 `json:"bytes"`
	Regions int   `json:"regions"`
}

// Books is what is promised, and what there is.
type Books struct {
	Limit    int64 `json:"limit"`    // bytes of all regions; 0: what the filesystem has
	Headroom int64 `json:"headroom"` // bytes of the filesystem that stay free
	Reserve  int64 `json:"reserve"`  // bytes that others leave to regions
	Free     int64 `json:"free"`     // bytes of the filesystem
	Others   int64 `json:"others"`   // bytes promised to others, which Free may still count

	Promised   int64            `json:"promised"` // bytes of all regions
	Pool       int64            `json:"pool"`     // bytes that wait in the pool: not promised to anyone
	Making     int64            `json:"making"`   // bytes promised to regions in the making, which Free may still count
	Namespaces map[string]Usage `json:"namespaces"`
}

// Usage is what a namespace has.
type Usage struct {
	Bytes   int64 `json:"bytes"`
	Regions int   `json:"regions"`
}

// admit decides if a namespace may have size bytes more, in so many more regions. fromPool is what the pool would give up for it.
func admit(b Books, q Quota, namespace string, size int64, regions int, fromPool int64) error {
	u := b.Namespaces[namespace]
	switch {
	case q.Regions > 0 && regions > 0 && u.Regions+regions > q.Regions:
		return fmt.Errorf("namespace %q has %d regions, its quota is %d: remove some, or raise the quota: %w", namespace, u.Regions, q.Regions, errdefs.ErrResourceExhausted)
	case q.Bytes > 0 && size > q.Bytes-u.Bytes:
		return fmt.Errorf("namespace %q has %s in regions and asks for %s more, its quota is %s: %w", namespace, FormatSize(u.Bytes), FormatSize(size),
			FormatSize(q.Bytes), errdefs.ErrResourceExhausted)
	case b.Limit > 0 && size > b.Limit-b.Promised-b.Making-b.Pool+fromPool:
		return fmt.Errorf("%s asked for, but all regions together may have %s and %s is promised: %w", FormatSize(size), FormatSize(b.Limit),
			FormatSize(b.Promised+b.Making), errdefs.ErrResourceExhausted)
	case size > room(b)+fromPool:
		return fmt.Errorf("%s asked for, but NVM has room for %s (%s free, of which %s stay free and %s are promised): %w", FormatSize(size),
			FormatSize(max(0, room(b)+fromPool)), FormatSize(b.Free), FormatSize(b.Headroom), FormatSize(b.Making+b.Others), errdefs.ErrResourceExhausted)
	}
	return nil
}

// room is what the filesystem has for regions. Of what others were promised they may have written some, which Free does not count any more: so their promises
// count in full where regions ask for more than was kept for them, and not at all for that.
func room(b Books) int64 {
	free := b.Free - b.Headroom - b.Making
	return max(free-b.Others, min(free, b.unclaimed()))
}

// unclaimed is what of the reserve no region has; negative where they have more.
func (b Books) unclaimed() int64 { return b.Reserve - b.Promised - b.Pool - b.Making }
