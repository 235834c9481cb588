// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"github.com/nhybrid/nhybrid/snapshotter/control"
)

// with calls f with a client of the daemon and makes of its error one that a person understands.
func (a *app) with(f func(control.Client) error) error {
	if !filepath.IsAbs(a.address) {
		return usage(fmt.Sprintf("--address %q is not the absolute path of a socket", a.address))
	}
	client, done, err := control.Dial(a.address)
	if err != nil {
		return err
	}
	return errors.Join(a.explain(f(client)), done())
}

func (a *app) explain(err error) error {
	s, ok := status.FromError(err)
	if err == nil || !ok {
		return err
	}
	native := errgrpc.ToNative(err)
	if errdefs.IsUnavailable(native) {
		// The daemon says so too, of containerd. Only the socket tells which of the two is meant.
		c, dialErr := net.DialTimeout("unix", a.address, time.Second)
		if dialErr != nil {
			return fmt.Errorf("cannot reach the daemon at %s: is containerd-nhybrid-grpc running, and may you open its socket? (%s)", a.address, cause(dialErr.Error()))
		}
		_ = c.Close() // it has told what it was for
	}
	// gRPC's own words; the daemon says so too, of what it cannot do here.
	if m := s.Message(); errdefs.IsNotImplemented(native) && (strings.HasPrefix(m, "unknown service ") || strings.HasPrefix(m, "unknown method ")) {
		return fmt.Errorf("the daemon at %s does not know this request: is it older than nhybridctl? (%s)", a.address, s.Message())
	}
	return errors.New(s.Message())
}

// cause takes the system's word out of what wraps a failed connection.
func cause(message string) string {
	if i := strings.LastIndex(message, "connect: "); i >= 0 {
		return strings.TrimSuffix(message[i+len("connect: "):], "\"")
	}
	return message
}

// receive calls f for each message of a stream. The end of ctx, Ctrl-C that is, is no error.
func receive[T any](ctx context.Context, stream grpc.ServerStreamingClient[T], f func(*T) error) error {
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) || ctx.Err() != nil {
			return nil //nolint:nilerr // the user has seen enough
		}
		if err != nil {
			return err
		}
		if err := f(m); err != nil {
			return err
		}
	}
}

// images completes image references with those that the daemon knows, if it answers at once.
func (a *app) images(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, cancel := context.WithTimeout(c.Context(), time.Second)
	defer cancel()
	var names []string
	_ = a.with(func(client control.Client) error { // without an answer there is nothing to complete
		stream, err := client.List(ctx, &control.ListRequest{Namespace: a.namespace})
		if err != nil {
			return err
		}
		return receive(ctx, stream, func(s *control.Snapshot) error {
			names = append(names, s.GetImages()...)
			return nil
		})
	})
	slices.Sort(names)
	return slices.Compact(names), cobra.ShellCompDirectiveNoFileComp
}
