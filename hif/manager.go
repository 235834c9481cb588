// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/log"

	"github.com/nhybrid/nhybrid/hif/migrate"
	"github.com/nhybrid/nhybrid/hif/plan"
	"github.com/nhybrid/nhybrid/hif/profile"
	"github.com/nhybrid/nhybrid/hif/trace"
)

// Config says what the manager does. The zero value traces, learns and moves nothing.
type Config struct {
	// Trace: starts are traced, and their ends found by Quiet and Window
	// (trace.Config: Quiet and Max).
	Trace         bool
	Quiet, Window time.Duration
	Predict       Prediction
	Fetch         bool     // ask registries for profiles
	PlainHTTP     []string // registries to ask without TLS, as host:port
	Via           profile.Via
	// Migrate: files are moved, within these limits.
	Migrate bool
	Limits  plan.Limits
	Disk    plan.Disk
	Engine  migrate.Config
	// PartsFrom is the size from which of a file only parts are kept, in bytes; 0: never.
	PartsFrom int64
}

// Books are where the manager keeps what it knows, each by the digest of the image.
type Books struct {
	Profiles, Predictions, Origins profile.Store
}

// Manager is the hot image files of a store. Its methods may be called concurrently.
type Manager struct {
	config      Config
	store       Store
	host        migrate.Host
	library     *library
	book        profile.Book
	predictions profile.Book
	origins     profile.Store
	tracer      *trace.Tracer // nil: no traces
	traceErr    error         // why
	engine      *migrate.Engine
	counters    counters

	ctx  context.Context
	stop context.CancelFunc
	wg   sync.WaitGroup
	wake chan struct{}

	learner learner
	early   *earlyProfiles          // its lock is taken before mu
	cooled  map[[2]string]time.Time // by view and digest, see cool; of the loop alone
	sizes   map[string]int64        // of divided images, by view; of the loop alone
	release release

	mu      sync.Mutex
	closed  bool
	starts  map[string]*openStart // by snapshot id
	images  []Image               // as the latest round saw them
	kicks   uint64                // that were asked for
	seen    uint64                // the kicks that the latest finished round knew of
	planned chan struct{}         // closed and replaced after each round
	last    Overview
	looked  time.Time       // when the latest round was made; zero: it failed
	hurry   bool            // MigrateNow was called and is not done
	ahead   map[string]bool // views of the images that are being read ahead
	// dividing: parts are being made; undivided: when they could not be, or had
	// to go for want of space, by view.
	dividing  bool
	undivided map[string]undivided
}

type undivided struct {
	at     time.Time
	failed bool
}

type counters struct{ recorded, incomplete atomic.Int64 }

const (
	// replan is how often the manager looks at the space without being called.
	replan = time.Minute
	// lookAnyway is how often it looks at everything: what is used gets older, and
	// names of images change without a word.
	lookAnyway = 10 * time.Minute
)

// New makes a manager, which does nothing but trace before Start. Where the
// kernel refuses fanotify it works without traces and says so once.
func New(ctx context.Context, c Config, store Store, host migrate.Host, books Books) (*Manager, error) {
	m := &Manager{
		config: c, store: store, host: host, library: newLibrary(store), undivided: map[string]undivided{},
		book:        profile.Book{Store: books.Profiles, Ageing: profile.DefaultAgeing},
		predictions: profile.Book{Store: books.Predictions, Ageing: profile.DefaultAgeing},
		origins:     books.Origins,
		wake:        make(chan struct{}, 1), planned: make(chan struct{}),
		learner: newLearner(), early: newEarlyProfiles(), cooled: map[[2]string]time.Time{}, starts: map[string]*openStart{},
		ahead: map[string]bool{},
	}
	if c.Trace {
		m.tracer, m.traceErr = trace.New(trace.Config{Root: store.DataRoot(), Quiet: c.Quiet, Max: c.Window})
		if m.traceErr != nil {
			log.G(ctx).WithError(m.traceErr).Warn("starts are not traced; what images need is only guessed")
		}
	} else {
		m.traceErr = errors.New("switched off by the configuration (hot.trace)")
	}
	m.ctx, m.stop = context.WithCancel(context.Background())
	if c.Migrate {
		var err error
		if m.engine, err = migrate.New(c.Engine, host); err != nil {
			if m.tracer != nil {
				err = errors.Join(err, m.tracer.Close())
			}
			return nil, err
		}
	}
	return m, nil
}

// Start begins to look at the store.
func (m *Manager) Start() { m.wg.Go(m.run) }

// Close ends all watches and all migration. Files stay where they are.
func (m *Manager) Close() error {
	m.mu.Lock()
	m.closed = true
	m.mu.Unlock()
	m.stop()
	var err error
	if m.tracer != nil {
		err = m.tracer.Close()
	}
	m.wg.Wait()
	if m.engine != nil {
		err = errors.Join(err, m.engine.Close())
	}
	return err
}

// Kick has the manager look at the store again: something has changed.
func (m *Manager) Kick() { m.kickAnd(func() {}) }

// kickAnd is Kick, and changes with mu held what Settling looks at: work that ends
// and the round that follows it must not leave a moment in which all seems done.
func (m *Manager) kickAnd(change func()) {
	m.mu.Lock()
	m.kicks++
	change()
	m.mu.Unlock()
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

func (m *Manager) kickAfter(d time.Duration) { time.AfterFunc(d, m.Kick) }

// slowStart is how long a container may take from its mounts to its first open
// and still count as starting. A watch waits longer, but not all who ask for
// mounts start anything: some only look, or made a container for later.
const slowStart = 5 * time.Second

// Busy tells whether a start is under way.
func (m *Manager) Busy() bool {
	m.mu.Lock()
	open := slices.Collect(maps.Values(m.starts))
	m.mu.Unlock()
	return slices.ContainsFunc(open, func(o *openStart) bool {
		return time.Since(o.began) < slowStart || o.watch.Files() > 0
	})
}

func (m *Manager) run() {
	tick := time.NewTicker(replan)
	defer tick.Stop()
	for {
		m.round()
		for rest := true; rest; {
			// Whether a hurry is over is only looked at: another round would hand the
			// engine its plan again, and so never see it done.
			var soon <-chan time.Time
			if !m.calm() {
				soon = time.After(yield)
			}
			select {
			case <-m.ctx.Done():
				return
			case <-soon:
			case <-m.wake:
				rest = false
			case now := <-tick.C:
				if m.engine != nil && m.release.due(m.engine.Progress().Pinned, now) {
					m.store.LetGo(m.ctx)
				}
				rest = m.still()
			}
		}
	}
}

// still tells whether a round would find all as the last one did. Rounds read
// every profile, which an idle host should not pay for each minute.
func (m *Manager) still() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if time.Since(m.looked) > lookAnyway || m.kicks != m.seen || m.hurry || m.dividing {
		return false
	}
	for _, u := range m.undivided {
		if since := time.Since(u.at); since > partsRetry && since < partsRetry+2*replan {
			return false // to be tried again
		}
	}
	space, err := m.store.Space()
	if err != nil {
		return false
	}
	high, _ := m.config.Limits.Marks(space)
	changed := max(space.Free-m.last.Space.Free, m.last.Space.Free-space.Free)
	return space.Total == m.last.Space.Total && space.Total-space.Free <= high && changed < space.Total/100
}

// round looks at the store once: learns of new images, and tells the engine
// what the tiers shall look like.
func (m *Manager) round() {
	m.mu.Lock()
	kicks := m.kicks
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		m.seen = kicks
		close(m.planned)
		m.planned = make(chan struct{})
		m.mu.Unlock()
	}()
	m.mu.Lock()
	m.looked = time.Time{}
	m.mu.Unlock()
	images, err := m.store.Images(m.ctx)
	m.mu.Lock()
	m.images = images
	m.mu.Unlock()
	if err != nil {
		if m.ctx.Err() == nil {
			log.L.WithError(err).Debug("images cannot be listed; hot files stay as they are")
		}
		return
	}
	m.library.keep(images)
	m.startLearning(images)
	err = m.apply(m.ctx, images)
	if err != nil && m.ctx.Err() == nil {
		log.L.WithError(err).Warn("no plan could be made; hot files stay as they are")
	}
	if err == nil {
		m.mu.Lock()
		m.looked = time.Now()
		m.mu.Unlock()
	}
}

// Settling tells whether there is more to do than the engine knows of: a change
// that no plan has seen yet, or parts being made.
func (m *Manager) Settling() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.settling()
}

// settling is Settling with mu held.
func (m *Manager) settling() bool { return m.kicks != m.seen || m.dividing || m.learner.busy }

// calm ends a hurry when all is done, and tells whether there is none (any more).
func (m *Manager) calm() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.hurry = m.hurry && m.engine != nil && (m.settling() || !m.engine.Reached())
	return !m.hurry
}

// settle waits until a round has been made that began after the call.
func (m *Manager) settle(ctx context.Context) error {
	m.Kick()
	m.mu.Lock()
	want := m.kicks
	m.mu.Unlock()
	for {
		m.mu.Lock()
		done, seen := m.planned, m.seen
		m.mu.Unlock()
		if seen >= want {
			return nil
		}
		select {
		case <-done:
		case <-ctx.Done():
			return ctx.Err()
		case <-m.ctx.Done():
			return m.ctx.Err()
		}
	}
}
