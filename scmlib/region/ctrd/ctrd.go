// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package ctrd joins the store of regions to containerd: it tells one container from another of the same id, removes the regions of containers that are
// gone, and commits a container with its region to an image.
package ctrd

import (
	"context"
	"fmt"
	"time"

	eventsapi "github.com/containerd/containerd/api/events"
	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/grpc"

	"github.com/nhybrid/nhybrid/scmlib/region"
)

// Identify is for [region.Options]: a container is another when it was made at another time. containerd does not run when the daemon starts, maybe:
// connect gives the client, or an error.
func Identify(connect func() (*client.Client, error)) func(context.Context, string, string) (string, error) {
	return func(ctx context.Context, namespace, id string) (string, error) {
		c, err := connect()
		if err != nil {
			return "", fmt.Errorf("ask containerd for container %s: %w", id, err)
		}
		ctx, cancel := context.WithTimeout(namespaces.WithNamespace(ctx, namespace), 10*time.Second)
		defer cancel()
		// It asks because a container of it is starting, so containerd is there: a
		// connection that was refused before that must not fail the start.
		conn, ok := c.Conn().(grpc.ClientConnInterface)
		if !ok {
			return "", fmt.Errorf("ask containerd for container %s: connection of type %T: %w", id, c.Conn(), errdefs.ErrNotImplemented)
		}
		r, err := containersapi.NewContainersClient(conn).Get(ctx, &containersapi.GetContainerRequest{ID: id}, grpc.WaitForReady(true))
		if err != nil {
			return "", fmt.Errorf("ask containerd for container %s: %w", id, errdefs.Resolve(errgrpc.ToNative(err)))
		}
		return r.GetContainer().GetCreatedAt().AsTime().Format(time.RFC3339Nano), nil
	}
}

// Watch releases regions when their containers are removed, until ctx ends. Whenever it (again) hears containerd's events, it asks for all containers, so that none
// is missed.
func Watch(ctx context.Context, connect func() (*client.Client, error), store *region.Store) {
	for wait := time.Second; ; wait = min(2*wait, time.Minute) {
		began := time.Now()
		err := follow(ctx, connect, store)
		if ctx.Err() != nil {
			return
		}
		if time.Since(began) > time.Minute {
			wait = time.Second
		}
		log.G(ctx).WithError(err).WithField("retry", wait).Debug("containerd's events for regions")
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

func follow(ctx context.Context, connect func() (*client.Client, error), store *region.Store) error {
	c, err := connect()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// A container whose record was deleted before its process ended is released at the end of that.
	ch, errs := c.Subscribe(ctx, `topic=="/containers/delete"`, `topic=="/tasks/exit"`)
	if err := store.Reconcile(ctx); err != nil {
		return err
	}
	// Once more now and then, for what failed.
	again := time.NewTicker(5 * time.Minute)
	defer again.Stop()
	for {
		select {
		case err := <-errs:
			return err
		case <-again.C:
			if err := store.Reconcile(ctx); err != nil {
				log.G(ctx).WithError(err).Warn("regions of containers that are gone")
			}
		case e := <-ch:
			if id, ok := maybeGone(e); ok {
				if err := store.Release(ctx, e.Namespace, id); err != nil {
					log.G(ctx).WithError(err).WithFields(log.Fields{"container": id, "namespace": e.Namespace}).Warn("region of a container that is gone")
				}
			}
		}
	}
}

// maybeGone returns the container that an event is about. The store asks whether it is gone.
func maybeGone(e *events.Envelope) (string, bool) {
	if e == nil {
		return "", false
	}
	v, err := typeurl.UnmarshalAny(e.Event)
	if err != nil {
		return "", false
	}
	switch v := v.(type) {
	case *eventsapi.ContainerDelete:
		return v.ID, true
	case *eventsapi.TaskExit:
		return v.ContainerID, true
	}
	return "", false
}
