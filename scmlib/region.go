// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scmlib

import (
	"crypto/rand"
	"errors"
	"fmt"
	"reflect"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/nhybrid/nhybrid/scmlib/internal/persist"
)

// Region is an open region. Its methods may be called by many goroutines.
type Region struct {
	geometry
	mem       *persist.Mem
	hdr       header
	heap      *heap
	lanesFree chan *Tx
	info      Info
	readOnly  bool
	failed    atomic.Pointer[error]
	closing   sync.Mutex
	closed    bool
	release   func() error // unmaps and unlocks
}

// attach reads, heals, formats and recovers the region that lies in m. Nothing is written before all is found to be in order.
func attach(m *persist.Mem, o *Options, path string) (r *Region, err error) {
	r = &Region{mem: m, readOnly: o.ReadOnly, info: Info{Path: path}}
	old := debug.SetPanicOnFault(true)
	defer debug.SetPanicOnFault(old)
	defer func() {
		if v := recover(); v != nil {
			ferr := r.faultError(v)
			if ferr == nil {
				panic(v)
			}
			err = ferr
		}
		if err != nil {
			r, err = nil, fmt.Errorf("open region %q: %w", path, err)
		}
	}()
	if m.Size() < minSize {
		return nil, fmt.Errorf("%w: %d bytes; the smallest region has %d", ErrSize, m.Size(), minSize)
	}
	if len(o.Layout) > 64 {
		return nil, fmt.Errorf("%w: name %q has more than 64 bytes", ErrLayout, o.Layout)
	}
	formatted := blank(m)
	if formatted {
		if err := r.format(o); err != nil {
			return nil, err
		}
	}
	hdr, staleA, healed, err := readHeader(m)
	if err != nil {
		return nil, err
	}
	r.hdr, r.geometry, r.info.Healed = hdr, hdr.geometry, healed && !formatted
	if err := r.admit(o); err != nil {
		return nil, err
	}
	if r.info.Recovered, err = r.recover(staleA); err != nil {
		return nil, err
	}
	r.lanesFree = make(chan *Tx, r.lanes)
	for i := range r.lanes {
		r.lanesFree <- &Tx{r: r, lane: i, salt: salt(&r.hdr.uuid, i), maxBuf: int(min(r.laneSize-2*line, 8<<10))}
	}
	r.fillInfo()
	return r, nil
}

func (r *Region) format(o *Options) error {
	if !o.Create || o.ReadOnly {
		return fmt.Errorf("%w: it is all zeros; open it with Create to format it", ErrUnformatted)
	}
	g, err := newGeometry(r.mem.Size(), o)
	if err != nil {
		return err
	}
	h := header{geometry: g, layout: o.Layout, state: stateClosed}
	if _, err := rand.Read(h.uuid[:]); err != nil {
		return fmt.Errorf("make uuid: %w", err)
	}
	return format(r.mem, &h)
}

// admit compares the header with what the caller expects and the file gives.
func (r *Region) admit(o *Options) error {
	h := &r.hdr
	switch {
	case h.size != r.mem.Size():
		return fmt.Errorf("%w: the region has %d bytes, its file %d: it was cut or extended", ErrSize, h.size, r.mem.Size())
	case o.Size != 0 && uint64(o.Size) != h.size:
		return fmt.Errorf("%w: the region has %d bytes, not %d", ErrSize, h.size, o.Size)
	case o.Layout != "" && o.Layout != h.layout:
		return fmt.Errorf("%w: it is %q, not %q", ErrLayout, h.layout, o.Layout)
	case h.state == stateOpen && h.hostUSC != 0 && h.seen != 0 && h.hostUSC != h.seen && !o.AcceptUnsafe:
		return fmt.Errorf("%w: unsafe shutdown count was %d when the region was in use, and is %d now; open it with AcceptUnsafe to take what is left",
			ErrUnsafe, h.seen, h.hostUSC)
	}
	return nil
}

// recover brings the region into the state after the last transaction that was committed, and marks it as open.
func (r *Region) recover(staleA bool) (int, error) {
	lanes, table, err := r.readLanes()
	if err != nil {
		return 0, err
	}
	if r.heap, err = newHeap(r, table); err != nil {
		return 0, err
	}
	n, err := r.recoverLanes(lanes)
	if err != nil {
		return 0, err
	}
	if staleA {
		if err := healHeader(r.mem, &r.hdr); err != nil {
			return 0, err
		}
	}
	r.hdr.generation++
	r.hdr.state, r.hdr.seen = stateOpen, r.hdr.hostUSC
	return n, writeHeader(r.mem, &r.hdr)
}

// Close waits for running transactions, marks the region as closed and unmaps it. All pointers into it die. A second Close does nothing.
func (r *Region) Close() error {
	r.closing.Lock()
	defer r.closing.Unlock()
	if r.closed {
		return nil
	}
	r.closed = true
	for range r.lanes {
		<-r.lanesFree
	}
	close(r.lanesFree)
	var err error
	if r.broken() == nil && !r.readOnly {
		err = r.guard(func() error {
			r.hdr.state = stateClosed
			return writeHeader(r.mem, &r.hdr)
		})
	}
	closed := ErrClosed
	r.failed.Store(&closed)
	if r.release != nil {
		err = errors.Join(err, r.release())
	}
	return err
}

func (r *Region) broken() error {
	if p := r.failed.Load(); p != nil {
		return *p
	}
	return nil
}

// fail stops all further work: what is in memory may no longer be what is on the medium. The next open recovers.
func (r *Region) fail(err error) error {
	if err != nil {
		err = fmt.Errorf("region %q failed, open it again to recover: %w", r.info.Path, err)
		r.failed.CompareAndSwap(nil, &err)
	}
	return err
}

func (r *Region) fence() error {
	if err := r.mem.Fence(); err != nil {
		return r.fail(err)
	}
	return nil
}

// faultError turns what was recovered from a panic into an error, if it is a fault within the region or a bad pointer into it.
func (r *Region) faultError(v any) error {
	if p, ok := v.(*PtrError); ok {
		return p
	}
	e, ok := v.(runtime.Error)
	if !ok {
		return nil
	}
	a, ok := v.(interface{ Addr() uintptr })
	if !ok {
		return nil
	}
	off := uint64(a.Addr() - uintptr(r.mem.Base()))
	if off >= r.mem.Size() {
		return nil
	}
	return &MediaError{Path: r.info.Path, Off: off, Err: e}
}

// guard runs fn and turns faults of the medium into errors.
func (r *Region) guard(fn func() error) (err error) {
	old := debug.SetPanicOnFault(true)
	defer debug.SetPanicOnFault(old)
	defer func() {
		if v := recover(); v != nil {
			if err = r.faultError(v); err == nil {
				panic(v)
			}
		}
	}()
	return fn()
}

// View runs fn, which reads the region. Faults of the medium and bad offsets are returned as *MediaError and *PtrError. It takes no lock.
func (r *Region) View(fn func() error) error {
	if err := r.broken(); err != nil {
		return err
	}
	return r.guard(fn)
}

// Persist makes [off, off+n) durable, to the degree of Info.Durability. Outside page granularity only a range that is not in the heap, a closed
// region, or a fault of the medium fails.
func (r *Region) Persist(off Off, n uint64) error {
	if err := r.checkRange(off, n); err != nil || n == 0 {
		return err
	}
	if r.mem.Traced() {
		r.mem.Flush(uint64(off), n)
		return r.fence()
	}
	old := debug.SetPanicOnFault(true)
	err := r.persist(uint64(off), n)
	debug.SetPanicOnFault(old)
	return err
}

func (r *Region) persist(off, n uint64) (err error) {
	defer r.caught(&err)
	if err := r.mem.Persist(off, n); err != nil {
		return r.fail(err)
	}
	return nil
}

func (r *Region) caught(err *error) {
	if v := recover(); v != nil {
		if *err = r.faultError(v); *err == nil {
			panic(v)
		}
	}
}

// Flush starts making [off, off+n) durable; it is after the next Drain.
func (r *Region) Flush(off Off, n uint64) error {
	if err := r.checkRange(off, n); err != nil {
		return err
	}
	return r.guard(func() error { r.mem.Flush(uint64(off), n); return nil })
}

// Drain waits until all that was flushed by this goroutine is durable.
func (r *Region) Drain() error {
	if err := r.broken(); err != nil {
		return err
	}
	return r.fence()
}

// CopyNT stores p at off, past the cache where that is faster. It is durable after the next Drain. It is not undone by transactions.
func (r *Region) CopyNT(off Off, p []byte) error {
	if err := r.checkRange(off, uint64(len(p))); err != nil || len(p) == 0 {
		return err
	}
	return r.guard(func() error { r.mem.CopyNT(uint64(off), p); return nil })
}

func (r *Region) checkRange(off Off, n uint64) error {
	if p := r.failed.Load(); p != nil {
		return *p
	}
	if !r.inHeap(uint64(off), n) {
		return fmt.Errorf("range of %d bytes at %d: %w", n, uint64(off), ErrRange)
	}
	if r.readOnly {
		return ErrReadOnly
	}
	return nil
}

// Bytes is the memory of a range of the heap, valid until Close.
func (r *Region) Bytes(off Off, n uint64) ([]byte, error) {
	if err := r.broken(); err != nil {
		return nil, err
	}
	if !r.inHeap(uint64(off), n) {
		return nil, fmt.Errorf("range of %d bytes at %d: %w", n, uint64(off), ErrRange)
	}
	return r.mem.Bytes(uint64(off), n), nil
}

// OffsetOf is the place of a value that lies in the region.
func OffsetOf[T any](r *Region, p *T) (Off, error) {
	off, err := r.offsetOf(unsafe.Pointer(p), uint64(unsafe.Sizeof(*p)))
	return Off(off), err
}

func (r *Region) offsetOf(p unsafe.Pointer, n uint64) (uint64, error) {
	off := uint64(uintptr(p) - uintptr(r.mem.Base()))
	if !r.inHeap(off, n) {
		return 0, fmt.Errorf("address %p, %d bytes: %w", p, n, ErrRange)
	}
	return off, nil
}

type rootRecord struct{ Off, Size, Type uint64 }

// Root is the object by which everything else in the region is found. The first call allocates it, zeroed. Later calls must ask for a type that lies in memory as
// that one did; field names do not matter.
func Root[T any](r *Region) (p Ptr[T], err error) {
	if err := CheckType[T](); err != nil {
		return p, err
	}
	t := reflect.TypeFor[T]()
	size, typ := uint64(t.Size()), fingerprint(t)
	r.closing.Lock()
	defer r.closing.Unlock()
	if err := r.broken(); err != nil {
		return p, err
	}
	rec := (*rootRecord)(r.mem.At(rootAt))
	if rec.Off == 0 {
		err := r.Update(func(tx *Tx) error {
			off, err := tx.Alloc(size)
			if err != nil {
				return err
			}
			if err := tx.AddRanges(Range{rootAt, 24}); err != nil {
				return err
			}
			*rec = rootRecord{uint64(off), size, typ}
			return nil
		})
		return Ptr[T]{Off(rec.Off)}, err
	}
	err = r.guard(func() error {
		switch {
		case rec.Type != 0 && rec.Type != typ, rec.Size != size:
			return fmt.Errorf("%w: the root of %q is another type than %s", ErrType, r.info.Path, t)
		case !r.inHeap(rec.Off, rec.Size) || rec.Off%uint64(t.Align()) != 0:
			return fmt.Errorf("%w: root at %d, %d bytes", ErrCorrupt, rec.Off, rec.Size)
		}
		return nil
	})
	return Ptr[T]{Off(rec.Off)}, err
}
