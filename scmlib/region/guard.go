// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package region

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// guard watches the files of attached regions: a container may write to its file, and so extend or cut it. Stores through a mapping make no
// event (inotify(7)), so what programs should do costs nothing. The guard has each file open for writing, which also means that no container gets
// a lease on it, by which it could stop the daemon.
type guard struct {
	inotify *os.File
	report  func(path string, f *os.File)
	done    chan struct{}
	mu      sync.Mutex
	watched map[int32]*watched
}

type watched struct {
	path string
	f    *os.File
}

func newGuard(report func(string, *os.File)) (*guard, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("watch regions: %w", err)
	}
	g := &guard{inotify: os.NewFile(uintptr(fd), "inotify"), report: report, done: make(chan struct{}), watched: map[int32]*watched{}}
	go g.run()
	return g, nil
}

// watch begins to watch a file, if it is not watched.
func (g *guard) watch(path string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, w := range g.watched {
		if w.path == path {
			return nil
		}
	}
	f, err := openData(path, os.O_RDWR)
	if err != nil {
		return err
	}
	raw, err := g.inotify.SyscallConn()
	var wd int
	if err == nil {
		cerr := raw.Control(func(fd uintptr) { wd, err = unix.InotifyAddWatch(int(fd), path, unix.IN_MODIFY) })
		err = errors.Join(err, cerr)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("watch %q (is fs.inotify.max_user_watches too small?): %w", path, err), f.Close())
	}
	g.watched[int32(wd)] = &watched{path, f}
	return nil
}

// forget ends the watch of a file that is going.
func (g *guard) forget(path string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for wd, w := range g.watched {
		if w.path == path {
			delete(g.watched, wd)
			w.f.Close()
			if raw, err := g.inotify.SyscallConn(); err == nil {
				_ = raw.Control(func(fd uintptr) { _, _ = unix.InotifyRmWatch(int(fd), uint32(wd)) })
			}
		}
	}
}

func (g *guard) run() {
	defer close(g.done)
	buf := make([]byte, 64<<10)
	for {
		n, err := g.inotify.Read(buf)
		if err != nil {
			return // closed
		}
		g.mu.Lock()
		for at := 0; at+unix.SizeofInotifyEvent <= n; {
			wd, mask := int32(binary.NativeEndian.Uint32(buf[at:])), binary.NativeEndian.Uint32(buf[at+4:])
			at += unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(buf[at+12:]))
			if mask&unix.IN_Q_OVERFLOW != 0 {
				for _, w := range g.watched {
					g.report(w.path, w.f)
				}
			} else if w := g.watched[wd]; w != nil && mask&unix.IN_MODIFY != 0 {
				g.report(w.path, w.f)
			}
		}
		g.mu.Unlock()
	}
}

func (g *guard) close() error {
	err := g.inotify.Close()
	<-g.done
	for _, w := range g.watched {
		w.f.Close()
	}
	return err
}

// trespass is called when a container has written to the file of its region.
func (s *Store) trespass(path string, f *os.File) {
	ref, err := refOfKey(filepath.Base(filepath.Dir(path)))
	if err == nil {
		err = s.restore(ref, f)
	}
	if err != nil {
		log.L.WithError(err).WithField("region", path).Error("cannot give a region its size and blocks back")
	}
}

// openData opens the file of a region. A container may have taken a lease on it, which must not block, and may have made it immutable.
func openData(path string, flags int) (*os.File, error) {
	flags |= unix.O_NONBLOCK | unix.O_NOFOLLOW | unix.O_CLOEXEC
	f, err := os.OpenFile(path, flags, 0)
	if errors.Is(err, unix.EPERM) {
		err = makeWritable(path)
		if err == nil {
			f, err = os.OpenFile(path, flags, 0)
		}
	}
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, fmt.Errorf("open %q: its container has a lease on it: %w", path, errdefs.ErrUnavailable)
	}
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("open %q: not a regular file: %w", path, errdefs.ErrDataLoss)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func makeWritable(path string) error {
	f, err := openData(path, os.O_RDONLY)
	if err != nil {
		return err
	}
	log.L.WithField("file", path).Warn("a region's file was immutable: its container has made it so; made writable")
	return errors.Join(clearFlags(f), f.Close())
}
