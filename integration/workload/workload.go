// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package workload uses the files of an image in every way in which files are used, and checks every byte of them.
package workload

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Bytes are n bytes that depend on the seed alone and do not compress.
func Bytes(seed uint64, n int) []byte {
	var key [32]byte
	for i := range 8 {
		key[i] = byte(seed >> (8 * i))
	}
	b := make([]byte, n)
	_, _ = rand.NewChaCha8(key).Read(b) // never fails
	return b
}

// File is a file of which every byte is known.
type File struct {
	Path string // absolute, as the workload sees it
	Seed uint64
	Size int
	// Program: it is a copy of busybox, found by its name; the content is what another copy has.
	Program bool
}

// Result counts what was done and what was wrong.
type Result struct {
	Reads, Pieces, Maps, Execs, Held int
	Bytes                            int64
	Errors                           []string // the first hundred
}

// A job holds all that one goroutine knows.
type job struct {
	files    []File
	content  map[string][]byte
	programs []string
	random   *rand.Rand
	Result
}

// Once reads every file whole.
func Once(files []File) Result {
	j := &job{}
	for _, f := range files {
		if f.Program {
			j.note(f.Path, j.execute(f.Path))
			continue
		}
		j.note(f.Path, j.read(f.Path, Bytes(f.Seed, f.Size)))
	}
	return j.Result
}

// Run uses files at random until the context ends, in so many threads.
func Run(ctx context.Context, files []File, threads int) Result {
	content := map[string][]byte{}
	var programs []string
	var data []File
	for _, f := range files {
		if f.Program {
			programs = append(programs, f.Path)
			continue
		}
		data = append(data, f)
		content[f.Path] = Bytes(f.Seed, f.Size)
	}
	jobs := make([]*job, threads)
	var all sync.WaitGroup
	for i := range jobs {
		j := &job{files: data, content: content, programs: programs, random: rand.New(rand.NewPCG(uint64(i), uint64(time.Now().UnixNano())))}
		jobs[i] = j
		all.Go(func() { j.loop(ctx) })
	}
	all.Wait()
	var sum Result
	for _, j := range jobs {
		sum.Reads, sum.Pieces, sum.Maps = sum.Reads+j.Reads, sum.Pieces+j.Pieces, sum.Maps+j.Maps
		sum.Execs, sum.Held, sum.Bytes = sum.Execs+j.Execs, sum.Held+j.Held, sum.Bytes+j.Bytes
		sum.Errors = append(sum.Errors, j.Errors...)
	}
	return sum
}

func (j *job) note(path string, err error) {
	if err != nil && len(j.Errors) < 100 {
		j.Errors = append(j.Errors, fmt.Sprintf("%s %s: %v", time.Now().UTC().Format("15:04:05.000"), path, err))
	}
}

func (j *job) loop(ctx context.Context) {
	var held []*held
	for ctx.Err() == nil {
		f := j.files[j.random.IntN(len(j.files))]
		want := j.content[f.Path]
		var err error
		switch k := j.random.IntN(100); {
		case k < 40:
			err = j.read(f.Path, want)
		case k < 60:
			err = j.pieces(f.Path, want)
		case k < 85:
			err = j.mapped(f.Path, want)
		case k < 90 && len(j.programs) > 0:
			f.Path = j.programs[j.random.IntN(len(j.programs))]
			err = j.execute(f.Path)
		default:
			// Open and mapped files outlast many moves.
			h, e := hold(f.Path, want)
			if err = e; e == nil {
				held = append(held, h)
			}
			if len(held) > 50 {
				i := j.random.IntN(len(held))
				j.note(held[i].path, errors.Join(held[i].check(), held[i].close()))
				held = slices.Delete(held, i, i+1)
				j.Held++
			}
		}
		j.note(f.Path, err)
		// With the disk's content known to be right, throw the cache of the file away now and then, so that it is read again.
		if j.random.IntN(4) == 0 {
			j.note(f.Path, drop(f.Path))
		}
	}
	for _, h := range held {
		j.note(h.path, errors.Join(h.check(), h.close()))
		j.Held++
	}
}

func (j *job) read(path string, want []byte) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	j.Reads++
	j.Bytes += int64(len(b))
	return same(b, want)
}

func same(got, want []byte) error {
	if bytes.Equal(got, want) {
		return nil
	}
	if len(got) != len(want) {
		return fmt.Errorf("%d bytes, not %d", len(got), len(want))
	}
	first, wrong := -1, 0
	for i := range got {
		if got[i] != want[i] {
			if first < 0 {
				first = i
			}
			wrong++
		}
	}
	return fmt.Errorf("%d of %d bytes are wrong, the first at %d", wrong, len(got), first)
}

func (j *job) pieces(path string, want []byte) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	for range 10 {
		off := j.random.IntN(len(want))
		b := make([]byte, min(1+j.random.IntN(20000), len(want)-off))
		if _, err := f.ReadAt(b, int64(off)); err != nil {
			return err
		}
		if err := same(b, want[off:off+len(b)]); err != nil {
			return fmt.Errorf("piece at %d: %w", off, err)
		}
		j.Pieces++
		j.Bytes += int64(len(b))
	}
	return nil
}

func (j *job) mapped(path string, want []byte) error {
	h, err := hold(path, want)
	if err != nil {
		return err
	}
	j.Maps++
	j.Bytes += int64(len(want))
	return errors.Join(h.check(), h.close())
}

func (j *job) execute(path string) error {
	out, err := exec.Command(path, "echo", "it", "runs").CombinedOutput()
	if err != nil {
		return err
	}
	j.Execs++
	if string(out) != "it runs\n" {
		return fmt.Errorf("it said %q", out)
	}
	return nil
}

// held is a file that is open and mapped.
type held struct {
	path string
	want []byte
	file *os.File
	mem  []byte
}

func hold(path string, want []byte) (*held, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, len(want), unix.PROT_READ|unix.PROT_EXEC, unix.MAP_SHARED)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("map: %w", err), f.Close())
	}
	return &held{path, want, f, mem}, nil
}

func (h *held) check() error {
	if err := same(h.mem, h.want); err != nil {
		return fmt.Errorf("mapped: %w", err)
	}
	b := make([]byte, len(h.want))
	if _, err := h.file.ReadAt(b, 0); err != nil {
		return err
	}
	return same(b, h.want)
}

func (h *held) close() error { return errors.Join(unix.Munmap(h.mem), h.file.Close()) }

func drop(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED), f.Close())
}
