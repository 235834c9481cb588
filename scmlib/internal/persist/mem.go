// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package persist

import (
	"fmt"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Way is how stores of a Mem are made durable.
type Way uint8

// Lines flushes cache lines and fences; FenceOnly leaves the flush to the platform (eADR) or to nobody (DRAM); Pages calls msync.
const (
	Lines Way = iota
	FenceOnly
	Pages
)

// Hook sees what the library does to its memory, in order. Tests use it to record the stream, to leave parts of it out, and to enumerate the
// states a crash may leave. In production it is nil: one compare and a branch that is never taken.
type Hook interface {
	Store(off uint64)         // an aligned 8-byte store, ordered among the others
	Copy(off, n uint64)       // stores whose order inside the range is not known
	NT(off, n uint64)         // stores past the cache: durable at the next fence, without a flush
	Flush(off, n uint64) bool // false leaves the flush out
	Fence() bool              // false leaves the fence out
	Verify(ok bool) bool      // the result of a checksum, and what the library shall believe
}

// Mem is mapped memory. Offsets are not checked here: callers have done so. Concurrent use is as safe as that of the bytes themselves;
// Flush, Fence and Persist may be called at any time.
type Mem struct {
	base unsafe.Pointer
	size uint64
	way  Way
	insn Insn
	hook Hook
	page *pages
}

// pages remembers what msync has to write. Fence holds the lock while the kernel writes, so that a caller whose pages another one has taken
// waits for them.
type pages struct {
	mu     sync.Mutex
	lo, hi uint64
	err    error
	count  atomic.Uint64
}

// NewMem is memory at b. The way and the instruction are the caller's word about it.
func NewMem(b []byte, way Way, insn Insn, h Hook) *Mem {
	m := &Mem{base: unsafe.Pointer(unsafe.SliceData(b)), size: uint64(len(b)), way: way, insn: insn, hook: h}
	switch way {
	case Pages:
		m.page = &pages{lo: ^uint64(0)}
	case FenceOnly:
		m.insn = None
	}
	return m
}

// Size in bytes.
func (m *Mem) Size() uint64 { return m.size }

// Base is the address of offset 0.
func (m *Mem) Base() unsafe.Pointer { return m.base }

// At is the address of an offset.
func (m *Mem) At(off uint64) unsafe.Pointer { return unsafe.Add(m.base, off) }

// Bytes is the memory [off, off+n).
func (m *Mem) Bytes(off, n uint64) []byte { return unsafe.Slice((*byte)(m.At(off)), n) }

// Load64 reads an aligned word.
func (m *Mem) Load64(off uint64) uint64 { return atomic.LoadUint64((*uint64)(m.At(off))) }

// Store64 writes an aligned word: the largest store that no crash tears.
func (m *Mem) Store64(off, v uint64) {
	*(*uint64)(m.At(off)) = v
	if m.hook != nil {
		m.hook.Store(off)
	}
}

// Or64 sets bits of a word that others change at the same time.
func (m *Mem) Or64(off, mask uint64) {
	atomic.OrUint64((*uint64)(m.At(off)), mask)
	if m.hook != nil {
		m.hook.Store(off)
	}
}

// AndNot64 clears bits of a word that others change at the same time.
func (m *Mem) AndNot64(off, mask uint64) {
	atomic.AndUint64((*uint64)(m.At(off)), ^mask)
	if m.hook != nil {
		m.hook.Store(off)
	}
}

// Copy stores p at off, through the cache.
func (m *Mem) Copy(off uint64, p []byte) {
	copy(m.Bytes(off, uint64(len(p))), p)
	if m.hook != nil {
		m.hook.Copy(off, uint64(len(p)))
	}
}

// Zero clears [off, off+n), through the cache.
func (m *Mem) Zero(off, n uint64) {
	clear(m.Bytes(off, n))
	if m.hook != nil {
		m.hook.Copy(off, n)
	}
}

// chunk bounds one call of assembly, which the scheduler cannot interrupt: 64 KiB take about 12 µs.
const chunk = 64 << 10

// Flush starts writing [off, off+n) back. It is complete after the next Fence.
func (m *Mem) Flush(off, n uint64) {
	if n == 0 || m.hook != nil && !m.hook.Flush(off, n) {
		return
	}
	switch m.way {
	case Lines:
		for n > chunk {
			flush(m.insn, m.At(off), chunk)
			off, n = off+chunk, n-chunk
		}
		flush(m.insn, m.At(off), uintptr(n))
	case Pages:
		m.page.mu.Lock()
		m.page.lo, m.page.hi = min(m.page.lo, off), max(m.page.hi, off+n)
		m.page.mu.Unlock()
	}
}

// Fence waits until all that this goroutine flushed before is durable, and orders it before all stores that follow.
// It fails only where msync is used. The failure stays: the kernel may have dropped the pages.
func (m *Mem) Fence() error {
	if m.hook != nil && !m.hook.Fence() {
		return nil
	}
	if m.way != Pages {
		fence()
		return nil
	}
	return m.page.sync(m)
}

func (p *pages) sync(m *Mem) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err != nil || p.hi == 0 {
		return p.err
	}
	lo, hi := p.lo&^4095, min((p.hi+4095)&^4095, m.size)
	p.lo, p.hi = ^uint64(0), 0
	p.count.Add(1)
	// One call from the first to the last: the kernel finds the dirty pages between them cheaply, and pays for a journal commit once.
	if err := unix.Msync(m.Bytes(lo, hi-lo), unix.MS_SYNC); err != nil {
		p.err = fmt.Errorf("msync %d bytes at offset %d: %w", hi-lo, lo, err)
	}
	return p.err
}

// Syncs counts the calls of msync.
func (m *Mem) Syncs() uint64 {
	if m.page == nil {
		return 0
	}
	return m.page.count.Load()
}

// Persist is Flush and Fence in one call of assembly.
func (m *Mem) Persist(off, n uint64) error {
	if m.hook == nil && m.way == Lines && n-1 < chunk {
		persistLines(m.insn, m.At(off), uintptr(n))
		return nil
	}
	m.Flush(off, n)
	return m.Fence()
}

// Traced tells whether a hook is set.
func (m *Mem) Traced() bool { return m.hook != nil }

// Verify passes the result of a checksum through the hook.
func (m *Mem) Verify(ok bool) bool {
	if m.hook != nil {
		return m.hook.Verify(ok)
	}
	return ok
}

// CopyNT stores p at off and starts writing it back, past the cache if p is long. It is durable after the next Fence.
func (m *Mem) CopyNT(off uint64, p []byte) {
	n := uint64(len(p))
	if m.way == Pages || n < ntThreshold() {
		m.Copy(off, p)
		m.Flush(off, n)
		return
	}
	head := min(-off&15, n) // MOVNTDQ wants 16-byte alignment
	tail := (n - head) & 7
	body := n - head - tail
	if head > 0 {
		m.Copy(off, p[:head])
		m.Flush(off, head)
	}
	for at := uint64(0); at < body; at += chunk {
		k := min(chunk, body-at)
		ntcopy(m.At(off+head+at), unsafe.Pointer(&p[head+at]), uintptr(k))
	}
	if m.hook != nil {
		m.hook.NT(off+head, body)
	}
	if tail > 0 {
		m.Copy(off+n-tail, p[n-tail:])
		m.Flush(off+n-tail, tail)
	}
}
