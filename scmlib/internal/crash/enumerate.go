// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package crash

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"sort"
)

// item is a step in the life of a line between two points at which it is known to be durable: one ordered store, or a group of words in any order.
type item struct {
	words []word
	group bool
}

type line struct {
	items []item
	pend  map[int]int // agent to how many items its flushes cover
}

// ntLine marks what was stored past the cache: it says nothing about cached stores to the same line, nor they about it.
const ntLine = 1 << 63

// Plan says how far to go.
type Plan struct {
	Limit  int // states of one epoch up to which all are visited
	Random int // states visited beyond single lines and pairs where there are more
	Seed   uint64
}

// Result counts.
type Result struct {
	States     int // images checked
	Epochs     int
	Exhaustive int // epochs of which every state was visited
	Failed     int
	First      error // the first failure
}

// Add sums up.
func (r *Result) Add(o Result) {
	r.States += o.States
	r.Epochs += o.Epochs
	r.Exhaustive += o.Exhaustive
	r.Failed += o.Failed
	if r.First == nil {
		r.First = o.First
	}
}

// Check looks at one image that a crash may have left, in the given phase. It may change img if it reports each 64-byte line that it changed through
// touched; they are restored.
type Check func(img []byte, phase int, touched func(off, n uint64)) error

// Enumerate replays what the tracer recorded and visits the states that a crash may leave: before every fence, which covers all earlier points of the
// epoch, and at every mark. It stops at the first failure if stop is set.
func (t *Tracer) Enumerate(p Plan, stop bool, check Check) Result {
	e := &enum{img: append([]byte(nil), t.start...), base: append([]byte(nil), t.start...), lines: map[uint64]*line{}, plan: p, stop: stop, check: check,
		rnd: rand.New(rand.NewPCG(p.Seed, 1))}
	for _, ev := range t.events {
		if e.done {
			break
		}
		switch ev.kind {
		case evStore:
			e.store(ev, false)
		case evWords, evNT:
			e.store(ev, true)
		case evFlush:
			for l := ev.off / lineSize; l <= (ev.off+ev.n-1)/lineSize; l++ {
				if ln := e.lines[l]; ln != nil {
					ln.pend[ev.agent] = len(ln.items)
				}
			}
		case evFence:
			e.visitAll(ev.phase)
			e.fence(ev.agent)
		case evMark:
			e.visitAll(ev.phase)
		}
	}
	if !e.done {
		e.visitAll(t.phase)
	}
	return e.res
}

type enum struct {
	base  []byte // what is durable
	img   []byte // equal to base between visits
	lines map[uint64]*line
	plan  Plan
	stop  bool
	done  bool
	check Check
	rnd   *rand.Rand
	res   Result
	dirty []uint64 // lines the check has touched
}

func (e *enum) store(ev event, group bool) {
	by := map[uint64][]word{}
	var order []uint64
	for _, w := range ev.words {
		l := w.off / lineSize
		if ev.kind == evNT {
			l |= ntLine
		}
		if by[l] == nil {
			order = append(order, l)
		}
		by[l] = append(by[l], w)
	}
	for _, l := range order {
		ln := e.lines[l]
		if ln == nil {
			ln = &line{pend: map[int]int{}}
			e.lines[l] = ln
		}
		ln.items = append(ln.items, item{by[l], group && len(by[l]) > 1})
		if ev.kind == evNT {
			ln.pend[ev.agent] = len(ln.items)
		}
	}
}

func (e *enum) fence(agent int) {
	for l, ln := range e.lines {
		n := ln.pend[agent]
		for _, it := range ln.items[:n] {
			for _, w := range it.words {
				binary.LittleEndian.PutUint64(e.base[w.off:], w.val)
				binary.LittleEndian.PutUint64(e.img[w.off:], w.val)
			}
		}
		ln.items = ln.items[n:]
		for a := range ln.pend {
			ln.pend[a] = max(0, ln.pend[a]-n)
		}
		if len(ln.items) == 0 {
			delete(e.lines, l)
		}
	}
}

// states of one line, as lists of words to apply in order. For a line with items i1…ik: nothing; i1; i1 i2; …; inside a group, each proper subset of its words.
func (ln *line) states() int {
	n := 1
	for _, it := range ln.items {
		if it.group {
			n += 1<<len(it.words) - 1
		} else {
			n++
		}
	}
	return n
}

func (ln *line) apply(img []byte, s int) {
	for _, it := range ln.items {
		k := 1
		if it.group {
			k = 1<<len(it.words) - 1
		}
		if s == 0 {
			return
		}
		if s < k { // a proper subset of the group
			for i, w := range it.words {
				if s>>i&1 == 1 {
					binary.LittleEndian.PutUint64(img[w.off:], w.val)
				}
			}
			return
		}
		for _, w := range it.words {
			binary.LittleEndian.PutUint64(img[w.off:], w.val)
		}
		s -= k
	}
}

// visitAll visits the states of this moment.
func (e *enum) visitAll(phase int) {
	e.res.Epochs++
	nums := make([]uint64, 0, len(e.lines))
	for l := range e.lines {
		nums = append(nums, l)
	}
	sort.Slice(nums, func(i, j int) bool { return nums[i] < nums[j] })
	counts := make([]int, len(nums))
	total := 1
	for i, l := range nums {
		counts[i] = e.lines[l].states()
		if total <= e.plan.Limit {
			total *= counts[i]
		}
	}
	sel := make([]int, len(nums))
	visit := func() { e.visit(nums, sel, phase) }
	if total <= e.plan.Limit {
		e.res.Exhaustive++
		for !e.done {
			visit()
			i := 0
			for ; i < len(sel); i++ {
				if sel[i]++; sel[i] < counts[i] {
					break
				}
				sel[i] = 0
			}
			if i == len(sel) {
				return
			}
		}
		return
	}
	e.sample(counts, sel, visit)
}

// sample visits what is most telling where there are too many states: all or nothing but one line, pairs of lines, and states at random.
func (e *enum) sample(counts, sel []int, visit func()) {
	budget := e.plan.Limit
	set := func(full bool) {
		for i := range sel {
			sel[i] = 0
			if full {
				sel[i] = counts[i] - 1
			}
		}
	}
	for _, full := range []bool{false, true} {
		set(full)
		visit()
		for i := range sel {
			rest := sel[i]
			step := max(1, counts[i]*len(sel)*4/budget)
			for s := 0; s < counts[i]-1 && !e.done; s += step {
				sel[i] = s
				visit()
			}
			sel[i] = counts[i] - 1 // the whole line, whatever the step
			visit()
			sel[i] = rest
		}
		for i := range sel {
			for j := range i {
				if e.done || len(sel)*len(sel) > budget {
					break
				}
				a, b := sel[i], sel[j]
				sel[i], sel[j] = counts[i]-1-a, counts[j]-1-b
				visit()
				sel[i], sel[j] = a, b
			}
		}
	}
	for n := 0; n < e.plan.Random && !e.done; n++ {
		for i := range sel {
			switch e.rnd.IntN(3) { // extremes are likelier to be wrong together
			case 0:
				sel[i] = 0
			case 1:
				sel[i] = counts[i] - 1
			default:
				sel[i] = e.rnd.IntN(counts[i])
			}
		}
		visit()
	}
}

func (e *enum) visit(nums []uint64, sel []int, phase int) {
	if e.done {
		return
	}
	for i, l := range nums {
		e.lines[l].apply(e.img, sel[i])
	}
	e.res.States++
	err := e.check(e.img, phase, func(off, n uint64) {
		for l := off / lineSize; n > 0 && l <= (off+n-1)/lineSize; l++ {
			e.dirty = append(e.dirty, l)
		}
	})
	if err != nil {
		e.res.Failed++
		if e.res.First == nil {
			e.res.First = fmt.Errorf("phase %d: %w", phase, err)
		}
		e.done = e.stop
	}
	for _, l := range append(e.dirty, nums...) {
		l &^= ntLine
		copy(e.img[l*lineSize:(l+1)*lineSize], e.base[l*lineSize:])
	}
	e.dirty = e.dirty[:0]
}

// Toucher is a persist.Hook for the check: it passes on what the library changes, and carries the mutant into recovery.
type Toucher struct {
	Touched func(off, n uint64)
	Mutant  *Mutant
}

// Store implements persist.Hook.
func (t *Toucher) Store(off uint64) { t.Touched(off, 8) }

// Copy implements persist.Hook.
func (t *Toucher) Copy(off, n uint64) { t.Touched(off, n) }

// NT implements persist.Hook.
func (t *Toucher) NT(off, n uint64) { t.Touched(off, n) }

// Flush implements persist.Hook.
func (t *Toucher) Flush(uint64, uint64) bool { return false }

// Fence implements persist.Hook.
func (t *Toucher) Fence() bool { return false }

// Verify implements persist.Hook.
func (t *Toucher) Verify(ok bool) bool { return ok || t.Mutant.drop("Verify") }
