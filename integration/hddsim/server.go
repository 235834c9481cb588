// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hddsim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/signal"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// Names of the files in the FUSE directory.
const (
	diskName     = "disk"     // the device's bytes
	countersName = "counters" // Counters as JSON
	modelName    = "model"    // Model as JSON; writing changes it
	faultName    = "fault"    // Fault as JSON; writing changes it
	keepName     = "keep"     // writing a Keep makes a share of what is not flushed durable
)

// blockSize is the unit in which unflushed writes are kept.
const blockSize = 4096

// exitPowerCut is the exit status of a server whose power was cut.
const exitPowerCut = 9

// Counters are what the disk has been asked since it started.
type Counters struct {
	Reads        int64 `json:"reads"`
	ReadBytes    int64 `json:"readBytes"`
	Writes       int64 `json:"writes"`
	WrittenBytes int64 `json:"writtenBytes"`
	Flushes      int64 `json:"flushes"`
	// Seeks is how many reads and writes the model charged a seek for.
	Seeks int64 `json:"seeks"`
	// Volatile is the number of blocks of 4096 bytes that a power cut would lose now. Always 0 without
	// Options.Volatile.
	Volatile int64 `json:"volatile"`
	// Struck is the number of requests that failed or were held by a Fault.
	Struck int64 `json:"struck"`
}

// serve exports the image file as <dir>/disk until the process gets SIGTERM; on SIGUSR1 it exits at once with status 9,
// and in volatile mode all that was written since the last flush is lost. ready is called when the file is there.
// The process must do nothing else: a program that waits for the disk it serves waits forever.
func serve(img, dir string, model Model, volatile bool, faults *breaker, ready func()) error {
	f, err := os.OpenFile(img, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("open image: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	d := &disk{f: f, size: st.Size(), queue: queue{head: head{model: model}}, breaker: faults}
	if volatile {
		d.unflushed = map[int64][]byte{}
	}
	server, err := fs.Mount(dir, &root{disk: d}, &fs.Options{MountOptions: fuse.MountOptions{
		DirectMountStrict: true, AllowOther: true, FsName: "hddsim", Name: "hddsim",
		MaxWrite: 512 << 10, MaxReadAhead: 512 << 10,
		// Splicing needs pipes larger than the kernel grants, which go-fuse complains about at each request.
		DisableSplice: true,
	}})
	if err != nil {
		return fmt.Errorf("mount FUSE on %q: %w", dir, err)
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGUSR1, syscall.SIGTERM, syscall.SIGINT)
	go func() {
		for s := range signals {
			if s == syscall.SIGUSR1 {
				d.mu.Lock() // a flush that has begun is let through, none begins
				os.Exit(exitPowerCut)
			}
			_ = server.Unmount() // busy: whoever sent the signal has to unmount first
		}
	}()
	ready()
	server.Wait()
	return nil
}

// disk is the node of the device's bytes.
type disk struct {
	fs.Inode
	f     *os.File
	size  int64
	queue queue

	breaker *breaker

	reads, readBytes, writes, writtenBytes, flushes atomic.Int64

	mu        sync.Mutex
	unflushed map[int64][]byte // block offset to content; nil unless volatile
}

var (
	_ fs.NodeOpener    = (*disk)(nil)
	_ fs.NodeGetattrer = (*disk)(nil)
	_ fs.NodeSetattrer = (*disk)(nil)
	_ fs.NodeReader    = (*disk)(nil)
	_ fs.NodeWriter    = (*disk)(nil)
	_ fs.NodeFsyncer   = (*disk)(nil)
)

func (d *disk) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, fuse.FOPEN_KEEP_CACHE, 0
}

func (d *disk) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode, out.Size, out.Blocks, out.Blksize = 0o600, uint64(d.size), uint64(d.size/512), blockSize
	out.SetTimeout(time.Hour)
	return 0
}

func (d *disk) Setattr(ctx context.Context, f fs.FileHandle, _ *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	return d.Getattr(ctx, f, out)
}

func (d *disk) Read(ctx context.Context, _ fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	if errno := d.breaker.pass(ctx, Reads, int64(len(dest))); errno != 0 {
		return nil, errno
	}
	served := d.queue.submit(read, off, max(0, min(int64(len(dest)), d.size-off)))
	n, err := d.f.ReadAt(dest, off)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fs.ToErrno(err)
	}
	d.overlayUnflushed(dest[:n], off)
	d.reads.Add(1)
	d.readBytes.Add(int64(n))
	<-served.done
	return fuse.ReadResultData(dest[:n]), 0
}

// overlayUnflushed puts what the image does not have yet over what was read from it.
func (d *disk) overlayUnflushed(dest []byte, off int64) {
	if d.unflushed == nil {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	end := off + int64(len(dest))
	for b := off &^ (blockSize - 1); b < end; b += blockSize {
		if p, ok := d.unflushed[b]; ok {
			lo, hi := max(b, off), min(b+blockSize, end)
			copy(dest[lo-off:hi-off], p[lo-b:hi-b])
		}
	}
}

func (d *disk) Write(ctx context.Context, _ fs.FileHandle, data []byte, off int64) (uint32, syscall.Errno) {
	if off < 0 || off+int64(len(data)) > d.size {
		return 0, syscall.ENOSPC
	}
	if errno := d.breaker.pass(ctx, Writes, int64(len(data))); errno != 0 {
		return 0, errno
	}
	served := d.queue.submit(write, off, int64(len(data)))
	if err := d.store(data, off); err != nil {
		return 0, fs.ToErrno(err)
	}
	d.writes.Add(1)
	d.writtenBytes.Add(int64(len(data)))
	<-served.done
	return uint32(len(data)), 0
}

func (d *disk) store(data []byte, off int64) error {
	if d.unflushed == nil {
		_, err := d.f.WriteAt(data, off)
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	end := off + int64(len(data))
	for b := off &^ (blockSize - 1); b < end; b += blockSize {
		p, ok := d.unflushed[b]
		if !ok {
			p = make([]byte, blockSize)
			if _, err := d.f.ReadAt(p, b); err != nil && !errors.Is(err, io.EOF) {
				return err
			}
			d.unflushed[b] = p
		}
		lo, hi := max(b, off), min(b+blockSize, end)
		copy(p[lo-b:hi-b], data[lo-off:hi-off])
	}
	return nil
}

// Fsync is what a loop device makes of a flush of the block device.
func (d *disk) Fsync(ctx context.Context, _ fs.FileHandle, _ uint32) syscall.Errno {
	if errno := d.breaker.pass(ctx, Flushes, 0); errno != 0 {
		return errno
	}
	if err := d.persist(nil); err != nil {
		return fs.ToErrno(err)
	}
	d.flushes.Add(1)
	<-d.queue.submit(flush, 0, 0).done
	return 0
}

// persist writes unflushed blocks to the image: those that the caller chooses; nil: all, which then count as flushed.
func (d *disk) persist(choose func() bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	blocks := slices.Sorted(maps.Keys(d.unflushed)) // so that a seed chooses the same ones again
	for _, b := range blocks {
		if choose != nil && !choose() {
			continue
		}
		p := d.unflushed[b]
		if _, err := d.f.WriteAt(p[:min(blockSize, d.size-b)], b); err != nil {
			return err
		}
		if choose == nil {
			delete(d.unflushed, b)
		}
	}
	return nil
}

func (d *disk) counters() Counters {
	d.mu.Lock()
	defer d.mu.Unlock()
	_, struck := d.breaker.get()
	return Counters{
		Struck: struck, Reads: d.reads.Load(), ReadBytes: d.readBytes.Load(), Writes: d.writes.Load(),
		WrittenBytes: d.writtenBytes.Load(), Flushes: d.flushes.Load(), Seeks: d.queue.head.seekCount(), Volatile: int64(len(d.unflushed)),
	}
}

// waitUntil does not bother with what is below the granularity of a sleep; the model remembers it.
func waitUntil(t time.Time) {
	if wait := time.Until(t); wait > 50*time.Microsecond {
		time.Sleep(wait)
	}
}

// jsonFile is a file whose content is a value, as JSON, at the time of the open.
type jsonFile struct {
	fs.Inode
	get func() any
	set func([]byte) error // nil: read-only
}

var (
	_ fs.NodeOpener    = (*jsonFile)(nil)
	_ fs.NodeGetattrer = (*jsonFile)(nil)
	_ fs.NodeSetattrer = (*jsonFile)(nil)
	_ fs.NodeWriter    = (*jsonFile)(nil)
)

// jsonHandle is an open jsonFile.
type jsonHandle struct{ content []byte }

func (j *jsonFile) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	b, err := json.Marshal(j.get())
	if err != nil {
		return nil, 0, syscall.EIO
	}
	return &jsonHandle{append(b, '\n')}, fuse.FOPEN_DIRECT_IO, 0
}

func (h *jsonHandle) Read(_ context.Context, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	if off >= int64(len(h.content)) {
		return fuse.ReadResultData(nil), 0
	}
	return fuse.ReadResultData(dest[:copy(dest, h.content[off:])]), 0
}

func (j *jsonFile) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode = 0o400
	if j.set != nil {
		out.Mode = 0o600
	}
	return 0
}

// Setattr lets a shell's redirection truncate the file.
func (j *jsonFile) Setattr(ctx context.Context, f fs.FileHandle, _ *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	return j.Getattr(ctx, f, out)
}

func (j *jsonFile) Write(_ context.Context, _ fs.FileHandle, data []byte, _ int64) (uint32, syscall.Errno) {
	if j.set == nil {
		return 0, syscall.EACCES
	}
	if err := j.set(data); err != nil {
		return 0, syscall.EINVAL
	}
	return uint32(len(data)), 0
}

// root is the FUSE directory.
type root struct {
	fs.Inode
	disk *disk
}

func (r *root) OnAdd(ctx context.Context) {
	add := func(name string, node fs.InodeEmbedder, ino uint64) {
		r.AddChild(name, r.NewPersistentInode(ctx, node, fs.StableAttr{Mode: syscall.S_IFREG, Ino: ino}), false)
	}
	add(diskName, r.disk, 2)
	add(countersName, &jsonFile{get: func() any { return r.disk.counters() }}, 3)
	add(modelName, &jsonFile{
		get: func() any {
			r.disk.queue.head.mu.Lock()
			defer r.disk.queue.head.mu.Unlock()
			return r.disk.queue.head.model
		},
		set: func(b []byte) error {
			var m Model
			if err := json.Unmarshal(b, &m); err != nil {
				return err
			}
			r.disk.queue.head.setModel(m)
			return nil
		},
	}, 4)
	add(faultName, &jsonFile{
		get: func() any { f, _ := r.disk.breaker.get(); return f },
		set: func(b []byte) error {
			var f Fault
			if err := json.Unmarshal(b, &f); err != nil {
				return err
			}
			return r.disk.breaker.set(f)
		},
	}, 5)
	add(keepName, &jsonFile{
		get: func() any { return Keep{} },
		set: func(b []byte) error {
			var k Keep
			if err := json.Unmarshal(b, &k); err != nil {
				return err
			}
			random := rand.New(rand.NewPCG(k.Seed, k.Seed))
			return r.disk.persist(func() bool { return random.Float64() < k.Share })
		},
	}, 6)
}
