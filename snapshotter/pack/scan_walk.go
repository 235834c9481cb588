// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// scanDir is a directory on disk.
type scanDir struct {
	node   *Node
	parent *scanDir
	attr   dirAttr
	later  []later // in the order of the names
	below  []part  // the lower directory that it stands over
}

// later is a name that needs a second look after the walk: a directory, a name of
// an inode with several, or a file without data.
type later struct {
	node     *Node
	sub      *scanDir
	id       fileID
	blocks   int64 // st_blocks
	multi    bool
	metacopy bool   // has its data in a lower layer:
	redirect string // there, or at its own path if empty
}

// path of a name in d, relative to the root of the walk.
func (d *scanDir) path(name string) string {
	names := []string{name}
	for ; d.parent != nil; d = d.parent {
		names = append(names, d.node.Name)
	}
	slices.Reverse(names)
	return strings.TrimSuffix(strings.Join(names, "/"), "/")
}

// scanWalker walks a directory with a few threads. Each has a working directory of
// its own and reads files by their bare names, so neither the depth of the tree
// nor symlinks in it matter.
type scanWalker struct {
	root    int // O_PATH descriptor
	mu      sync.Mutex
	wake    sync.Cond
	todo    []*scanDir // last in, first out: bounds what waits
	open    int        // directories waiting or being read
	err     error
	stats   ScanStats // Inodes and Bytes of inodes with one name
	lookups bool      // there are files without data or renamed directories
}

// scanWalk reads the directory at path and everything below it.
func scanWalk(ctx context.Context, path string) (*scanDir, *scanWalker, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("open directory %q: %w", path, err)
	}
	defer unix.Close(fd)
	w := &scanWalker{root: fd}
	w.wake.L = &w.mu
	root := &scanDir{node: &Node{Inode: &Inode{}}}
	w.todo, w.open = []*scanDir{root}, 1
	stop := context.AfterFunc(ctx, func() { w.fail(ctx.Err()) })
	var workers sync.WaitGroup
	for range min(max(runtime.GOMAXPROCS(0), 2), 8) {
		workers.Go(func() {
			if err := w.work(); err != nil {
				w.fail(err)
			}
		})
	}
	workers.Wait()
	stop()
	w.mu.Lock() // the context may just be ending
	defer w.mu.Unlock()
	if w.err != nil {
		return nil, nil, fmt.Errorf("walk directory %q: %w", path, w.err)
	}
	return root, w, nil
}

func (w *scanWalker) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.err = err
	}
	w.wake.Broadcast()
}

// take returns a directory to read, or nil when all are read or something failed.
func (w *scanWalker) take() *scanDir {
	w.mu.Lock()
	defer w.mu.Unlock()
	for {
		if w.err != nil || w.open == 0 {
			return nil
		}
		if n := len(w.todo); n > 0 {
			d := w.todo[n-1]
			w.todo = w.todo[:n-1]
			return d
		}
		w.wake.Wait()
	}
}

// done hands in what a directory gave. It returns the next directory for the same
// thread, one that is in its working directory, or nil.
func (w *scanWalker) done(d *scanDir, s *ScanStats, lookups bool) (next *scanDir) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i := len(d.later) - 1; i >= 0; i-- {
		if sub := d.later[i].sub; sub != nil {
			if next != nil {
				w.todo = append(w.todo, next)
			}
			next = sub
			w.open++
		}
	}
	w.open--
	w.stats.Inodes += s.Inodes
	w.stats.Bytes += s.Bytes
	w.lookups = w.lookups || lookups
	if w.err != nil {
		return nil
	}
	w.wake.Broadcast()
	return next
}

// scanThread is one thread of the walk with its buffers.
type scanThread struct {
	w     *scanWalker
	at    *scanDir // working directory
	dents []byte
	names []string
	attrs []string // names of xattrs
	buf   []byte   // for lists, values and symlinks
}

// work is one thread of the walk. The thread ends with the goroutine, since it is
// never unlocked.
func (w *scanWalker) work() error {
	runtime.LockOSThread()
	t := &scanThread{w: w, dents: make([]byte, 64<<10), buf: make([]byte, 64<<10)} // XATTR_LIST_MAX, XATTR_SIZE_MAX
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("unshare the working directory: %w", err)
	}
	// The main thread does not end with its goroutine, and would pin the directory.
	defer func() { _ = unix.Chdir("/") }()
	for d := w.take(); d != nil; {
		next, err := t.read(d)
		if err != nil {
			return fmt.Errorf("%q: %w", "/"+d.path(""), err)
		}
		if d = next; d == nil {
			d = w.take()
		}
	}
	return nil
}

// enter makes d the working directory.
func (t *scanThread) enter(d *scanDir) (fd int, err error) {
	const flags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	if d.parent != nil && d.parent == t.at {
		fd, err = unix.Openat(unix.AT_FDCWD, d.node.Name, flags, 0)
	} else {
		fd, err = OpenBeneath(t.w.root, d.path(""), flags)
	}
	if err != nil {
		return -1, fmt.Errorf("open directory: %w", err)
	}
	if err := unix.Fchdir(fd); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("change to directory: %w", err)
	}
	t.at = d
	return fd, nil
}

// read reads one directory, and returns one in it that is to be read next.
func (t *scanThread) read(d *scanDir) (next *scanDir, err error) {
	fd, err := t.enter(d)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	t.names = t.names[:0]
	for {
		n, err := unix.ReadDirent(fd, t.dents)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read directory: %w", err)
		}
		if n == 0 {
			break
		}
		_, _, t.names = unix.ParseDirent(t.dents[:n], -1, t.names)
	}
	slices.Sort(t.names)
	s, lookups := ScanStats{}, false
	if d.parent == nil {
		if err := t.root(d, &s); err != nil {
			return nil, err
		}
	}
	nodes, inodes := make([]Node, len(t.names)), make([]Inode, len(t.names))
	d.node.Children = make([]*Node, len(nodes))
	for i, name := range t.names {
		d.node.Children[i] = &nodes[i]
		nodes[i].Name = name
		l, err := t.entry(d, &nodes[i], &inodes[i], &s)
		if err != nil {
			return nil, fmt.Errorf("%q: %w", name, err)
		}
		lookups = lookups || l
	}
	return t.w.done(d, &s, lookups), nil
}

// root reads the attributes of the directory that the walk begins at.
func (t *scanThread) root(d *scanDir, s *ScanStats) error {
	var st unix.Stat_t
	if err := unix.Fstatat(unix.AT_FDCWD, ".", &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("stat: %w", err)
	}
	list, o, err := t.xattrs(".")
	if err != nil {
		return err
	}
	statInode(d.node.Inode, &st)
	d.node.Inode.Xattrs = list
	d.attr = o.dir()
	d.attr.redirect = "" // the root is where it is
	d.node.Inode.Opaque = d.attr.opaque
	s.Inodes, s.Bytes = 1, st.Blocks*512
	return nil
}

// entry reads one file in the working directory d. It reports whether the file
// refers to the layers below.
func (t *scanThread) entry(d *scanDir, node *Node, in *Inode, s *ScanStats) (lookup bool, err error) {
	var st unix.Stat_t
	if err := unix.Fstatat(unix.AT_FDCWD, node.Name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return false, fmt.Errorf("stat: %w", err)
	}
	list, o, err := t.xattrs(node.Name)
	if err != nil {
		return false, err
	}
	kind := st.Mode & unix.S_IFMT
	l := later{node: node, id: fileID{st.Dev, st.Ino}, blocks: st.Blocks, multi: st.Nlink > 1 && kind != unix.S_IFDIR}
	if !l.multi {
		s.Inodes++
		s.Bytes += st.Blocks * 512
	}
	if kind == unix.S_IFCHR && st.Rdev == 0 || d.attr.xwhiteout && o.whiteout && kind == unix.S_IFREG && st.Size == 0 {
		if l.multi { // overlayfs links its whiteouts together
			d.later = append(d.later, l)
		}
		return false, nil
	}
	statInode(in, &st)
	in.Xattrs, node.Inode = list, in
	switch kind {
	case unix.S_IFREG:
		l.metacopy, l.redirect = o.metacopy && st.Size > 0, o.redirect
		if !l.metacopy && st.Size > 0 && st.Size <= InlineMax {
			if in.Inline, err = t.content(node.Name, st.Size); err != nil {
				return false, err
			}
		}
	case unix.S_IFLNK:
		n, err := unix.Readlink(node.Name, t.buf)
		if err != nil {
			return false, fmt.Errorf("read symlink: %w", err)
		}
		in.Inline = string(t.buf[:n])
	case unix.S_IFDIR:
		l.sub = &scanDir{node: node, attr: o.dir(), parent: d}
		// A renamed directory brings all its lower content along: nothing of what
		// stands below at its new name shows.
		in.Opaque = l.sub.attr.opaque || l.sub.attr.redirect != ""
	}
	if l.sub != nil || l.multi || l.metacopy {
		d.later = append(d.later, l)
	}
	return l.metacopy || l.sub != nil && l.sub.attr.redirect != "", nil
}

// content reads a small file in the working directory.
func (t *scanThread) content(name string, size int64) (string, error) {
	fd, err := unix.Openat(unix.AT_FDCWD, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("open: %w", err)
	}
	defer unix.Close(fd)
	n, err := unix.Pread(fd, t.buf[:InlineMax+1], 0)
	if err != nil {
		return "", fmt.Errorf("read: %w", err)
	}
	if int64(n) != size {
		return "", fmt.Errorf("it has %d bytes now and had %d: %w", n, size, errdefs.ErrAborted)
	}
	return string(t.buf[:n]), nil
}

// OpenBeneath opens a path of any length below a directory, piece by piece, and
// follows no symlink. flags are those of open(2) for the last component; "" is the
// directory itself. The caller closes the descriptor.
func OpenBeneath(root int, path string, flags int) (int, error) {
	how := unix.OpenHow{Flags: uint64(flags), Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS}
	if path == "" {
		return unix.Openat2(root, ".", &how)
	}
	at := root
	for {
		piece := path
		step := how
		if len(path) >= unix.PathMax {
			i := strings.LastIndexByte(path[:unix.PathMax-1], '/')
			if i <= 0 {
				i = len(path) // the kernel says that the name is too long
			} else {
				step.Flags = unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC
			}
			piece = path[:i]
		}
		fd, err := unix.Openat2(at, piece, &step)
		if at != root {
			unix.Close(at)
		}
		if err != nil || len(piece) == len(path) {
			return fd, err
		}
		at, path = fd, path[len(piece)+1:]
	}
}
