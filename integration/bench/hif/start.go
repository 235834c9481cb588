// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"

	"github.com/nhybrid/nhybrid/integration/bench/lab"
	"github.com/nhybrid/nhybrid/integration/image/catalog"
	"github.com/nhybrid/nhybrid/integration/image/ready"
)

const (
	// interval is how often a container is asked if it is ready, and so the resolution of the times.
	interval = 2 * time.Millisecond
	// patience bounds what only an error could hold up.
	patience = 3 * time.Minute
)

// start is how long a container took to be ready.
type start struct {
	// ReadyS is seconds from the request for its snapshot to its readiness.
	ReadyS float64 `json:"ready_s"`
	// Reads of the disk that the snapshots may stand on, meanwhile.
	Reads     int64 `json:"hdd_reads"`
	ReadBytes int64 `json:"hdd_read_bytes"`
}

// started is a container that is ready, or a program that has ended.
type started struct {
	start
	place     *place
	id        string
	container client.Container
	task      client.Task
	ended     <-chan client.ExitStatus
}

// output takes what a program writes.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

// maxOutput bounds it.
const maxOutput = 1 << 20

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.b.Len() < maxOutput {
		o.b.Write(p)
	}
	return len(p), nil
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// ref is the name of an image in the registries.
func ref(name string) string { return "bench/" + name + ":1" }

// start makes a container of an image that was pulled and waits until it is ready. between, if set, is called with the
// process that is about to become the program.
func (p *place) start(ctx context.Context, img catalog.Image, id string, between func(pid int) error) (_ *started, err error) {
	c, err := p.rig.Client()
	if err != nil {
		return nil, err
	}
	ctx = p.rig.Context(ctx)
	own, err := c.GetImage(ctx, p.rig.Ref(ref(img.Name)))
	if err != nil {
		return nil, err
	}
	var before lab.Counters
	if p.disk != nil {
		if before, err = lab.CountersOf(p.disk.Mountpoint()); err != nil {
			return nil, err
		}
	}
	s := &started{place: p, id: id}
	said := &output{}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("start container %s of image %s with %s: %w; it said %.1000q", id, img.Name, p.variant, err, said), s.remove(ctx))
		}
	}()

	begun := time.Now()
	// The spec comes after the snapshot: it looks users up there.
	s.container, err = c.NewContainer(ctx, id, client.WithImage(own), client.WithSnapshotter(p.snapshotter),
		client.WithNewSnapshot(id, own), client.WithNewSpec(oci.WithImageConfig(own), oci.WithHostname(id)))
	if err != nil {
		return nil, err
	}
	if s.task, err = s.container.NewTask(ctx, cio.NewCreator(cio.WithStreams(nil, said, said))); err != nil {
		return nil, err
	}
	if s.ended, err = s.task.Wait(ctx); err != nil {
		return nil, err
	}
	if between != nil {
		if err := between(int(s.task.Pid())); err != nil {
			return nil, err
		}
	}
	if err := s.task.Start(ctx); err != nil {
		return nil, err
	}
	if err := s.await(ctx, img, said); err != nil {
		return nil, err
	}
	s.ReadyS = time.Since(begun).Seconds()
	if p.disk != nil {
		after, err := lab.CountersOf(p.disk.Mountpoint())
		if err != nil {
			return nil, err
		}
		d := after.Minus(before)
		s.Reads, s.ReadBytes = d.Reads, d.ReadBytes
	}
	return s, nil
}

func (s *started) await(ctx context.Context, img catalog.Image, said *output) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if img.Ready == nil {
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for the program's end: %w", ctx.Err())
		case status := <-s.ended:
			s.ended = nil
			s.task.IO().Wait() // what it wrote may still be on its way
			if status.Error() != nil || status.ExitCode() != 0 {
				return fmt.Errorf("the program ended with status %d: %w", status.ExitCode(), status.Error())
			}
			if !strings.Contains(said.String(), img.Output) {
				return fmt.Errorf("the program did not write %q", img.Output)
			}
			return nil
		}
	}
	answered := make(chan error, 1)
	go func() { answered <- ready.Await(ctx, int(s.task.Pid()), img.Ready, interval) }()
	select {
	case err := <-answered:
		return err
	case status := <-s.ended:
		s.ended = nil
		cancel()
		return fmt.Errorf("the program ended with status %d before it was ready: %w", status.ExitCode(), <-answered)
	}
}

// kill ends the program, if it runs.
func (s *started) kill(ctx context.Context) error {
	if s.task == nil || s.ended == nil {
		return nil
	}
	ctx = s.place.rig.Context(ctx)
	if err := s.task.Kill(ctx, 9, client.WithKillAll); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("kill container %s: %w", s.id, err)
	}
	select {
	case <-s.ended:
		s.ended = nil
		return nil
	case <-time.After(patience):
		return fmt.Errorf("container %s did not end", s.id)
	}
}

// remove ends the program and removes the container with its snapshot.
func (s *started) remove(ctx context.Context) error {
	ctx = s.place.rig.Context(context.WithoutCancel(ctx))
	errs := []error{s.kill(ctx)}
	if s.task != nil {
		if _, err := s.task.Delete(ctx, client.WithProcessKill); err != nil && !errdefs.IsNotFound(err) {
			errs = append(errs, fmt.Errorf("remove task %s: %w", s.id, err))
		}
		s.task = nil
	}
	if s.container != nil {
		if err := s.container.Delete(ctx, client.WithSnapshotCleanup); err != nil && !errdefs.IsNotFound(err) {
			errs = append(errs, fmt.Errorf("remove container %s: %w", s.id, err))
		}
		s.container = nil
	}
	return errors.Join(errs...)
}

// collect has containerd remove what nothing refers to any more, and waits for that: snapshots go after the call that
// removes them.
func (p *place) collect(ctx context.Context) error {
	c, err := p.rig.Client()
	if err != nil {
		return err
	}
	ctx = p.rig.Context(ctx)
	l, err := c.LeasesService().Create(ctx, leases.WithRandomID())
	if err == nil {
		err = c.LeasesService().Delete(ctx, l, leases.SynchronousDelete)
	}
	if err != nil {
		return fmt.Errorf("have containerd collect garbage: %w", err)
	}
	return nil
}
