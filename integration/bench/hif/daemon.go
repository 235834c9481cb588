// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"

	"github.com/nhybrid/nhybrid/hif/profile"
	"github.com/nhybrid/nhybrid/integration/rig"
	"github.com/nhybrid/nhybrid/snapshotter/control"
)

// daemon asks nhybrid and steers it.
type daemon struct {
	rig    *rig.Rig
	client control.Client
	close  func() error
}

func newDaemon(g *rig.Rig) (*daemon, error) {
	client, closeConnection, err := control.Dial(g.ControlSocket())
	if err != nil {
		return nil, err
	}
	return &daemon{g, client, closeConnection}, nil
}

// await asks until the answer is nil.
func await(ctx context.Context, ask func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return rig.Await(ctx, ask)
}

// settled waits until no work of the snapshotter itself is left: captures, trees, removals, and starts that are watched.
// Copying home is the migration's.
func (d *daemon) settled(ctx context.Context) error {
	return await(ctx, func(ctx context.Context) error {
		starts, err := d.watched(ctx)
		if err != nil {
			return err
		}
		if len(starts) > 0 {
			return fmt.Errorf("the start of %s is watched", starts[0].GetContainer())
		}
		s, err := d.client.Status(ctx, &control.StatusRequest{})
		if err != nil {
			return fmt.Errorf("ask the daemon for its status: %w", err)
		}
		for _, q := range s.GetQueues() {
			if n := q.GetWaiting() + q.GetRunning(); n > 0 && q.GetName() != "write-back" {
				return fmt.Errorf("%d in queue %q", n, q.GetName())
			}
		}
		return nil
	})
}

// profile is what the daemon knows of an image; nil: nothing.
func (d *daemon) profile(ctx context.Context, image string) (*profile.Profile, error) {
	stream, err := d.client.GetProfile(ctx, &control.ImageRequest{Image: d.rig.Ref(ref(image)), Namespace: d.rig.Namespace})
	if err != nil {
		return nil, err
	}
	var data bytes.Buffer
	for {
		part, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			if err = errgrpc.ToNative(err); errdefs.IsNotFound(err) {
				return nil, nil
			}
			return nil, fmt.Errorf("ask for the profile of image %s: %w", image, err)
		}
		data.Write(part.GetData())
	}
	p, err := profile.Decode(&data)
	if err != nil {
		return nil, fmt.Errorf("profile of image %s: %w", image, err)
	}
	return &p, nil
}

// starts is how many starts of an image the daemon has in its book.
func (d *daemon) starts(ctx context.Context, image string) (int, error) {
	p, err := d.profile(ctx, image)
	if err != nil || p == nil {
		return 0, err
	}
	return p.Starts + p.Incomplete, nil
}

// ready ends the watch of a start, of which it gets the container or the snapshot.
func (d *daemon) ready(ctx context.Context, id string) error {
	_, err := d.client.Ready(ctx, &control.ReadyRequest{Container: id, Namespace: d.rig.Namespace})
	if err == nil {
		return nil
	}
	// A start that is over has no watch any more.
	if err = errgrpc.ToNative(err); errdefs.IsNotFound(err) || errdefs.IsFailedPrecondition(err) {
		return nil
	}
	return fmt.Errorf("end the watch of container %s: %w", id, err)
}

// recorded ends the watch of a start and waits until it is in the book as the one with the given number.
func (d *daemon) recorded(ctx context.Context, s *started, image string, number int) (p *profile.Profile, err error) {
	if err := d.ready(ctx, s.id); err != nil {
		return nil, err
	}
	err = await(ctx, func(ctx context.Context) (err error) {
		if p, err = d.profile(ctx, image); err != nil {
			return err
		}
		if p == nil || p.Starts+p.Incomplete < number {
			return fmt.Errorf("start %d of image %s is not in the book", number, image)
		}
		return nil
	})
	return p, err
}

// migration is what the engine did: the wait for it to be done, and bytes.
type migration struct {
	Seconds   float64 `json:"seconds"`
	HomeBytes int64   `json:"home_bytes"`
	DownBytes int64   `json:"down_bytes"`
	UpBytes   int64   `json:"up_bytes"`
	Failed    int64   `json:"failed"`
	LastError string  `json:"last_error,omitempty"`
}

// moved is what the engine has done since the daemon started.
func moved(s *control.MigrationState) migration {
	m := migration{Failed: s.GetFailed(), LastError: s.GetLastError()}
	for _, dir := range s.GetDirections() {
		switch dir.GetName() {
		case "home":
			m.HomeBytes = dir.GetBytesDone()
		case "down":
			m.DownBytes = dir.GetBytesDone()
		case "up":
			m.UpBytes = dir.GetBytesDone()
		}
	}
	return m
}

// migrate lets the engine work without limits until the tiers look like the plan. It tells how long that took, and what
// was moved since the daemon started: some of it before anybody asked.
func (d *daemon) migrate(ctx context.Context) (migration, error) {
	begun := time.Now()
	if _, err := d.client.MigrateNow(ctx, &control.MigrationRequest{}); err != nil {
		return migration{}, fmt.Errorf("migrate now: %w", err)
	}
	var state *control.MigrationState
	err := await(ctx, func(ctx context.Context) (err error) {
		if state, err = d.client.Migration(ctx, &control.MigrationRequest{}); err != nil {
			return err
		}
		left := int64(0)
		for _, dir := range state.GetDirections() {
			left += dir.GetFilesLeft()
		}
		if state.GetState() != "idle" || left > 0 {
			return fmt.Errorf("migration is %s (%s), %d files left; last error %q", state.GetState(), state.GetWhy(), left, state.GetLastError())
		}
		return nil
	})
	m := moved(state)
	m.Seconds = time.Since(begun).Seconds()
	return m, err
}

// watched are the starts that are under way.
func (d *daemon) watched(ctx context.Context) ([]*control.OpenStart, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := d.client.Top(ctx, &control.TopRequest{})
	if err != nil {
		return nil, err
	}
	sample, err := stream.Recv()
	if err != nil {
		return nil, fmt.Errorf("ask for open starts: %w", err)
	}
	return sample.GetStarts(), nil
}

// counts says if the watch of a container has so many files.
func (d *daemon) counts(ctx context.Context, container string, files int) error {
	starts, err := d.watched(ctx)
	if err != nil {
		return err
	}
	for _, s := range starts {
		if s.GetContainer() == container {
			if s.GetFiles() < int64(files) {
				return fmt.Errorf("the watch of container %s has %d of %d files", container, s.GetFiles(), files)
			}
			return nil
		}
	}
	return fmt.Errorf("no watch of container %s", container)
}
