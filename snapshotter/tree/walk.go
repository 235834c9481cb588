// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package tree

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

// dir is what the walk found in one directory: its entries, encoded, with cuts where something has to be put in that is
// known only when the capture is put together.
type dir struct {
	path   string // relative to the walk's root, empty for the root
	name   string
	depth  int
	attr   dirAttr
	buf    []byte
	cuts   []cut
	parent *dir
}

// dirAttr is what the overlay xattrs of a directory say.
type dirAttr struct {
	opaque    bool   // hides the layers below
	xwhiteout bool   // whiteouts in it may be files with an xattr
	redirect  string // a renamed lower directory: where it was
}

// cut is a place in the entries of a directory: the contents of a subdirectory, or an entry that is not encoded yet.
type cut struct {
	off   int
	child *dir
	late  *late
}

// late is a file whose record depends on what is found elsewhere: its other names, or the layers below.
type late struct {
	name     string
	ino      inode
	dev, num uint64 // st_dev, st_ino
	blocks   int64  // st_blocks
	single   bool   // the only name
	whiteout bool   // already encoded, only to be counted
	metacopy bool   // has its data in a lower layer:
	redirect string // there, or at its own path if empty
}

// walker walks a layer's directory with a few threads. Each has a working directory of its own and reads files by their
// bare names, so neither the depth of the tree nor symlinks in it matter.
type walker struct {
	root    int // O_PATH descriptor
	idLen   int // of the layer id
	mu      sync.Mutex
	wake    sync.Cond
	todo    []*dir // last in, first out: bounds what waits
	open    int    // directories waiting or being read
	err     error
	stats   Stats // of what needs no second look: all but inodes with several names
	lookups bool  // there are metacopy files or redirected directories
}

// walk reads the directory at path and everything below it.
func walk(ctx context.Context, path string, idLen int) (*dir, *walker, *inode, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, nil, fmt.Errorf("open layer directory %q: %w", path, err)
	}
	defer unix.Close(fd)
	w := &walker{root: fd, idLen: idLen}
	w.wake.L = &w.mu
	root := &dir{}
	attrs, err := w.rootAttrs(root)
	if err != nil {
		return nil, nil, nil, fmt.Errorf("read layer directory %q: %w", path, err)
	}
	w.todo, w.open = []*dir{root}, 1
	stop := context.AfterFunc(ctx, func() { w.fail(ctx.Err()) })
	var workers sync.WaitGroup
	for range min(max(runtime.GOMAXPROCS(0), 2), 8) {
		workers.Go(func() {
			if err := newThread(w).run(); err != nil {
				w.fail(err)
			}
		})
	}
	workers.Wait()
	stop()
	w.mu.Lock() // the context may just be ending
	defer w.mu.Unlock()
	if w.err != nil {
		return nil, nil, nil, fmt.Errorf("walk layer directory %q: %w", path, w.err)
	}
	return root, w, attrs, nil
}

func (w *walker) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.err = err
	}
	w.wake.Broadcast()
}

// rootAttrs reads the attributes of the layer's directory itself.
func (w *walker) rootAttrs(root *dir) (*inode, error) {
	var attrs *inode
	errs := make(chan error)
	go func() { // a thread of its own, see newThread
		errs <- func() error {
			t := newThread(w)
			if err := t.enter(root); err != nil {
				return err
			}
			var st unix.Stat_t
			if err := unix.Fstatat(unix.AT_FDCWD, ".", &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
				return err
			}
			o, err := t.xattrs(".")
			if err != nil {
				return err
			}
			root.attr = o.dir()
			root.attr.redirect = "" // the root is where it is
			in := statInode(&st)
			attrs = &in
			attrs.xattrs = slices.Clone(t.list)
			w.stats = Stats{Entries: 1, Dirs: 1, Inodes: 1, Bytes: st.Blocks * 512}
			return nil
		}()
	}()
	err := <-errs
	return attrs, err
}

// take returns a directory to read, or nil when all are read or something failed.
func (w *walker) take() *dir {
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

// done hands in what a directory gave.
func (w *walker) done(d *dir, s *Stats, lookups bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i := len(d.cuts) - 1; i >= 0; i-- {
		if c := d.cuts[i].child; c != nil {
			w.todo = append(w.todo, c)
			w.open++
		}
	}
	w.open--
	sum, add := w.stats.fields(), s.fields()
	for i := range sum {
		*sum[i] += *add[i]
	}
	w.lookups = w.lookups || lookups
	w.wake.Broadcast()
}

// thread is one thread of the walk with its buffers.
type thread struct {
	w     *walker
	err   error
	dents []byte
	names []string
	attrs []string // names of xattrs
	buf   []byte   // for lists, values and symlinks
	list  []byte   // encoded xattrs of the file last read
}

// newThread gives the calling goroutine a thread with a working directory of its own. The thread ends with the
// goroutine, since it is never unlocked.
func newThread(w *walker) *thread {
	runtime.LockOSThread()
	t := &thread{w: w, dents: make([]byte, 64<<10), buf: make([]byte, 64<<10)} // XATTR_LIST_MAX, XATTR_SIZE_MAX
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		t.err = fmt.Errorf("unshare the working directory: %w", err)
	}
	return t
}

func (t *thread) run() error {
	for {
		d := t.w.take()
		if d == nil {
			return nil
		}
		if err := t.read(d); err != nil {
			return fmt.Errorf("%q: %w", "/"+d.path, err)
		}
	}
}

// openBeneath opens a directory below root by a path of any length, piece by piece, and follows no symlink.
func openBeneath(root int, path string) (int, error) {
	how := unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	}
	if path == "" {
		return unix.Openat2(root, ".", &how)
	}
	at := root
	for {
		piece := path
		if len(path) > maxTarget {
			piece = path[:strings.LastIndexByte(path[:maxTarget], '/')]
		}
		fd, err := unix.Openat2(at, piece, &how)
		if at != root {
			unix.Close(at)
		}
		if err != nil || len(piece) == len(path) {
			return fd, err
		}
		at, path = fd, path[len(piece)+1:]
	}
}

// enter makes d the working directory.
func (t *thread) enter(d *dir) error {
	fd, err := t.open(d)
	if err == nil {
		unix.Close(fd)
	}
	return err
}

func (t *thread) open(d *dir) (int, error) {
	if t.err != nil {
		return -1, t.err
	}
	fd, err := openBeneath(t.w.root, d.path)
	if err != nil {
		return -1, fmt.Errorf("open directory: %w", err)
	}
	if err := unix.Fchdir(fd); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("change to directory: %w", err)
	}
	return fd, nil
}

// read reads one directory.
func (t *thread) read(d *dir) error {
	fd, err := t.open(d)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	t.names = t.names[:0]
	for {
		n, err := unix.ReadDirent(fd, t.dents)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("read directory: %w", err)
		}
		if n == 0 {
			break
		}
		_, _, t.names = unix.ParseDirent(t.dents[:n], -1, t.names)
	}
	slices.Sort(t.names)
	s := Stats{}
	lookups := false
	d.buf = make([]byte, 0, len(t.names)*48)
	for _, name := range t.names {
		l, err := t.entry(d, name, &s)
		if err != nil {
			return fmt.Errorf("%q: %w", name, err)
		}
		lookups = lookups || l
	}
	t.w.done(d, &s, lookups)
	return nil
}

// entry reads one file and encodes it.
func (t *thread) entry(d *dir, name string, s *Stats) (lookup bool, err error) {
	if len(d.path)+len(name)+2 > maxPath {
		return false, fmt.Errorf("the path is longer than %d bytes: %w", maxPath, errdefs.ErrInvalidArgument)
	}
	var st unix.Stat_t
	if err := unix.Fstatat(unix.AT_FDCWD, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return false, fmt.Errorf("stat: %w", err)
	}
	o, err := t.xattrs(name)
	if err != nil {
		return false, err
	}
	s.Entries++
	lt := late{name: name, dev: st.Dev, num: st.Ino, blocks: st.Blocks, ino: statInode(&st)}
	kind := st.Mode & unix.S_IFMT
	if lt.single = st.Nlink == 1 || kind == unix.S_IFDIR; lt.single {
		s.Inodes++
		s.Bytes += st.Blocks * 512
	}
	depth := d.depth + 1
	if kind == unix.S_IFCHR && st.Rdev == 0 || d.attr.xwhiteout && o.whiteout && kind == unix.S_IFREG && st.Size == 0 {
		d.buf = appendName(d.buf, depth, flagWhiteout, name)
		if lt.whiteout = true; !lt.single { // overlayfs links its whiteouts together
			d.wait(lt)
		}
		return false, nil
	}
	switch kind {
	case unix.S_IFREG:
		s.Files++
		lt.metacopy, lt.redirect = o.metacopy && st.Size > 0, o.redirect
	case unix.S_IFDIR:
		s.Dirs++
	case unix.S_IFLNK:
		n, err := unix.Readlink(name, t.buf)
		if err != nil {
			return false, fmt.Errorf("read symlink: %w", err)
		}
		lt.ino.target = t.buf[:n]
	}
	lt.ino.xattrs = t.list
	if !lt.single || lt.metacopy {
		lt.ino.xattrs, lt.ino.target = slices.Clone(t.list), slices.Clone(lt.ino.target)
		d.wait(lt)
		return lt.metacopy, nil
	}
	flags := inodeFlags(&lt.ino)
	if kind != unix.S_IFDIR {
		if lt.ino.hasData() {
			s.DataBytes += st.Size
			s.Unreachable += unreachable(t.w.idLen + len(d.path) + len(name) + 3)
		}
		d.buf = appendInode(appendName(d.buf, depth, flags, name), &lt.ino)
		return false, nil
	}
	child := &dir{path: name, name: name, depth: depth, attr: o.dir(), parent: d}
	if d.path != "" {
		child.path = d.path + "/" + name
	}
	// A renamed directory brings all its lower content along: nothing of what stands below at its new name shows.
	if child.attr.opaque || child.attr.redirect != "" {
		flags |= flagOpaque
	}
	d.buf = appendInode(appendName(d.buf, depth, flags, name), &lt.ino)
	d.cuts = append(d.cuts, cut{off: len(d.buf), child: child})
	return child.attr.redirect != "", nil
}

// wait puts l where the next entry of d would be. It takes a copy: few files come here, and the others stay off the heap.
func (d *dir) wait(l late) { d.cuts = append(d.cuts, cut{off: len(d.buf), late: &l}) }

// unreachable is 1 if a redirect of n bytes is longer than a path that the kernel looks up.
func unreachable(n int) int64 {
	if n > maxTarget {
		return 1
	}
	return 0
}
