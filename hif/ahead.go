// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"fmt"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/hif/parts"
	"github.com/nhybrid/nhybrid/hif/profile"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

const (
	// aheadWeight is the share of starts that must have used a file for the next one
	// to be expected to.
	aheadWeight = 0.5
	// aheadBytes bounds what is read for one start.
	aheadBytes = 256 << 20
	// aheadUnknown is the size up to which a file is read whole of which it is not
	// known what starts touch. Of larger ones the trace could not tell any more
	// (package trace).
	aheadUnknown = 256 << 10
)

// readAhead brings what starts of an image have used from NVM into the page
// cache, in the order of its use, while the runtime is still making the
// container: that takes runc some 60 ms, in which NVM has nothing to do. One
// reader is enough for all containers of an image that start at once. Called
// with mu held.
//
// Of files of which only parts are on NVM the parts are read, not the files:
// through EROFS that costs so much of the processor that runc was late by more
// than the program was early. They are few and in one piece, so they go first.
func (m *Manager) readAhead(image Image) {
	if m.ahead[image.View] {
		return
	}
	m.ahead[image.View] = true
	m.wg.Go(func() {
		defer func() {
			m.mu.Lock()
			defer m.mu.Unlock()
			delete(m.ahead, image.View)
		}()
		if err := m.readAheadOf(image); err != nil {
			log.L.WithError(err).WithField("image", image.name()).Debug("not all is read ahead")
		}
	})
}

func (m *Manager) readAheadOf(image Image) error {
	left := aheadBytes - parts.ReadAhead(m.store.PartsPath(image.View), aheadBytes)
	p, _, err := m.known(image.Digest)
	if err != nil {
		return err
	}
	var keys []fileKey
	var ranges [][]profile.Range
	for i := range p.Files {
		f := &p.Files[i]
		if r := expected(f); len(r) > 0 {
			keys, ranges = append(keys, fileKey{f.Layer, f.Path}), append(ranges, r)
		}
	}
	refs, err := m.library.refs(m.ctx, image, keys)
	if err != nil {
		return err
	}
	root, err := unix.Open(m.store.DataRoot(), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open data root: %w", err)
	}
	defer unix.Close(root)
	for i, ref := range refs {
		if left <= 0 || m.ctx.Err() != nil {
			break
		}
		if ref != (pack.Ref{}) {
			left -= willNeed(root, ref.Redirect()[1:], ranges[i])
		}
	}
	return nil
}

// expected is what the next start is expected to read of a file.
func expected(f *profile.File) []profile.Range {
	switch {
	case f.Weight < aheadWeight:
		return nil
	case len(f.Ranges) > 0:
		return f.Ranges
	case f.Size <= aheadUnknown:
		return []profile.Range{{Offset: 0, Length: f.Size}}
	}
	return nil
}

// willNeed has the kernel read ranges of a file below root, if it is there. It
// returns how many bytes.
func willNeed(root int, name string, ranges []profile.Range) (bytes int64) {
	if len(ranges) == 0 {
		return 0
	}
	how := unix.OpenHow{Flags: unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV}
	fd, err := unix.Openat2(root, name, &how)
	if err != nil {
		return 0
	}
	defer unix.Close(fd)
	for _, r := range ranges {
		bytes += parts.WillNeed(fd, r.Offset, r.Length)
	}
	return bytes
}
