// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scmlib_test

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"testing"

	"github.com/nhybrid/nhybrid/scmlib"
	"github.com/nhybrid/nhybrid/scmlib/internal/crash"
)

// effort scales the enumeration: SCM_CRASH_EFFORT, 1 in a normal run.
func effort() int {
	if n, err := strconv.Atoi(os.Getenv("SCM_CRASH_EFFORT")); err == nil && n > 0 {
		return n
	}
	return 1
}

// world is one run of a scenario: a region in memory, its tracer, and what may be seen in it after a crash in each phase.
type world struct {
	img    []byte
	r      *scmlib.Region
	tr     *crash.Tracer
	mutant *crash.Mutant
	sc     *scenario

	allow  [][]string // states that a phase may leave
	gen    uint64     // before the traced open
	opened int        // phase from which on the open has returned
	closed int        // phase of the close
	ended  int        // phase of the last work on the header: the close, or what came after
}

type scenario struct {
	name    string
	size    int
	opts    scmlib.Options
	blank   bool                         // starts from zeros
	setup   func(r *scmlib.Region) error // not traced
	ops     []func(w *world) error       // each is all or nothing
	was     int                          // the size of the region before it grows into size; 0: size
	end     func(w *world) error         // closes the region, and changes it thereby; nil: it is closed as it is
	after   func(w *world) error         // done to the closed region
	observe func(r *scmlib.Region) (string, error)
}

// mark ends a phase: from here on, what is seen now must be seen after a crash, or what the next phase ends with.
func (w *world) mark() error {
	s, err := w.look(w.r)
	if err != nil {
		return err
	}
	w.allow[len(w.allow)-1] = append(w.allow[len(w.allow)-1], s)
	w.allow = append(w.allow, []string{s})
	w.tr.Mark()
	return nil
}

// look describes what is in a region: what the scenario sees, and every allocated block.
func (w *world) look(r *scmlib.Region) (string, error) {
	var s string
	err := r.View(func() (err error) {
		s, err = w.sc.observe(r)
		return err
	})
	b := []byte(s)
	r.Blocks(func(k scmlib.Block) bool { b = fmt.Appendf(b, " %d+%d", k.Off, k.Size); return true })
	return string(b), err
}

// fit is what of an image is the region.
func (sc *scenario) fit(img []byte) []byte {
	if sc.was == 0 || scmlib.HasHeader(img) {
		return img
	}
	return img[:sc.was]
}

func (sc *scenario) options(w *world) scmlib.Options {
	o := sc.opts
	o.Create = sc.blank
	return o
}

// record runs the scenario once.
func (sc *scenario) record(m *crash.Mutant) (w *world, err error) {
	w = &world{sc: sc, mutant: m, img: make([]byte, sc.size)}
	if !sc.blank {
		o := sc.opts
		o.Create = true
		r, err := scmlib.OpenImage(sc.fit(w.img), o)
		if err != nil {
			return nil, err
		}
		if sc.setup != nil {
			if err := sc.setup(r); err != nil {
				return nil, err
			}
		}
		before, err := w.look(r)
		if err != nil {
			return nil, err
		}
		w.gen = r.Info().Generation
		w.allow = [][]string{{before}}
		if err := r.Close(); err != nil {
			return nil, err
		}
	} else {
		w.allow = [][]string{{}}
	}
	w.tr = crash.NewTracer(w.img, m)
	if w.r, err = scmlib.OpenImage(sc.fit(w.img), scmlib.WithHook(sc.options(w), w.tr)); err != nil {
		return nil, err
	}
	if err := w.mark(); err != nil {
		return nil, err
	}
	w.opened = 1
	for i, op := range sc.ops {
		if err := op(w); err != nil {
			return nil, fmt.Errorf("op %d: %w", i, err)
		}
		if err := w.mark(); err != nil {
			return nil, err
		}
	}
	w.closed = len(w.allow) - 1
	for _, end := range []func(*world) error{sc.end, sc.after} {
		if end == nil {
			end = func(w *world) error { return w.r.Close() }
		}
		if err := end(w); err != nil {
			return nil, err
		}
		if err := w.markClosed(); err != nil {
			return nil, err
		}
		w.ended = len(w.allow) - 2
		if sc.after == nil {
			break
		}
	}
	return w, nil
}

// markClosed is mark for a region that is closed.
func (w *world) markClosed() error {
	r, err := w.open(slices.Clone(w.img), w.sc.opts)
	if err != nil {
		return err
	}
	s, err := w.look(r)
	if err != nil {
		return err
	}
	last := len(w.allow) - 1
	w.allow[last] = append(w.allow[last], s)
	w.allow = append(w.allow, []string{s})
	w.tr.Mark()
	return nil
}

// run enumerates the states of a scenario. Of every nestth state the recovery is cut short as well.
func (sc *scenario) run(m *crash.Mutant, limit, random, nest int, stop bool) (res, nested crash.Result, err error) {
	w, err := sc.record(m)
	if err != nil {
		return res, nested, err
	}
	n := 0
	scratch := make([]byte, sc.size)
	res = w.tr.Enumerate(crash.Plan{Limit: limit, Random: random, Seed: 1}, stop, func(img []byte, phase int, touched func(off, n uint64)) error {
		if phase >= w.opened && (phase < w.closed || phase > w.ended) && !scmlib.HeadersWhole(sc.fit(img)) {
			return errors.New("the copies of the header differ although nobody was writing them")
		}
		if n++; nest > 0 && n%nest == 0 {
			copy(scratch, img)
			r, err := w.again(scratch, phase, nest)
			nested.Add(r)
			if err != nil {
				return err
			}
			if r.First != nil {
				return fmt.Errorf("recovery cut short: %w", r.First)
			}
		}
		return w.check(img, phase, touched)
	})
	return res, nested, nil
}

// again recovers an image under a tracer, and enumerates the states that this recovery may leave. Without a mutant it goes on: the operation that was
// cut short is done once more, and cut short in its turn. What the first crash has left in logs must not come back.
func (w *world) again(img []byte, phase, seed int) (crash.Result, error) {
	tr := crash.NewTracer(img, w.mutant)
	plan := crash.Plan{Limit: 300, Random: 30, Seed: uint64(seed)}
	if w.mutant != nil || phase < 1 || phase > len(w.sc.ops) {
		if _, err := w.open(img, scmlib.WithHook(w.sc.options(w), tr.Quiet())); err != nil {
			return crash.Result{}, err
		}
		return tr.Enumerate(plan, true, func(img []byte, _ int, touched func(off, n uint64)) error {
			return w.check(img, phase, touched)
		}), nil
	}
	r, err := w.open(img, scmlib.WithHook(w.sc.options(w), tr))
	if err != nil {
		return crash.Result{}, err
	}
	w2 := &world{img: img, r: r, tr: tr, sc: w.sc, allow: [][]string{{}}, gen: r.Info().Generation - 1, opened: 1}
	if err := w2.mark(); err != nil {
		return crash.Result{}, err
	}
	_ = w.sc.ops[phase-1](w2) // may fail, if the first time was enough: then it has changed nothing
	if err := w2.mark(); err != nil {
		return crash.Result{}, err
	}
	return tr.Enumerate(plan, true, w2.check), nil
}

func (w *world) open(img []byte, o scmlib.Options) (r *scmlib.Region, err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("panic: %v", v)
		}
	}()
	return scmlib.OpenImage(w.sc.fit(img), o)
}

// check is the oracle: the region opens, and holds what the phase allows.
func (w *world) check(img []byte, phase int, touched func(off, n uint64)) error {
	r, err := w.open(img, scmlib.WithHook(w.sc.options(w), &crash.Toucher{Touched: touched, Mutant: w.mutant}))
	if err != nil {
		return err
	}
	s, err := w.look(r)
	if err != nil {
		return err
	}
	allow := w.allow[min(phase, len(w.allow)-1)]
	if !slices.Contains(allow, s) {
		return fmt.Errorf("found\n  %s\nallowed:\n  %s", s, fmt.Sprint(allow))
	}
	if g := r.Info().Generation; g <= w.gen || phase >= w.opened && g <= w.gen+1 {
		return fmt.Errorf("generation %d was given before", g)
	}
	return nil
}

// TestCrash enumerates the persisted states of every scenario.
func TestCrash(t *testing.T) {
	var total, nested crash.Result
	for _, sc := range scenarios() {
		t.Run(sc.name, func(t *testing.T) {
			k := effort()
			res, again, err := sc.run(nil, 4000*k, 600*k, max(11, 401/k), false)
			if err != nil {
				t.Fatal(err)
			}
			if again.States == 0 || res.States < 50 {
				t.Fatalf("%d states, %d of recovery: too few to mean anything", res.States, again.States)
			}
			if res.First != nil {
				t.Errorf("%d of %d states fail, first: %v", res.Failed, res.States, res.First)
			}
			t.Logf("%d states in %d epochs (%d exhaustively), %d states of recovery cut short", res.States, res.Epochs, res.Exhaustive, again.States)
			total.Add(res)
			nested.Add(again)
		})
	}
	t.Logf("states_enumerated=%d states_failed=%d (of these in recovery cut short: %d); epochs %d, exhaustive %d",
		total.States+nested.States, total.Failed, nested.States, total.Epochs, total.Exhaustive)
}
