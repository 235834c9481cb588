// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// flusher keeps the HDD writing while packs grow. The kernel would leave their
// pages dirty for up to 30 s (vm.dirty_expire_centisecs), and the end of the pull
// would wait for all of them. One goroutine submits piece after piece and waits
// for each, so that it knows what the disk takes and what it still has to take.
type flusher struct {
	rates *Rates

	mu     sync.Mutex
	cond   *sync.Cond
	queue  []piece
	bytes  int64 // that are queued or being written
	failed map[*os.File]error
	closed bool
	done   chan struct{}
}

type piece struct {
	file *os.File
	off  int64
	n    int64
}

// write brings a piece to the disk, and returns when it is there. Only one piece is under way at a time: whoever syncs
// a file on the same disk, as containerd does two hundred times in a pull, waits behind it.
func (p piece) write() error {
	return unix.SyncFileRange(int(p.file.Fd()), p.off, p.n,
		unix.SYNC_FILE_RANGE_WAIT_BEFORE|unix.SYNC_FILE_RANGE_WRITE|unix.SYNC_FILE_RANGE_WAIT_AFTER)
}

func newFlusher(r *Rates) *flusher {
	f := &flusher{rates: r, failed: map[*os.File]error{}, done: make(chan struct{})}
	f.cond = sync.NewCond(&f.mu)
	go f.run()
	return f
}

// options have the pieces of a new pack written.
func (f *flusher) options() pack.WriterOptions {
	return pack.WriterOptions{Flushed: f.add}
}

func (f *flusher) add(file *os.File, off, n int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return
	}
	f.queue = append(f.queue, piece{file, off, n})
	f.bytes += n
	f.cond.Broadcast()
}

// Backlog is how many bytes of packs are written and not on the disk yet.
func (f *flusher) Backlog() int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.bytes
}

func (f *flusher) run() {
	defer close(f.done)
	for {
		f.mu.Lock()
		for len(f.queue) == 0 && !f.closed {
			f.cond.Wait()
		}
		if f.closed {
			f.mu.Unlock()
			return
		}
		p := f.queue[0]
		f.mu.Unlock()
		start := time.Now()
		err := p.write()
		if err == nil {
			f.rates.sawHDD(p.n, time.Since(start))
		}
		f.mu.Lock()
		f.queue = f.queue[1:]
		f.bytes -= p.n
		if err != nil {
			// sync_file_range(2) takes the error from the descriptor: a later fsync of
			// it would succeed and prove nothing.
			f.failed[p.file] = err
		}
		f.cond.Broadcast()
		f.mu.Unlock()
	}
}

// finish drops what is queued of a file, waits for the piece that is being
// written, and returns the error that writing it has had. The file may be closed then.
func (f *flusher) finish(file *os.File) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for {
		// The head may be under way.
		for i := 1; i < len(f.queue); i++ {
			if f.queue[i].file == file {
				f.bytes -= f.queue[i].n
				f.queue = append(f.queue[:i:i], f.queue[i+1:]...)
				i--
			}
		}
		if f.closed || len(f.queue) == 0 || f.queue[0].file != file {
			break
		}
		f.cond.Wait()
	}
	err := f.failed[file]
	delete(f.failed, file)
	return err
}

func (f *flusher) close() {
	f.mu.Lock()
	f.closed = true
	f.cond.Broadcast()
	f.mu.Unlock()
	<-f.done
}
