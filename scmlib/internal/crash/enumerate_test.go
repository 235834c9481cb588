// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package crash

import (
	"encoding/binary"
	"errors"
	"testing"
)

// machine is memory under a tracer that is used as the library does.
type machine struct {
	*Tracer
	mem []byte
}

func newMachine() *machine {
	mem := make([]byte, 8192)
	return &machine{NewTracer(mem, nil), mem}
}

func (m *machine) store(off, v uint64) {
	binary.LittleEndian.PutUint64(m.mem[off:], v)
	m.Store(off)
}

func (m *machine) user(off, v uint64) { binary.LittleEndian.PutUint64(m.mem[off:], v) }

// states lists, as sets, the pairs of words at a and b that a crash may leave at the end.
func (m *machine) states(a, b uint64) map[[2]uint64]bool {
	out := map[[2]uint64]bool{}
	last := m.phase + 1
	m.Mark()
	m.Enumerate(Plan{Limit: 1 << 16}, false, func(img []byte, phase int, _ func(off, n uint64)) error {
		if phase == last {
			out[[2]uint64{binary.LittleEndian.Uint64(img[a:]), binary.LittleEndian.Uint64(img[b:])}] = true
		}
		return nil
	})
	return out
}

func TestModel(t *testing.T) {
	type pair = [2]uint64
	for _, c := range []struct {
		name string
		run  func(m *machine)
		a, b uint64
		want []pair
	}{
		{"one line keeps its order", func(m *machine) { m.store(0, 1); m.store(8, 2) }, 0, 8, []pair{{0, 0}, {1, 0}, {1, 2}}},
		{"two lines have none", func(m *machine) { m.store(0, 1); m.store(64, 2) }, 0, 64, []pair{{0, 0}, {1, 0}, {0, 2}, {1, 2}}},
		{"a word may show any of its values", func(m *machine) { m.store(0, 1); m.store(0, 2) }, 0, 0, []pair{{0, 0}, {1, 1}, {2, 2}}},
		{"flush and fence", func(m *machine) { m.store(0, 1); m.Flush(0, 8); m.Fence(); m.store(8, 2) }, 0, 8, []pair{{1, 0}, {1, 2}}},
		{"flush without fence", func(m *machine) { m.store(0, 1); m.Flush(0, 8); m.store(64, 2) }, 0, 64, []pair{{0, 0}, {1, 0}, {0, 2}, {1, 2}}},
		{"fence without flush", func(m *machine) { m.store(0, 1); m.Fence() }, 0, 0, []pair{{0, 0}, {1, 1}}},
		{"flush before the store", func(m *machine) { m.Flush(0, 8); m.store(0, 1); m.Fence() }, 0, 0, []pair{{0, 0}, {1, 1}}},
		{"another processor's fence", func(m *machine) { m.store(0, 1); m.Flush(0, 8); m.Agent(1); m.Fence() }, 0, 0, []pair{{0, 0}, {1, 1}}},
		{"the program's stores have no order", func(m *machine) { m.user(0, 1); m.user(8, 2); m.Flush(128, 8) }, 0, 8, []pair{{0, 0}, {1, 0}, {0, 2}, {1, 2}}},
		{"but come before later ones", func(m *machine) { m.user(0, 1); m.store(8, 2) }, 0, 8, []pair{{0, 0}, {1, 0}, {1, 2}}},
		{"past the cache: fence, no flush", func(m *machine) { m.user(0, 1); m.NT(0, 8); m.Fence(); m.user(8, 2); m.NT(8, 8) }, 0, 8, []pair{{1, 0}, {1, 2}}},
	} {
		m := newMachine()
		c.run(m)
		got := m.states(c.a, c.b)
		for _, p := range c.want {
			if !got[p] {
				t.Errorf("%s: state %v is missing", c.name, p)
			}
			delete(got, p)
		}
		if len(got) > 0 {
			t.Errorf("%s: states that cannot be: %v", c.name, got)
		}
	}
}

// What a check changes is gone at the next state, and the counts are right.
func TestEnumerate(t *testing.T) {
	m := newMachine()
	for i := range uint64(4) {
		m.store(64*i, 1)
	}
	n := 0
	res := m.Enumerate(Plan{Limit: 100}, false, func(img []byte, _ int, touched func(off, n uint64)) error {
		n++
		if img[4000] != 0 {
			return errors.New("the last check is still to be seen")
		}
		img[4000] = 1
		touched(4000, 1)
		if img[0] == 1 && img[64] == 1 {
			return errors.New("planted")
		}
		return nil
	})
	if res.States != 16 || n != 16 || res.Failed != 4 || res.Exhaustive != 1 || res.First.Error() != "phase 0: planted" {
		t.Errorf("%+v", res)
	}
	if res := m.Enumerate(Plan{Limit: 100}, true, func([]byte, int, func(off, n uint64)) error { return errNo }); res.States != 1 || res.Failed != 1 {
		t.Errorf("stop: %+v", res)
	}
	// Beyond the limit all single lines are visited still.
	alone := map[uint64]bool{}
	m.Enumerate(Plan{Limit: 10, Random: 5}, false, func(img []byte, _ int, _ func(off, n uint64)) error {
		set := 0
		for i := range uint64(4) {
			set += int(img[64*i])
		}
		for i := range uint64(4) {
			if set == 1 && img[64*i] == 1 {
				alone[i] = true
			}
		}
		return nil
	})
	if len(alone) != 4 {
		t.Errorf("single lines visited: %v", alone)
	}
}

var errNo = errors.New("no")
