// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package trace records which files of which layers a container opens during
// its cold start.
//
// One fanotify group marks the filesystem of NVM and, of each watched start, the
// EROFS images from which it reads all other data: the view of its chain, and
// parts. Since Linux 6.5 (commit bc2473c90fca) overlayfs reports opens on the
// real file behind it, so every open of every container arrives there, whoever
// started it and in whatever mount namespace it runs. overlayfs opens real files
// through a private clone of each layer's mount, made when the overlay is mounted
// and used by no other; the unique id of that clone (STATX_MNT_ID_UNIQUE, Linux
// 6.8) therefore tells the containers apart. docs/hif.md has the measurements.
package trace

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// Defaults of [Config].
const (
	DefaultQuiet  = 5 * time.Second
	DefaultMax    = time.Minute
	DefaultUnused = 2 * time.Minute
	DefaultFiles  = 200_000
)

// Config says what is traced and for how long.
type Config struct {
	// Root is the data root on NVM. Its filesystem is marked while a watch is open.
	Root string
	// Quiet ends a watch when for so long no file was opened for the first time,
	// or four times as long before anything was executed.
	Quiet time.Duration
	// Max ends a watch so long after its first open.
	Max time.Duration
	// Unused ends a watch in which nothing at all was opened.
	Unused time.Duration
	// Files bounds the files remembered over all open watches (about 130 bytes
	// each). What does not fit makes the traces incomplete.
	Files int

	// limitedQueue leaves the kernel's bound of 16384 events in place, so that
	// a test can make the queue overflow.
	limitedQueue bool
	// countSelf makes the opens of this process count, so that a test can be
	// the container.
	countSelf bool
}

// Start names the container that is about to start. Upper and Tree are
// compared, byte by byte, with the options of overlay mounts as mountinfo
// shows them; both are what the snapshotter handed out.
type Start struct {
	// Snapshot is the caller's name for it.
	Snapshot string
	// Upper is the upperdir of its mount; empty for a view.
	Upper string
	// Tree is the directory given as the first of lowerdir: the merged tree of the
	// chain's view, or of an idmapped clone of it.
	Tree string
	// Parts is the mount point of the image's parts, if it has one among its
	// data-only layers (package parts); empty: none.
	Parts string
	// Home is the last data-only layer, the directory of the view in which each
	// data file stands by its number.
	Home string
	// Layers are the ids of the layers in the chain, decimal: all that the start
	// can open files of. Opens through a mount that was gone before anyone could
	// look (containerd mounts a rootfs for a moment to read /etc/passwd) are given
	// to the starts that have the layer.
	Layers []string
	// Path is where the containers of the chain see a data file, from the root of
	// their filesystem; "" if it is not known. The tracer opens it to find out
	// which container a mount is of. It calls Path with its lock held, so Path must
	// answer at once; where it knows more later, [Tracer.Retry] tells the tracer.
	Path func(pack.Ref) string
}

// Kind is what a file was opened for.
type Kind string

const (
	// Exec: the kernel executed it, as a program or as the ELF interpreter of one.
	Exec Kind = "exec"
	// Library: opened, and a shared object by its ELF header.
	Library Kind = "library"
	// Read: opened for anything else.
	Read Kind = "read"
)

// Range is a part of a file, in bytes.
type Range struct {
	Offset int64 `json:"offset"`
	Length int64 `json:"length"`
}

// File is one file that a start opened.
type File struct {
	pack.Ref               // which data file
	Kind     Kind          //
	First    time.Duration // from the beginning of the watch; late by the reader's backlog
	// Opens counts events. The kernel merges opens of one process that follow
	// on each other, so it is a lower bound.
	Opens int
	Size  int64 // bytes
	// Tier is where it stood when it was first opened. What is read through the
	// view is on HDD.
	Tier placement.Tier
	// Parts: it was opened as a file of which only parts are on NVM. Tier is
	// NVM then, whatever was read.
	Parts bool
	// Touched is how many bytes of it the start can have read: what is in the
	// page cache at its end, or was evicted meanwhile, read-ahead included. -1
	// where that says nothing: all of it was cached before, or part of it had been
	// evicted before, it is on DAX, it is gone.
	Touched int64
	// Ranges says which, for files of more than 64 KiB, in steps of [RangeGrain].
	Ranges []Range
	// Assumed: the mount was gone before it could be tied to a container, and
	// this start is one of those that have the layer.
	Assumed bool

	evicted int64  // bytes that had left the page cache when first seen
	image   *image // through which it was opened; nil: on NVM
}

// Reason says what ended a watch.
type Reason string

// The reasons.
const (
	EndQuiet  Reason = "quiet"
	EndReady  Reason = "ready"
	EndMax    Reason = "max"
	EndUnused Reason = "unused"
	EndClosed Reason = "closed"
)

// Trace is what one start opened, in the order of first use.
type Trace struct {
	Snapshot string
	Began    time.Time
	Duration time.Duration
	Files    []File
	// Complete is false when events were lost or could not be kept.
	Complete bool
	// Overflows of the kernel's queue, and events that were Lost otherwise,
	// during the watch.
	Overflows, Lost uint64
	Ended           Reason
}

// Executed tells whether the kernel has executed anything of the image. A mount
// in which nothing was, such as the one by which containerd looks up a user, is
// no start.
func (t *Trace) Executed() bool {
	return slices.ContainsFunc(t.Files, func(f File) bool { return f.Kind == Exec })
}

// Stats are counters since New. They only grow.
type Stats struct {
	Events     uint64    // read from the kernel
	Overflows  uint64    // of the kernel's queue
	Lost       uint64    // events without a descriptor, files over the bound
	Opens      [2]uint64 // of files of layers by containers, by tier; parts among NVM
	Parts      uint64    // of these, of files of which only parts are on NVM
	Unresolved uint64    // mounts that could not be tied to a container
	Watches    uint64    // opened
	Open       int       // watches open now
}

// Tracer reads the events. Its methods may be called concurrently.
type Tracer struct {
	cfg   Config
	fd    int // of file: asking it each time would make it blocking
	file  *os.File
	conn  syscall.RawConn
	self  int32
	epoch time.Time
	root  root // on NVM
	own   mountTable

	probing func(*overlay) // tests

	// resolving is held by whoever ties clones to overlays: the reader, or Retry. It is taken before mu. Whoever holds it may give up mu for a while
	// (unlocked), in which watches begin but none ends, and clones and overlays stay as they are but for foreign clones that are forgotten.
	resolving sync.Mutex

	mu      sync.Mutex // guards what follows; [Tracer.Watch], and so every mount of a container, waits for it
	stats   Stats
	closed  bool
	watches map[string]*Watch
	mounts  map[uint64]*clone   // every clone that showed up while a watch is open
	byClone map[uint64]*overlay // clones whose overlay is known
	overs   map[uint64]*overlay // overlays whose clones are known, by unique mount id
	images  map[devnum]*image   // of the open watches
	files   int                 // entries in mounts
	linkbuf [unix.PathMax]byte  // of the reader
	wg      sync.WaitGroup      // reader and measuring goroutines
}

// root is a directory of data files: a descriptor, and how its files are told.
type root struct {
	path  string
	fd    int
	dev   devnum
	mount uint64
}

// New makes the fanotify group; nothing is marked before the first [Tracer.Watch].
// Where the kernel refuses it the error is [errdefs.ErrNotImplemented] and
// names the cure; the caller goes on without traces.
func New(cfg Config) (*Tracer, error) {
	if cfg.Quiet <= 0 {
		cfg.Quiet = DefaultQuiet
	}
	if cfg.Max <= 0 {
		cfg.Max = DefaultMax
	}
	if cfg.Unused <= 0 {
		cfg.Unused = DefaultUnused
	}
	if cfg.Files <= 0 {
		cfg.Files = DefaultFiles
	}
	fd, err := initGroup(!cfg.limitedQueue)
	if err != nil {
		return nil, refused("open a fanotify group", err)
	}
	t := &Tracer{
		cfg:     cfg,
		fd:      fd,
		file:    os.NewFile(uintptr(fd), "fanotify"),
		self:    int32(os.Getpid()),
		epoch:   time.Now(),
		watches: map[string]*Watch{},
		mounts:  map[uint64]*clone{},
		byClone: map[uint64]*overlay{},
		overs:   map[uint64]*overlay{},
		images:  map[devnum]*image{},
		root:    root{fd: -1},
	}
	if err := t.open(); err != nil {
		t.release()
		return nil, err
	}
	t.wg.Add(1)
	go t.read()
	return t, nil
}

func (t *Tracer) open() error {
	var err error
	if t.conn, err = t.file.SyscallConn(); err != nil {
		return fmt.Errorf("poll fanotify group: %w", err)
	}
	if t.root, err = openRoot(t.cfg.Root); err != nil {
		return err
	}
	// A trial, so that a refusal shows when the daemon starts and not with the
	// first container.
	if err := t.mark(true); err != nil {
		return refused("mark the filesystem of NVM", err)
	}
	return t.mark(false)
}

func openRoot(dir string) (root, error) {
	r := root{path: filepath.Clean(dir)}
	fd, err := unix.Open(r.path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return root{fd: -1}, fmt.Errorf("open data root %q: %w", dir, err)
	}
	var st unix.Statx_t
	if err = statx(fd, &st); err != nil {
		err = fmt.Errorf("stat data root %q: %w", dir, err)
	} else if st.Mask&unix.STATX_MNT_ID_UNIQUE == 0 {
		err = refused("tell mounts apart", fmt.Errorf("statx has no unique mount ids; Linux 6.8 is needed: %w", unix.ENOSYS))
	}
	if err != nil {
		unix.Close(fd)
		return root{fd: -1}, err
	}
	r.fd, r.dev, r.mount = fd, devOf(&st), st.Mnt_id
	return r, nil
}

// refused classes an error of the kernel that means "not here".
func refused(what string, err error) error {
	var cure string
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		cure = "give the daemon CAP_SYS_ADMIN in the initial user namespace"
	case errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EINVAL):
		cure = "use Linux 6.8 or later with CONFIG_FANOTIFY=y, and let seccomp pass fanotify_init and fanotify_mark"
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENOSPC):
		cure = "raise fs.fanotify.max_user_groups and fs.fanotify.max_user_marks"
	default:
		return fmt.Errorf("%s: %w", what, err)
	}
	return fmt.Errorf("%s: %w (%w): cold starts are not traced; %s", what, err, errdefs.ErrNotImplemented, cure)
}

// Stats returns the counters, between two batches of events.
func (t *Tracer) Stats() Stats {
	t.resolving.Lock()
	defer t.resolving.Unlock()
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.stats
	s.Open = len(t.watches)
	return s
}

// Close ends all watches, waits for their results and releases the group.
func (t *Tracer) Close() error {
	t.mu.Lock()
	if t.closed {
		t.mu.Unlock()
		return nil
	}
	t.closed = true
	t.wake()
	t.mu.Unlock()
	t.wg.Wait()
	t.resolving.Lock() // Retry may still be at it
	defer t.resolving.Unlock()
	t.release()
	return nil
}

// unlocked calls f without mu: what waits for the kernel or reads mount tables. The caller holds resolving and mu, and looks again afterwards at what mu guards.
func (t *Tracer) unlocked(f func()) {
	t.mu.Unlock()
	defer t.mu.Lock()
	f()
}

func (t *Tracer) release() {
	t.file.Close()
	if t.root.fd >= 0 {
		unix.Close(t.root.fd)
	}
	t.own.close()
}

// wake makes the reader look at what changed. The caller holds t.mu.
func (t *Tracer) wake() {
	// Fails only on a closed file, when nobody reads any more.
	_ = t.file.SetReadDeadline(time.Unix(1, 0))
}

func (t *Tracer) now() time.Duration { return time.Since(t.epoch) }
