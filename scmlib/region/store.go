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
	broken  map[string]error // what could not be read, by key; never touched
	short   map[string]error // what lacks blocks, by key
	left    map[string]error // what could not be removed, by its path below root
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
	s := &Store{root: root, o: o, regs: map[string]Record{}, broken: map[string]error{}, short: map[string]error{}, left: map[string]error{}, busy: map[string]chan struct{}{}, pool: map[int64][]string{},
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
	// Explicitly: a child that is just being made has the open file too, until it executes its program.
	return errors.Join(err, unix.Flock(int(s.lock.Fd()), unix.LOCK_UN), s.lock.Close())
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

// List returns the regions of a namespace, or of all for "", in order.
func (s *Store) List(namespace string) []Record {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []Record
	for _, key := range slices.Sorted(maps.Keys(s.regs)) {
		if r := s.regs[key]; namespace == "" || r.Namespace == namespace {
			r.Users = living(r.Users)
			out = append(out, r)
		}
	}
	return out
}

// Problems returns what is wrong below the store's directory, by what it is wrong with: regions that could not be read at the start and are left alone, regions
// that lack blocks, for which NVM has no room, and directories (DIR/NAME) of removed regions that cannot be removed.
func (s *Store) Problems() map[string]error {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := maps.Clone(s.broken)
	maps.Copy(all, s.short)
	maps.Copy(all, s.left)
	return all
}

// Inspect returns one region.
func (s *Store) Inspect(ref Ref) (Record, error) {
	if err := ref.check(); err != nil {
		return Record{}, err
	}
	r, err := s.get(ref)
	r.Users = living(r.Users)
	return r, err
}

// recover brings the store into order at the start.
func (s *Store) recover(ctx context.Context) error {
	if err := s.sweep(); err != nil {
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
		return unlessLeft(s.discard(s.dir(ref))) // nobody was told of it
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
			if err := thaw(file); errdefs.IsDataLoss(err) {
				log.L.WithError(err).WithField("region", ref.String()).Warn("who has a region was not recorded whole")
			} else if err != nil {
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
	// Blocks that have no room now are asked for again when it is attached.
	err = s.restoreBlocks(context.Background(), r, false)
	if errdefs.IsResourceExhausted(err) {
		log.L.WithError(err).Error("a store into a region fails while NVM is full")
		return nil
	}
	return err
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

// living returns those of the users that still run.
func living(users []User) (all []User) {
	for _, u := range users {
		if u.Alive() {
			all = append(all, u)
		}
	}
	return all
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
