// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package tier

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// maxPins bounds the memory of [Pins]: about 100 bytes each.
const maxPins = 100_000

// Pins knows of the files that were unlinked on NVM which of them are still held:
// open, mapped, running, or in the cache of an overlay through which they were
// opened. Their space is not free. It is safe for concurrent use.
//
// It asks by the file's handle, taken before the unlink: open_by_handle_at(2)
// says ESTALE once the inode is gone. A filesystem without handles cannot tell;
// its files count as free.
type Pins struct {
	root *os.File

	mu   sync.Mutex
	held []pin
}

type pin struct {
	handle unix.FileHandle
	bytes  int64
}

// NewPins returns a new tracker for files on the filesystem of a directory; close it after use.
func NewPins(dir string) (*Pins, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open directory to track unlinked files: %w", err)
	}
	return &Pins{root: f}, nil
}

// Unlink removes a file with one name, and tells which of the bytes that it
// occupied are free now and which somebody still holds. A file that is not there
// is no work. p may be nil: then nobody counts as holding anything.
func (p *Pins) Unlink(path string) (freed, held int64, err error) {
	var st unix.Stat_t
	err = unix.Lstat(path, &st)
	if err == nil {
		pin := p.prepare(path, 512*st.Blocks)
		if err = unix.Unlink(path); err == nil && p.watch(pin) {
			return 0, pin.bytes, nil
		}
	}
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
		return 0, 0, nil
	case err != nil:
		return 0, 0, fmt.Errorf("unlink %q: %w", path, err)
	}
	return 512 * st.Blocks, 0, nil
}

// Close lets go of the filesystem.
func (p *Pins) Close() error { return p.root.Close() }

// Bytes are those that are still held.
func (p *Pins) Bytes() (total int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	kept := p.held[:0]
	for _, pin := range p.held {
		if p.holds(pin) {
			kept = append(kept, pin)
			total += pin.bytes
		}
	}
	clear(p.held[len(kept):])
	p.held = kept
	return total
}

// prepare takes the handle of a file that is going to be unlinked.
func (p *Pins) prepare(path string, bytes int64) pin {
	if p == nil || bytes == 0 {
		return pin{}
	}
	handle, _, err := unix.NameToHandleAt(unix.AT_FDCWD, filepath.Clean(path), 0)
	if err != nil {
		return pin{} // EOPNOTSUPP: nobody can tell
	}
	return pin{handle, bytes}
}

// watch tells whether a file that was unlinked is still held, and counts it if so.
func (p *Pins) watch(pin pin) bool {
	if pin.bytes == 0 || !p.holds(pin) {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.held) < maxPins {
		p.held = append(p.held, pin)
	}
	return true
}

func (p *Pins) holds(pin pin) bool {
	fd, err := unix.OpenByHandleAt(int(p.root.Fd()), pin.handle, unix.O_PATH|unix.O_CLOEXEC)
	if err != nil {
		return !errors.Is(err, unix.ESTALE) && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EPERM)
	}
	defer unix.Close(fd)
	// Not every filesystem refuses an inode that has no name and no user but us.
	var st unix.Stat_t
	return unix.Fstat(fd, &st) == nil
}

// LetGo makes an overlay forget the files that nobody has open through it. Such a
// cache entry holds the inode of a file that was unlinked on NVM, and with it the
// space, until the overlay is unmounted or memory gets short. mountpoint is
// any place where the overlay is mounted, the root of a process included.
//
// A reconfiguration that changes nothing does it: the kernel shrinks the cache
// of the filesystem first (reconfigure_super in fs/super.c).
func LetGo(mountpoint string) error {
	fd, err := unix.Fspick(unix.AT_FDCWD, mountpoint, unix.FSPICK_CLOEXEC|unix.FSPICK_NO_AUTOMOUNT)
	if err != nil {
		return fmt.Errorf("pick the filesystem at %q: %w", mountpoint, err)
	}
	defer unix.Close(fd)
	// An overlay without an upper directory says EROFS to what it takes for a wish
	// to write; by then it has forgotten. Asking for ro would make others read-only.
	if err := unix.FsconfigReconfigure(fd); err != nil && !errors.Is(err, unix.EROFS) {
		return fmt.Errorf("reconfigure the filesystem at %q: %w", mountpoint, err)
	}
	return nil
}
