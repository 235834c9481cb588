// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/nhybrid/nhybrid/integration/rig"
	"github.com/nhybrid/nhybrid/snapshotter/control"
)

// watcher asks the daemon until it gives the answer that is waited for.
type watcher struct {
	client control.ControlClient
	close  func() error
}

func newWatcher(g *rig.Rig) (*watcher, error) {
	client, done, err := control.Dial(g.ControlSocket())
	if err != nil {
		return nil, err
	}
	return &watcher{client, done}, nil
}

// patience bounds the wait for background work, which otherwise only an error in the daemon could hold up.
const patience = 3 * time.Minute

// await asks for the status every 10 ms: that is the resolution of what is measured by it.
func (w *watcher) await(ctx context.Context, satisfied func(*control.StatusResponse) error) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return rig.Await(ctx, func(ctx context.Context) error {
		status, err := w.client.Status(ctx, &control.StatusRequest{})
		if err != nil {
			return fmt.Errorf("ask the daemon for its status: %w", err)
		}
		return satisfied(status)
	})
}

// awaitDurable waits until the daemon vouches for an image of so many layers: it has committed all of them, and all of
// their data and metadata are on a device. What that takes is the daemon's business; only this function knows how to ask.
func (w *watcher) awaitDurable(ctx context.Context, layers int) error {
	return w.await(ctx, allDurable(layers))
}

func allDurable(layers int) func(*control.StatusResponse) error {
	return func(s *control.StatusResponse) error {
		if s.GetCommitted() < int64(layers) || s.GetNotDurable() > 0 {
			return fmt.Errorf("of %d layers %d are committed, %d of them not durable", layers, s.GetCommitted(), s.GetNotDurable())
		}
		return nil
	}
}

// settled is when no work waits but that of copying layers home.
func settled(s *control.StatusResponse) error {
	for _, q := range s.GetQueues() {
		if n := q.GetWaiting() + q.GetRunning(); n > 0 && q.GetName() != "write-back" {
			return fmt.Errorf("%d in queue %q", n, q.GetName())
		}
	}
	return nil
}

// awaitHome waits until every layer stands on HDD.
func (w *watcher) awaitHome(ctx context.Context, namespace string) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return rig.Await(ctx, func(ctx context.Context) error {
		all, err := w.client.List(ctx, &control.ListRequest{Namespace: namespace})
		if err != nil {
			return err
		}
		for {
			s, err := all.Recv()
			if errors.Is(err, io.EOF) {
				return nil
			}
			if err != nil {
				return err
			}
			if s.GetKind() == "committed" && s.GetState() != "home" {
				return fmt.Errorf("layer %s is %s, its pack is not known to be whole", s.GetLayer(), s.GetState())
			}
		}
	})
}
