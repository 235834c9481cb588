// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/integration/bench/lab"
	"github.com/nhybrid/nhybrid/integration/image"
	"github.com/nhybrid/nhybrid/integration/image/catalog"
	"github.com/nhybrid/nhybrid/integration/thread"
)

// costRow is what the trace costs.
type costRow struct {
	// Opens per second, of the same files in turn, in containers: during a watched start, after it, and with the
	// overlayfs snapshotter. One value a round.
	Watched   []float64 `json:"opens_per_s_watched"`
	Unwatched []float64 `json:"opens_per_s_unwatched"`
	Overlay   []float64 `json:"opens_per_s_overlayfs"`
	// IdleCPUS is the processor time of the daemon in IdleS seconds in which nothing happened.
	IdleCPUS float64 `json:"idle_cpu_s"`
	IdleS    float64 `json:"idle_s"`
	// MemoryBytes is by how much the daemon's resident memory has grown while one start opened MemoryFiles files.
	MemoryBytes int64 `json:"memory_bytes"`
	MemoryFiles int   `json:"memory_files"`
}

// opensOf are the files that are opened in turn, manyFiles those for the daemon's memory.
const (
	opensOf        = 1000
	manyFiles      = 50_000
	manyFilesQuick = 2_000
	opensFor       = 400 * time.Millisecond
	opensRounds    = 5
)

// sleeper is an image of generated files whose program does nothing.
func sleeper(name string, files int) (catalog.Image, v1.Image, error) {
	config := v1.Config{Cmd: []string{"/bin/sleep", "2147483647"}}
	// Smaller files could stand in the metadata, where no start is traced (docs/store.md).
	img, err := image.Tiny(image.TinySpec{Runnable: true, Layers: []int64{int64(files) * 1000}, Files: files, Config: config})
	always := func(context.Context) error { return nil }
	return catalog.Image{Spec: image.Spec{Name: name, Config: config}, Ready: always}, img, err
}

func (b *bench) costs(ctx context.Context) (r *costRow, err error) {
	r = &costRow{MemoryFiles: manyFiles}
	if b.options.quick {
		r.MemoryFiles = manyFilesQuick
	}
	s, err := b.newStand(ctx, setup{size: b.deviceSize, overlay: true})
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil && ctx.Err() == nil {
			err = fmt.Errorf("%w%s", err, s.logs())
		}
		b.keepLogs(s, "costs")
		err = errors.Join(err, s.Close())
	}()
	few, fewImage, err := sleeper("few", opensOf)
	if err != nil {
		return nil, err
	}
	many, manyImage, err := sleeper("many", r.MemoryFiles)
	if err != nil {
		return nil, err
	}
	for name, img := range map[string]v1.Image{few.Name: fewImage, many.Name: manyImage} {
		if err := s.push(ctx, ref(name), img); err != nil {
			return nil, err
		}
		for _, v := range []string{hybrid, overlayNVM} {
			if err := s.places[v].pull(ctx, ref(name)); err != nil {
				return nil, err
			}
		}
	}
	if err := s.daemon.settled(ctx); err != nil {
		return nil, err
	}
	for round := range opensRounds {
		if err := r.opens(ctx, s, few, round); err != nil {
			return nil, err
		}
	}
	if _, err := s.daemon.migrate(ctx); err != nil {
		return nil, err
	}
	if err := r.memory(ctx, s, many); err != nil {
		return nil, err
	}
	if _, err := s.daemon.migrate(ctx); err != nil {
		return nil, err
	}
	return r, r.idle(ctx, s, b.options.idle)
}

// opens measures one container of each kind.
func (r *costRow) opens(ctx context.Context, s *stand, img catalog.Image, round int) (err error) {
	for _, v := range []string{overlayNVM, hybrid} {
		c, err := s.places[v].start(ctx, img, fmt.Sprintf("opens-%d", round), nil)
		if err != nil {
			return err
		}
		rate, err := openLoop(c.task.Pid(), opensOf, opensFor)
		if err == nil && v == overlayNVM {
			r.Overlay = append(r.Overlay, rate)
		}
		if err == nil && v == hybrid {
			r.Watched = append(r.Watched, rate)
			if _, err = s.daemon.recorded(ctx, c, img.Name, round+1); err == nil {
				rate, err = openLoop(c.task.Pid(), opensOf, opensFor)
				r.Unwatched = append(r.Unwatched, rate)
			}
		}
		if err = errors.Join(err, c.remove(ctx)); err != nil {
			return err
		}
	}
	return nil
}

// memory lets one start open many files.
func (r *costRow) memory(ctx context.Context, s *stand, img catalog.Image) (err error) {
	pid := s.places[hybrid].rig.Daemon.Pid()
	c, err := s.places[hybrid].start(ctx, img, "memory", nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.remove(ctx)) }()
	before, err := lab.MemoryOf(pid)
	if err != nil {
		return err
	}
	if _, err := openLoop(c.task.Pid(), r.MemoryFiles, 0); err != nil {
		return err
	}
	// All files are in the trace when the daemon has counted them.
	if err := await(ctx, func(ctx context.Context) error { return s.daemon.counts(ctx, "memory", r.MemoryFiles) }); err != nil {
		return err
	}
	after, err := lab.MemoryOf(pid)
	if err != nil {
		return err
	}
	r.MemoryBytes = after.RSS - before.RSS
	_, err = s.daemon.recorded(ctx, c, img.Name, 1)
	return err
}

// idle watches a daemon that has nothing to do.
func (r *costRow) idle(ctx context.Context, s *stand, long time.Duration) error {
	if err := s.daemon.settled(ctx); err != nil {
		return err
	}
	pid := s.places[hybrid].rig.Daemon.Pid()
	before, err := lab.CPUOf(pid)
	if err != nil {
		return err
	}
	begun := time.Now()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(long):
	}
	after, err := lab.CPUOf(pid)
	if err != nil {
		return err
	}
	r.IdleCPUS, r.IdleS = (after - before).Seconds(), time.Since(begun).Seconds()
	return nil
}

// openLoop opens and closes files of a container's root filesystem in turn, in its mount namespace: once each at least,
// and until the time is over. It returns opens per second.
func openLoop(pid uint32, files int, long time.Duration) (rate float64, err error) {
	thread.Run(func() { rate, err = openLoopHere(pid, files, long) })
	return rate, err
}

func openLoopHere(pid uint32, files int, long time.Duration) (float64, error) {
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/mnt", pid))
	if err != nil {
		return 0, fmt.Errorf("enter container: %w", err)
	}
	defer ns.Close()
	// A mount namespace can only be entered by a thread whose root and working directory are its own.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return 0, fmt.Errorf("enter container: %w", err)
	}
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNS); err != nil {
		return 0, fmt.Errorf("enter container: %w", err)
	}
	paths := make([]string, files)
	for i := range paths {
		paths[i] = fmt.Sprintf("/data/0/%d", i)
	}
	begun, opens := time.Now(), 0
	for opens == 0 || time.Since(begun) < long {
		for _, path := range paths {
			fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				return 0, fmt.Errorf("open %q in container: %w", path, err)
			}
			_ = unix.Close(fd)
			opens++
		}
	}
	return float64(opens) / time.Since(begun).Seconds(), nil
}
