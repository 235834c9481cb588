// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pmap_test

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/nhybrid/nhybrid/scmlib"
	"github.com/nhybrid/nhybrid/scmlib/pmap"
)

func region(t testing.TB, size int) *scmlib.Region {
	t.Helper()
	r, err := scmlib.OpenImage(make([]byte, size), scmlib.Options{Create: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func update(t testing.TB, r *scmlib.Region, fn func(tx *scmlib.Tx) error) {
	t.Helper()
	if err := r.Update(fn); err != nil {
		t.Fatal(err)
	}
}

func head[T any](t testing.TB, r *scmlib.Region) (p scmlib.Ptr[T]) {
	t.Helper()
	update(t, r, func(tx *scmlib.Tx) (err error) { p, err = scmlib.New[T](tx); return err })
	return p
}

func blocks(r *scmlib.Region) (n int) {
	r.Blocks(func(scmlib.Block) bool { n++; return true })
	return n
}

var errNo = errors.New("no")

// Random operations on a tree and on a Go map agree, aborted ones and all. In the end nothing is left in the heap.
func TestTree(t *testing.T) {
	r := region(t, 16<<20)
	h := head[pmap.TreeHead](t, r)
	tree, err := pmap.NewTree[uint64](r, h)
	if err != nil {
		t.Fatal(err)
	}
	before := blocks(r)
	want := map[uint64]uint64{}
	rnd := rand.New(rand.NewPCG(1, 2))
	for i := range 30000 {
		next := maps.Clone(map[uint64]uint64{})
		err := r.Update(func(tx *scmlib.Tx) error {
			for range 1 + rnd.IntN(4) {
				k := rnd.Uint64N(3000)
				if i/5000%2 == 0 || rnd.IntN(3) == 0 {
					if err := tree.Put(tx, k, uint64(i)); err != nil {
						return err
					}
					next[k] = uint64(i)
				} else {
					_, inOld := want[k]
					v, inNew := next[k]
					there := inNew && v != gone || !inNew && inOld
					found, err := tree.Delete(tx, k)
					if err != nil {
						return err
					}
					if found != there {
						return fmt.Errorf("delete %d: found %v, want %v", k, found, there)
					}
					next[k] = gone
				}
			}
			if rnd.IntN(5) == 0 {
				return errNo
			}
			return nil
		})
		if err == nil {
			for k, v := range next {
				if v == gone {
					delete(want, k)
				} else {
					want[k] = v
				}
			}
		} else if !errors.Is(err, errNo) {
			t.Fatal(err)
		}
		if i%3000 == 0 {
			compareTree(t, tree, want, rnd.Uint64N(3000))
		}
	}
	compareTree(t, tree, want, 1500)
	for k := range want {
		update(t, r, func(tx *scmlib.Tx) error { _, err := tree.Delete(tx, k); return err })
	}
	if n := blocks(r); n != before {
		t.Errorf("%d blocks are left", n-before)
	}
	for i := range uint64(5000) {
		update(t, r, func(tx *scmlib.Tx) error { return tree.Put(tx, i, i) })
	}
	update(t, r, func(tx *scmlib.Tx) error { return tree.Clear(tx) })
	if n := blocks(r); n != before {
		t.Errorf("%d blocks are left after Clear", n-before)
	}
}

const gone = ^uint64(0)

func compareTree(t *testing.T, tree *pmap.Tree[uint64], want map[uint64]uint64, from uint64) {
	t.Helper()
	keys := slices.Sorted(maps.Keys(want))
	i, _ := slices.BinarySearch(keys, from)
	for k, v := range tree.From(from) {
		if i >= len(keys) || k != keys[i] || v != want[k] {
			t.Fatalf("entry %d is %d=%d", i, k, v)
		}
		i++
	}
	if i != len(keys) {
		t.Fatalf("scan ends after %d of %d", i, len(keys))
	}
	for _, k := range keys {
		if v, ok := tree.Get(k); !ok || v != want[k] {
			t.Fatalf("key %d: %d %v", k, v, ok)
		}
	}
	if _, ok := tree.Get(1 << 40); ok {
		t.Fatal("found what is not there")
	}
}

func TestBytesTree(t *testing.T) {
	r := region(t, 16<<20)
	tree := pmap.NewBytesTree(r, head[pmap.TreeHead](t, r))
	before := blocks(r)
	want := map[string]string{}
	rnd := rand.New(rand.NewPCG(3, 4))
	for i := range 6000 {
		k := fmt.Sprintf("%.*s%d", rnd.IntN(12), "common prefix", rnd.IntN(700))
		update(t, r, func(tx *scmlib.Tx) error {
			if rnd.IntN(3) == 0 {
				found, err := tree.Delete(tx, []byte(k))
				if _, there := want[k]; there != found {
					t.Fatalf("delete %q: found %v", k, found)
				}
				delete(want, k)
				return err
			}
			want[k] = fmt.Sprint(i)
			return tree.Put(tx, []byte(k), []byte(want[k]))
		})
	}
	keys := slices.Sorted(maps.Keys(want))
	i, _ := slices.BinarySearch(keys, "common")
	for k, v := range tree.From([]byte("common")) {
		if i >= len(keys) || string(k) != keys[i] || string(v) != want[keys[i]] {
			t.Fatalf("entry %d is %q=%q", i, k, v)
		}
		i++
	}
	if i != len(keys) {
		t.Fatalf("scan ends after %d of %d", i, len(keys))
	}
	for _, k := range keys {
		if got := tree.Get([]byte(k)); string(got) != want[k] {
			t.Fatalf("%q is %q, want %q", k, got, want[k])
		}
		update(t, r, func(tx *scmlib.Tx) error { _, err := tree.Delete(tx, []byte(k)); return err })
	}
	if tree.Get([]byte("x")) != nil || blocks(r) != before {
		t.Errorf("%d blocks are left", blocks(r)-before)
	}
}

func TestHash(t *testing.T) {
	r := region(t, 16<<20)
	m, err := pmap.NewHash[[16]byte, uint64](r, head[pmap.HashHead](t, r))
	if err != nil {
		t.Fatal(err)
	}
	want := map[[16]byte]uint64{}
	rnd := rand.New(rand.NewPCG(5, 6))
	for i := range 40000 {
		var k [16]byte
		k[0], k[9] = byte(rnd.IntN(100)), byte(rnd.IntN(100))
		update(t, r, func(tx *scmlib.Tx) error {
			if i > 20000 && rnd.IntN(3) > 0 {
				found, err := m.Delete(tx, k)
				if _, there := want[k]; there != found {
					t.Fatalf("delete: found %v", found)
				}
				delete(want, k)
				return err
			}
			want[k] = uint64(i)
			return m.Put(tx, k, uint64(i))
		})
	}
	if m.Len() != len(want) || m.Len() < 1000 {
		t.Fatalf("%d entries, want %d", m.Len(), len(want))
	}
	for k, v := range m.All() {
		if want[k] != v {
			t.Fatalf("%v is %d, want %d", k, v, want[k])
		}
		if got, ok := m.Get(k); !ok || got != v {
			t.Fatalf("%v is listed and not found", k)
		}
		delete(want, k)
	}
	if len(want) != 0 {
		t.Fatalf("%d are not listed", len(want))
	}
}

func TestLog(t *testing.T) {
	r := region(t, 4<<20)
	h := head[pmap.LogHead](t, r)
	log := pmap.NewLog(r, h)
	rec := func(i uint64) []byte { return bytes.Repeat([]byte{byte(i)}, int(i*37%3000)) }
	for i := range uint64(400) {
		update(t, r, func(tx *scmlib.Tx) error { return log.Append(tx, rec(i)) })
		if i%3 == 0 {
			if err := r.Update(func(tx *scmlib.Tx) error { return errors.Join(log.Append(tx, []byte("no")), errNo) }); !errors.Is(err, errNo) {
				t.Fatal(err)
			}
		}
	}
	see := func(from uint64) (first, n uint64) {
		cur := log.From(from)
		for s, b := range cur.All() {
			if n == 0 {
				first = s
			}
			if !bytes.Equal(b, rec(s)) || s != first+n {
				t.Fatalf("record %d is wrong", s)
			}
			n++
		}
		if cur.Err() != nil {
			t.Fatal(cur.Err())
		}
		return first, n
	}
	if f, n := see(0); f != 0 || n != 400 {
		t.Fatalf("%d records from %d", n, f)
	}
	if f, n := see(350); f != 350 || n != 50 {
		t.Fatalf("%d records from %d", n, f)
	}
	all := blocks(r)
	update(t, r, func(tx *scmlib.Tx) error { return log.Trim(tx, 300) })
	if f, n := see(0); f == 0 || f > 300 || f+n != 400 {
		t.Fatalf("%d records from %d after Trim", n, f)
	}
	if blocks(r) >= all {
		t.Error("Trim gave nothing back")
	}
	// A record that the medium changed is found, and told.
	n := 0
	for _, b := range log.From(399).All() {
		b[5] ^= 1
		n++
	}
	cur := log.From(399)
	for range cur.All() {
		n++
	}
	if n != 1 || !errors.Is(cur.Err(), scmlib.ErrCorrupt) {
		t.Errorf("%d records, %v", n, cur.Err())
	}
}

func TestArray(t *testing.T) {
	r := region(t, 4<<20)
	a, err := pmap.NewArray[int32](r, head[pmap.ArrayHead](t, r))
	if err != nil {
		t.Fatal(err)
	}
	if a.Len() != 0 || len(a.All()) != 0 {
		t.Fatal("not empty")
	}
	update(t, r, func(tx *scmlib.Tx) error { return a.Resize(tx, 1000) })
	update(t, r, func(tx *scmlib.Tx) error { return a.Set(tx, 9, 0, 500, 999) })
	if err := r.Update(func(tx *scmlib.Tx) error { return errors.Join(a.Set(tx, 1, 500), a.Set(tx, 1, -1)) }); !errors.Is(err, scmlib.ErrRange) {
		t.Fatal(err)
	}
	update(t, r, func(tx *scmlib.Tx) error { return a.Resize(tx, 501) })
	if all := a.All(); len(all) != 501 || all[0] != 9 || all[500] != 9 || all[499] != 0 {
		t.Fatal("wrong content")
	}
	if _, err := pmap.NewArray[string](r, scmlib.Ptr[pmap.ArrayHead]{}); !errors.Is(err, scmlib.ErrType) {
		t.Error(err)
	}
}

// A damaged tree is an error, not a crash of the program.
func TestDamage(t *testing.T) {
	r := region(t, 4<<20)
	h := head[pmap.TreeHead](t, r)
	tree, err := pmap.NewTree[uint64](r, h)
	if err != nil {
		t.Fatal(err)
	}
	for i := range uint64(500) {
		update(t, r, func(tx *scmlib.Tx) error { return tree.Put(tx, i, i) })
	}
	b, err := r.Bytes(h.Off(), 16)
	if err != nil {
		t.Fatal(err)
	}
	good := bytes.Clone(b)
	for _, bad := range []uint64{1, 1 << 60, 4096, 0xfffffffffffffff8} {
		for _, at := range []int{0, 8} {
			copy(b, good)
			for i := range 8 {
				b[at+i] = byte(bad >> (8 * i))
			}
			err := r.View(func() error {
				for range tree.From(0) {
				}
				tree.Get(5)
				return nil
			})
			if at == 8 && bad == 1 {
				continue // the true depth
			}
			if !errors.Is(err, scmlib.ErrRange) {
				t.Errorf("head[%d] = %#x: %v", at, bad, err)
			}
		}
	}
}
