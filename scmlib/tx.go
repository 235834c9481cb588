// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scmlib

import (
	"fmt"
	"reflect"
	"runtime/debug"
	"unsafe"
)

// Tx is a running transaction. It belongs to the function it was given to: not to other goroutines, and not to the time after.
type Tx struct {
	r    *Region
	lane uint32
	salt uint64
	gen  uint64
	live bool

	pos, end uint64 // what is left of the segment of the log
	seq      uint32
	buf      []byte // record in the making
	count    uint32 // its entries
	maxBuf   int

	ops     []allocOp // allocations and frees, in order
	logged  int       // how many of them are in the log
	words   []wordOp  // scratch
	spans   []span    // to be flushed at commit
	ext     []allocOp // chunks that the log has taken
	lent    uint32    // how many of them are of those that are kept back
	borrows bool      // it holds heap.borrowing
	logging []span    // scratch
	kept    []span    // what Dirty must not spoil
}

// Range is a part of the region.
type Range struct {
	Off Off
	Len uint64
}

// Update runs fn as one transaction. If it returns nil, everything that fn did to ranges it had named is durable, to the degree of Info.Durability.
// If fn fails or panics, all of that is taken back first; a panic goes on afterwards, except faults of the medium and bad offsets, which are returned as
// *MediaError and *PtrError. Update waits while as many transactions run as the region has lanes.
func (r *Region) Update(fn func(*Tx) error) (err error) {
	if r.readOnly {
		return ErrReadOnly
	}
	t, err := r.begin()
	if err != nil {
		return err
	}
	old := debug.SetPanicOnFault(true)
	done := false
	defer func() {
		debug.SetPanicOnFault(old)
		t.endBorrow() // if the medium failed
		r.lanesFree <- t
	}()
	defer func() {
		if !done { // fn has panicked, or called Goexit
			err = t.abandon(recover())
		}
	}()
	err = fn(t)
	if err == nil {
		err = t.commit()
	} else if rerr := t.rollback(); rerr != nil {
		err = fmt.Errorf("%w; roll back: %w", err, rerr)
	}
	done = true
	return err
}

func (r *Region) begin() (*Tx, error) {
	t, ok := <-r.lanesFree
	if !ok {
		return nil, ErrClosed
	}
	if err := r.broken(); err != nil {
		r.lanesFree <- t
		return nil, err
	}
	base := r.lane(t.lane)
	t.gen = r.mem.Load64(base)
	t.pos, t.end = base+line, base+uint64(r.laneSize)
	t.seq, t.count, t.logged = 0, 0, 0
	t.ops, t.spans, t.ext, t.buf = t.ops[:0], t.spans[:0], t.ext[:0], beginRecord(t.buf)
	t.kept, t.lent = t.kept[:0], 0
	t.live = true
	return t, nil
}

// abandon rolls back after fn did not return. What was recovered is passed on unless it is a fault of the medium or of a pointer.
func (t *Tx) abandon(v any) (err error) {
	pass := true
	defer func() {
		if v2 := recover(); v2 != nil { // the medium failed while rolling back: the next open has to do it
			t.live = false
			err = t.r.fail(t.r.faultError(v2))
			pass = pass && t.r.faultError(v2) == nil
		}
		if pass {
			if v != nil {
				panic(v)
			}
		}
	}()
	if ferr := t.r.faultError(v); ferr != nil {
		pass, err = false, ferr
	} else {
		err = errAborted // seen by nobody: Goexit unwinds on
	}
	if rerr := t.rollback(); rerr != nil {
		return fmt.Errorf("%w; roll back: %w", err, rerr)
	}
	return err
}

// Add says that ranges will be changed: each argument is a *T or a []T that lies in the region. Their content now is what a rollback restores. ErrFull if there is
// no room for that; the transaction is as it was then.
// Give all ranges that are known to one call: it costs one fence, however many they are.
func (t *Tx) Add(ptrs ...any) error {
	t.logging = t.logging[:0]
	for _, p := range ptrs {
		v := reflect.ValueOf(p)
		var n uintptr
		switch v.Kind() {
		case reflect.Pointer:
			n = v.Type().Elem().Size()
		case reflect.Slice:
			n = v.Type().Elem().Size() * uintptr(v.Len())
		default:
			return fmt.Errorf("%w: Add takes *T or []T, not %T", ErrType, p)
		}
		off, err := t.r.offsetOf(v.UnsafePointer(), uint64(n))
		if err != nil {
			return err
		}
		t.logging = append(t.logging, span{off, uint64(n)})
	}
	return t.log(t.logging)
}

// AddAll is Add for pointers of one type, without the cost of reflection.
func AddAll[T any](t *Tx, ptrs ...*T) error {
	t.logging = t.logging[:0]
	for _, p := range ptrs {
		off, err := t.r.offsetOf(unsafe.Pointer(p), uint64(unsafe.Sizeof(*p)))
		if err != nil {
			return err
		}
		t.logging = append(t.logging, span{off, uint64(unsafe.Sizeof(*p))})
	}
	return t.log(t.logging)
}

// AddRanges is Add by offsets.
func (t *Tx) AddRanges(rs ...Range) error {
	t.logging = t.logging[:0]
	for _, r := range rs {
		t.logging = append(t.logging, span{uint64(r.Off), r.Len})
	}
	return t.log(t.logging)
}

// Dirty says that a range is written by this transaction whose old content does not matter, as nothing referred to it when the transaction began: space behind
// the end of a log, a free slot; not a slot that this transaction itself has freed (see Keep). It is durable with the transaction, and not restored by a rollback. It costs no fence.
func (t *Tx) Dirty(off Off, n uint64) error {
	if !t.live {
		return ErrTxDone
	}
	if !t.r.inHeap(uint64(off), n) {
		return fmt.Errorf("range of %d bytes at %d: %w", n, uint64(off), ErrRange)
	}
	for _, k := range t.kept {
		if uint64(off) < k.off+k.n && k.off < uint64(off)+n {
			return t.AddRanges(Range{off, n})
		}
	}
	if n > 0 {
		t.spans = append(t.spans, span{uint64(off), n})
	}
	return nil
}

// Keep says that a range holds something that this transaction has let go, and that a rollback must find as it is. From here to the end of the
// transaction Dirty, where it touches the range, does what Add does. A slot that one transaction empties and fills again needs it.
func (t *Tx) Keep(off Off, n uint64) { t.kept = append(t.kept, span{uint64(off), n}) }

// Set changes one value: Add and an assignment.
func Set[T any](t *Tx, p *T, v T) error {
	if err := AddAll(t, p); err != nil {
		return err
	}
	*p = v
	return nil
}

// New allocates a zeroed T.
func New[T any](t *Tx) (Ptr[T], error) { return NewSlice[T](t, 1) }

// NewSlice allocates n zeroed Ts in a row. The Ptr does not know n; use Slice.
func NewSlice[T any](t *Tx, n int) (Ptr[T], error) {
	if err := CheckType[T](); err != nil {
		return Ptr[T]{}, err
	}
	var z T
	size := uint64(unsafe.Sizeof(z))
	if n < 0 || size > 0 && uint64(n) > t.r.size/size {
		return Ptr[T]{}, fmt.Errorf("allocate %d of %d bytes: %w", n, size, ErrFull)
	}
	off, err := t.Alloc(size * uint64(n))
	return Ptr[T]{off}, err
}

// Alloc allocates n zeroed bytes, aligned to 64, or to 32 if they are 32 or less. The block is the program's from the commit on; if the transaction
// does not commit it never was. It may be written without Add. ErrFull if there is no room.
func (t *Tx) Alloc(n uint64) (Off, error) {
	if !t.live {
		return 0, ErrTxDone
	}
	op, err := t.r.heap.alloc(max(n, 1))
	if err != nil {
		return 0, err
	}
	t.ops = append(t.ops, op)
	t.r.mem.Zero(uint64(op.block), op.n)
	t.spans = append(t.spans, span{uint64(op.block), op.n})
	return op.block, nil
}

// Free gives a block back when the transaction commits. Its content stays until then. ErrFree if no block starts at off. It needs no room, however much a
// transaction frees.
func (t *Tx) Free(off Off) error {
	if !t.live {
		return ErrTxDone
	}
	op, err := t.r.heap.startFree(off)
	if err == nil {
		t.ops = append(t.ops, op)
		return nil
	}
	// It may be one that this transaction has allocated, which is not on the medium yet.
	for i := range t.ops {
		if op := &t.ops[i]; op.block == off && !op.freeable && !op.undone {
			op.undone = true
			return nil
		}
	}
	return err
}
