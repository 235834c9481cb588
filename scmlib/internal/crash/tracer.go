// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package crash enumerates the states that x86 may leave on persistent memory when a program is cut short, from the program's own stream of stores,
// flushes and fences.
//
// The model (Px86): the stores to one cache line reach the medium in program order, so a crash shows a prefix of them; lines are independent; a
// flush is complete at the next fence of the same processor; a line that was not flushed may be there all the same, as caches evict when they like.
// Where the order of stores inside an interval is not known (a copy of many bytes, stores past the cache, stores of the program itself, which are
// found by comparing memory), any subset of their 8-byte words is allowed: more states than the processor knows, never fewer.
package crash

import (
	"encoding/binary"
	"fmt"
	"path/filepath"
	"runtime"
	"strings"
)

const lineSize = 64

// Site is a place in the library's source where it flushes, fences or believes a checksum.
type Site struct {
	Op   string // Flush, Fence, Verify
	File string // base name
	Line int
}

func (s Site) String() string { return fmt.Sprintf("%s at %s:%d", s.Op, s.File, s.Line) }

// Mutant leaves one site out. The zero Mutant leaves nothing out.
type Mutant struct {
	Site Site
	Hits int // how often the site was passed
	Seen map[Site]int
}

// drop tells whether the caller of Mem.<op> is the site to leave out.
func (m *Mutant) drop(op string) bool {
	if m == nil || m.Seen == nil && m.Site.Op != op {
		return false
	}
	var pcs [8]uintptr
	frames := runtime.CallersFrames(pcs[:runtime.Callers(3, pcs[:])])
	for {
		f, more := frames.Next()
		if f.Function != "" && (!strings.Contains(f.Function, "/internal/persist.") || strings.HasSuffix(f.Function, ".CopyNT")) && !strings.Contains(f.Function, "/internal/crash.") &&
			!strings.HasSuffix(f.Function, "scmlib.(*Region).fence") {
			s := Site{op, filepath.Base(f.File), f.Line}
			if m.Seen != nil {
				m.Seen[s]++
			}
			if s == m.Site {
				m.Hits++
				return true
			}
			return false
		}
		if !more {
			return false
		}
	}
}

type kind uint8

const (
	evStore kind = iota // one word, in order
	evWords             // words whose order is not known
	evNT                // words past the cache
	evFlush
	evFence
	evMark
)

type word struct {
	off uint64 // multiple of 8
	val uint64
}

type event struct {
	kind  kind
	agent int
	words []word
	off   uint64 // of a flush
	n     uint64
	phase int
}

// Tracer records what happens to a memory. It implements persist.Hook. It is for one goroutine at a time.
type Tracer struct {
	mem    []byte
	shadow []byte
	start  []byte
	events []event
	agent  int
	phase  int
	quiet  bool // memory is changed only through the hook: no need to compare it
	Mutant *Mutant
}

// NewTracer records changes of mem from now on.
func NewTracer(mem []byte, m *Mutant) *Tracer {
	t := &Tracer{mem: mem, shadow: append([]byte(nil), mem...), Mutant: m}
	t.start = append([]byte(nil), mem...)
	return t
}

// Quiet says that all stores come through the hook.
func (t *Tracer) Quiet() *Tracer { t.quiet = true; return t }

// Agent says which processor the program runs on from now on: a fence completes the flushes of its own processor only.
func (t *Tracer) Agent(a int) { t.agent = a }

// Mark ends a phase: everything recorded from now on belongs to the next. The states at the end of a phase are enumerated at the mark.
func (t *Tracer) Mark() {
	t.diff(nil)
	t.phase++
	t.add(event{kind: evMark})
}

func (t *Tracer) add(e event) {
	e.agent, e.phase = t.agent, t.phase
	t.events = append(t.events, e)
}

func (t *Tracer) load(off uint64) uint64 { return binary.LittleEndian.Uint64(t.mem[off:]) }

// diff records the program's own stores: words that differ from what was seen last. The words in skip are the library's.
func (t *Tracer) diff(skip func(off uint64) bool) {
	if t.quiet {
		return
	}
	const block = 4096
	var ws []word
	for b := 0; b < len(t.mem); b += block {
		if string(t.mem[b:b+block]) == string(t.shadow[b:b+block]) {
			continue
		}
		for o := uint64(b); o < uint64(b+block); o += 8 {
			if v := t.load(o); v != binary.LittleEndian.Uint64(t.shadow[o:]) && (skip == nil || !skip(o)) {
				ws = append(ws, word{o, v})
				binary.LittleEndian.PutUint64(t.shadow[o:], v)
			}
		}
	}
	if len(ws) > 0 {
		t.add(event{kind: evWords, words: ws})
	}
}

// Store implements persist.Hook.
func (t *Tracer) Store(off uint64) {
	t.diff(func(o uint64) bool { return o == off })
	v := t.load(off)
	binary.LittleEndian.PutUint64(t.shadow[off:], v)
	t.add(event{kind: evStore, words: []word{{off, v}}})
}

func (t *Tracer) bulk(k kind, off, n uint64) {
	if n == 0 {
		return
	}
	first, end := off&^7, (off+n+7)&^7
	t.diff(func(o uint64) bool { return o >= first && o < end })
	var ws []word
	for o := first; o < end; o += 8 {
		// A word that is written with the value it has leaves no trace.
		if v := t.load(o); v != binary.LittleEndian.Uint64(t.shadow[o:]) {
			ws = append(ws, word{o, v})
			binary.LittleEndian.PutUint64(t.shadow[o:], v)
		}
	}
	t.add(event{kind: k, words: ws})
}

// Copy implements persist.Hook.
func (t *Tracer) Copy(off, n uint64) { t.bulk(evWords, off, n) }

// NT implements persist.Hook.
func (t *Tracer) NT(off, n uint64) { t.bulk(evNT, off, n) }

// Flush implements persist.Hook.
func (t *Tracer) Flush(off, n uint64) bool {
	t.diff(nil)
	if t.Mutant.drop("Flush") {
		return false
	}
	t.add(event{kind: evFlush, off: off, n: n})
	return false // there is nothing to flush: the memory is the test's
}

// Fence implements persist.Hook.
func (t *Tracer) Fence() bool {
	t.diff(nil)
	if t.Mutant.drop("Fence") {
		return false
	}
	t.add(event{kind: evFence})
	return false
}

// Verify implements persist.Hook.
func (t *Tracer) Verify(ok bool) bool { return ok || t.Mutant.drop("Verify") }

// Fences counts the fences since the last mark.
func (t *Tracer) Fences() int {
	n := 0
	for i := len(t.events) - 1; i >= 0 && t.events[i].kind != evMark; i-- {
		if t.events[i].kind == evFence {
			n++
		}
	}
	return n
}
