// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package region keeps the persistent memory of containers: files of fixed size on the NVM filesystem, one for each container that asks, and named ones.
// docs/regions.md says what lies where and who is protected from whom. It knows no containerd.
//
// All methods of a [Store] may be called by many goroutines. Errors are classed by github.com/containerd/errdefs: ErrNotFound, ErrAlreadyExists,
// ErrInvalidArgument, ErrResourceExhausted (quota, limit, no room), ErrFailedPrecondition (in use), ErrDataLoss (damaged).
package region

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"github.com/nhybrid/nhybrid/scmlib/region/stream"
)

// Options of a store. The zero value limits nothing but by the room there is.
type Options struct {
	Limit    int64            // bytes of all regions together; 0: what the filesystem has
	Headroom int64            // bytes of the filesystem that regions leave free
	Reserve  int64            // bytes that others leave to regions; see Held and Others
	Quota    Quota            // of each namespace
	Quotas   map[string]Quota // of the namespaces that have one of their own

	Pool map[int64]int // how many regions of a size wait, zeroed, for containers
	Rate int64         // bytes a second of what can wait: the pool, exports, imports; 0: unlimited
	Keep bool          // regions become volumes when their container is removed

	// Identify tells a container from another of the same id, by anything that differs, and fails with ErrNotFound if there is none. nil: not asked.
	Identify func(ctx context.Context, namespace, container string) (string, error)
	// Volumes is told the names of all volumes, at the start and after each change, in order.
	Volumes func(names []string)

	// Others tells how many bytes of the filesystem are promised to others, who may not have written all of them yet. It may wait for a call of Held that is
	// under way. nil: none.
	Others func() int64

	step func(string) // tests: a place where the daemon may die
}

// Store keeps the regions below one directory.
type Store struct {
	root   string
	o      Options
	lock   *os.File
	slow   *rate.Limiter
	fast   *rate.Limiter // does not limit
	guard  *guard
	memory memory
	stop   context.CancelFunc
	done   sync.WaitGroup
	fill   chan struct{}
	taken  atomic.Bool // something was taken from the pool

	admission sync.Mutex // before mu

	mu      sync.Mutex
	regs    map[string]Record
	broken  map[string]error // what could not be read; never touched
	busy    map[string]chan struct{}
	pool    map[int64][]string
	making  map[string]Usage
	told    []string
	telling sync.Mutex
}

// burst is the most bytes that are moved between two looks at the rate.
const burst = stream.MaxExtent

// Open takes charge of the regions below root, which is made if need be, and finishes or undoes what a daemon that was killed had begun.
// Another Store with the same root is ErrUnavailable.
func Open(ctx context.Context, root string, o Options) (_ *Store, err error) {
	for _, d := range []string{"tmp", "pool", "k"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o700); err != nil {
			return nil, fmt.Errorf("make store of regions: %w", err)
		}
	}
	if err := os.Chmod(root, 0o700); err != nil {
		return nil, fmt.Errorf("make store of regions: %w", err)
	}
	s := &Store{root: root, o: o, regs: map[string]Record{}, broken: map[string]error{}, busy: map[string]chan struct{}{}, pool: map[int64][]string{},
		making: map[string]Usage{}, fill: make(chan struct{}, 1), slow: rate.NewLimiter(rate.Inf, burst), fast: rate.NewLimiter(rate.Inf, burst)}
	if o.Rate > 0 {
		s.slow = rate.NewLimiter(rate.Limit(o.Rate), burst)
	}
	if s.lock, err = os.OpenFile(filepath.Join(root, "lock"), os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600); err != nil {
		return nil, fmt.Errorf("open store of regions: %w", err)
	}
	if err := unix.Flock(int(s.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("open store of regions %q: another process has it (%w): %w", root, err, errdefs.ErrUnavailable), s.lock.Close())
	}
	s.memory = memoryBelow("/sys", root)
	bg, stop := context.WithCancel(context.WithoutCancel(ctx))
	s.stop = stop
	if s.guard, err = newGuard(s.trespass); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	if err := s.recover(ctx); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	s.tell()
	s.done.Go(func() { s.keepPool(bg) })
	s.refill()
	return s, nil
}

// Close lets go. Containers keep what they have.
func (s *Store) Close() error {
	s.stop()
	s.done.Wait()
	var err error
	if s.guard != nil {
		err = s.guard.close()
	}
	return errors.Join(err, s.lock.Close())
}

func (s *Store) step(name string) {
	if s.o.step != nil {
		s.o.step(name)
	}
}

func (s *Store) dir(ref Ref) string  { return filepath.Join(s.root, "k", ref.key()) }
func (s *Store) data(ref Ref) string { return filepath.Join(s.dir(ref), "data") }

// scratch makes a directory whose content the next start sweeps.
func (s *Store) scratch() (string, error) {
	dir := filepath.Join(s.root, "tmp", randomID())
	return dir, os.Mkdir(dir, 0o700)
}

func randomID() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// hold waits until nobody else works on a region.
func (s *Store) hold(ctx context.Context, ref Ref) (release func(), err error) {
	key := ref.key()
	for {
		s.mu.Lock()
		wait, taken := s.busy[key]
		if !taken {
			free := make(chan struct{})
			s.busy[key] = free
			s.mu.Unlock()
			return func() {
				s.mu.Lock()
				delete(s.busy, key)
				s.mu.Unlock()
				close(free)
			}, nil
		}
		s.mu.Unlock()
		select {
		case <-wait:
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for %s, on which other work is being done: %w", ref, ctx.Err())
		}
	}
}

func (s *Store) get(ref Ref) (Record, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, ok := s.regs[ref.key()]
	if ok {
		r.Users, r.Frozen = slices.Clone(r.Users), slices.Clone(r.Frozen)
		return r, nil
	}
	if err := s.broken[ref.key()]; err != nil {
		return r, err
	}
	return r, fmt.Errorf("region %s of namespace %q: %w", ref, ref.Namespace, errdefs.ErrNotFound)
}

// update writes changed metadata, first to the medium.
func (s *Store) update(r Record) error {
	if err := writeMeta(s.dir(r.Ref), r); err != nil {
		return err
	}
	s.remember(r)
	return nil
}

// updateUse writes who has the region.
func (s *Store) updateUse(r Record) error {
	if err := writeUse(s.dir(r.Ref), r); err != nil {
		return err
	}
	s.remember(r)
	return nil
}

func (s *Store) remember(r Record) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.regs[r.key()] = r
}

// books adds up what is promised. s.mu is held.
func (s *Store) books() (Books, error) {
	b := Books{Limit: s.o.Limit, Headroom: s.o.Headroom, Reserve: s.o.Reserve, Namespaces: map[string]Usage{}}
	var fs unix.Statfs_t
	if err := unix.Statfs(s.root, &fs); err != nil {
		return b, fmt.Errorf("ask for room below %q: %w", s.root, err)
	}
	b.Free = int64(fs.Bavail) * fs.Bsize
	s.promises(&b)
	return b, nil
}

// promises adds up what regions have. s.mu is held.
func (s *Store) promises(b *Books) {
	for _, r := range s.regs {
		u := b.Namespaces[r.Owner()]
		b.Namespaces[r.Owner()] = Usage{u.Bytes + r.charge(), u.Regions + 1}
		b.Promised += r.charge()
	}
	for ns, m := range s.making {
		u := b.Namespaces[ns]
		b.Namespaces[ns] = Usage{u.Bytes + m.Bytes, u.Regions + m.Regions}
		b.Making += m.Bytes
	}
	for size, dirs := range s.pool {
		b.Pool += size * int64(len(dirs))
	}
}

// Held is what others have to leave free for regions: what of the reserve none has yet, or what those in the making will take.
func (s *Store) Held() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := Books{Reserve: s.o.Reserve, Namespaces: map[string]Usage{}}
	s.promises(&b)
	return max(b.Making, b.unclaimed()+b.Making)
}

// Books tells what is promised and what there is.
func (s *Store) Books() (Books, error) {
	others := s.others()
	s.mu.Lock()
	defer s.mu.Unlock()
	b, err := s.books()
	b.Others = others
	return b, err
}

// others must not be called with s.mu held: see Options.
func (s *Store) others() int64 {
	if s.o.Others == nil {
		return 0
	}
	return s.o.Others()
}

// want is what is asked of the books.
type want struct {
	namespace string // "": nobody's quota
	size      int64
	regions   int
	have      int64 // bytes that were taken from the pool for it
	pool      bool  // it is for the pool, which does not give up anything for itself
}

// quota of a namespace, none for "".
func (s *Store) quota(namespace string) Quota {
	if q, own := s.o.Quotas[namespace]; own {
		return q
	}
	if namespace == "" {
		return Quota{}
	}
	return s.o.Quota
}

// reserve promises bytes until release is called, when they are in the books by other means, or not needed. The pool gives up what is missing.
//
// Others look at what is held before they promise anything, with a lock that s.o.Others takes too. So what is asked for goes into the books first, and theirs are
// looked at then: of two who ask at the same time at least one sees the other.
func (s *Store) reserve(w want) (release func(), err error) {
	s.admission.Lock()
	defer s.admission.Unlock()
	s.mu.Lock()
	_, err = s.admits(w, 0)
	if err == nil {
		s.enter(w, 1)
	}
	s.mu.Unlock()
	if err != nil {
		return nil, err
	}
	others := s.others()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.enter(w, -1)
	full, err := s.admits(w, others)
	if err != nil {
		return nil, err
	}
	if full {
		s.emptyPool()
	}
	s.enter(w, 1)
	return sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.enter(w, -1)
	}), nil
}

// admits decides on what is asked, with so much promised to others, and tells whether the pool is in the way. s.mu is held.
func (s *Store) admits(w want, others int64) (full bool, err error) {
	b, err := s.books()
	if err != nil {
		return false, err
	}
	b.Free, b.Others = b.Free+w.have, others
	give, q := b.Pool, s.quota(w.namespace)
	if w.pool {
		give = 0
	}
	if err := admit(b, q, w.namespace, w.size, w.regions, give); err != nil {
		return false, err
	}
	return admit(b, q, w.namespace, w.size, w.regions, 0) != nil, nil
}

// enter enters what is wanted into what is in the making, or with -1 takes it out. s.mu is held.
func (s *Store) enter(w want, sign int) {
	m := s.making[w.namespace]
	if m = (Usage{m.Bytes + int64(sign)*w.size, m.Regions + sign*w.regions}); m == (Usage{}) {
		delete(s.making, w.namespace)
	} else {
		s.making[w.namespace] = m
	}
}

// List returns the regions of a namespace, or of all for "", in order.
func (s *Store) List(namespace string) []Record {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []Record
	for _, key := range slices.Sorted(maps.Keys(s.regs)) {
		if r := s.regs[key]; namespace == "" || r.Namespace == namespace {
			r.Users = slices.DeleteFunc(slices.Clone(r.Users), func(u User) bool { return !u.Alive() })
			out = append(out, r)
		}
	}
	return out
}

// Broken returns what is wrong with directories that could not be read at the start. They are left alone.
func (s *Store) Broken() map[string]error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.broken)
}

// Inspect returns one region.
func (s *Store) Inspect(ref Ref) (Record, error) {
	if err := ref.check(); err != nil {
		return Record{}, err
	}
	r, err := s.get(ref)
	r.Users = slices.DeleteFunc(r.Users, func(u User) bool { return !u.Alive() })
	return r, err
}

// recover brings the store into order at the start.
func (s *Store) recover(ctx context.Context) error {
	if err := sweep(filepath.Join(s.root, "tmp")); err != nil {
		return err
	}
	if err := s.findPool(); err != nil {
		return err
	}
	entries, err := os.ReadDir(filepath.Join(s.root, "k"))
	if err != nil {
		return fmt.Errorf("read store of regions: %w", err)
	}
	for _, e := range entries {
		ref, err := refOfKey(e.Name())
		if err == nil {
			err = s.recoverOne(ref)
		}
		if err != nil {
			s.broken[e.Name()] = fmt.Errorf("region in %q is left alone: %w", filepath.Join(s.root, "k", e.Name()), err)
			log.G(ctx).WithError(s.broken[e.Name()]).Error("region cannot be used")
		}
	}
	return nil
}

func (s *Store) recoverOne(ref Ref) error {
	r, err := readMeta(s.dir(ref), ref)
	_, newErr := os.Lstat(filepath.Join(s.dir(ref), unsure))
	switch {
	case err != nil && newErr == nil:
		return s.discard(s.dir(ref)) // nobody was told of it
	case err != nil:
		return err
	case newErr == nil:
		if err := settled(s.dir(ref)); err != nil {
			return err
		}
	}
	s.regs[ref.key()] = r
	if len(r.Frozen) > 0 {
		for _, file := range r.Frozen {
			if err := thaw(file); err != nil {
				return err
			}
		}
		r.Frozen = nil
		if err := s.updateUse(r); err != nil {
			return err
		}
	}
	if r.GrowTo != 0 {
		if err := s.finishGrow(r); err != nil {
			return err
		}
	}
	if alive(r.Users) {
		if err := s.guard.watch(s.data(ref)); err != nil {
			log.L.WithError(err).Error("cannot watch the size of a region")
		}
	}
	f, err := openData(s.data(ref), os.O_RDWR)
	if err != nil {
		return err
	}
	defer f.Close()
	return s.restoreSize(ref, f)
}

func sweep(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("sweep %q: %w", dir, err)
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return fmt.Errorf("sweep %q: %w", dir, err)
		}
	}
	return nil
}

// tell reports the names of volumes if they changed.
func (s *Store) tell() {
	if s.o.Volumes == nil {
		return
	}
	s.telling.Lock() // or an older list could be told after a newer one
	defer s.telling.Unlock()
	names := map[string]bool{}
	s.mu.Lock()
	for _, r := range s.regs {
		if r.Kind == Volume {
			names[r.Name] = true
		}
	}
	s.mu.Unlock()
	list := slices.Sorted(maps.Keys(names))
	if s.told == nil || !slices.Equal(list, s.told) {
		s.told = append([]string{}, list...)
		s.o.Volumes(list)
	}
}

// alive tells whether any of the users still runs.
func alive(users []User) bool {
	return slices.ContainsFunc(users, func(u User) bool { return u.Alive() })
}

// inUse is the error for work that needs a region that nobody has.
func inUse(r Record, what string) error {
	var names []string
	for _, u := range r.Users {
		if u.Alive() {
			names = append(names, u.Namespace+"/"+u.Container)
		}
	}
	if len(names) == 0 {
		return nil
	}
	return fmt.Errorf("%s %s: container %s uses it; stop that first: %w", what, r.Ref, strings.Join(names, ", "), errdefs.ErrFailedPrecondition)
}
