// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package pull tells what containerd downloads right now, as values for package placement.
//
// It only reads: containerd's content store, its image store and its events, over containerd's socket, and blobs that
// containerd has lost, in registries. It must never be called from
// within a snapshotter's Commit, which containerd calls inside its own metadata transaction.
package pull

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	eventtypes "github.com/containerd/containerd/api/events"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
)

// DefaultTimeout bounds one call of a Watcher. Looking through a store of a few thousand blobs takes some 100 ms; a containerd
// that needs longer than this is as good as absent for a decision that a pull waits for.
const DefaultTimeout = 3 * time.Second

const (
	retryFirst = 100 * time.Millisecond // after the loss of containerd
	retryMost  = time.Second
)

// Watcher asks one containerd. All methods may be called at the same time. While containerd is absent each gives an error
// that is errdefs.ErrUnavailable, within 100 ms; when it is back they work again, at once.
type Watcher struct {
	address string
	timeout time.Duration
	hosts   docker.RegistryHosts // nil: the defaults

	mu     sync.Mutex
	client *containerd.Client
	closed bool
	// contentRoot is where containerd keeps its blobs, "" while it has not told.
	contentRoot string
	subs        map[*subscriber]struct{}

	cache cache
}

type subscriber struct {
	namespace string
	wake      chan struct{}
}

// Option changes a Watcher when it is made.
type Option func(*Watcher)

// WithTimeout bounds each call to d instead of DefaultTimeout; d must be above 0.
func WithTimeout(d time.Duration) Option {
	return func(w *Watcher) {
		if d > 0 {
			w.timeout = d
		}
	}
}

// New returns a Watcher of the containerd that listens, now or later, on the unix socket at address (an absolute path). It
// does not connect yet. Close frees it.
func New(address string, opts ...Option) *Watcher {
	w := &Watcher{address: address, timeout: DefaultTimeout, subs: map[*subscriber]struct{}{}}
	w.cache.init()
	for _, o := range opts {
		o(w)
	}
	return w
}

// Close drops the connection. Calls after it give errdefs.ErrUnavailable.
func (w *Watcher) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
	if w.client == nil {
		return nil
	}
	err := w.client.Close()
	w.client = nil
	return err
}

// connect returns the client. Making it opens no connection: gRPC connects at the first call, fails calls at once while the
// socket refuses, and tries again by itself, at least once a second.
func (w *Watcher) connect() (*containerd.Client, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return nil, fmt.Errorf("watcher of containerd at %q is closed: %w", w.address, errdefs.ErrUnavailable)
	}
	if w.client == nil {
		c, err := containerd.New(w.address, containerd.WithDialOpts([]grpc.DialOption{
			grpc.WithTransportCredentials(insecure.NewCredentials()), // a unix socket; its mode is the guard
			// containerd's own dialer waits for a socket to appear, which is what must not happen here.
			grpc.WithConnectParams(grpc.ConnectParams{
				Backoff:           backoff.Config{BaseDelay: retryFirst, Multiplier: 1.6, Jitter: 0.2, MaxDelay: retryMost},
				MinConnectTimeout: retryMost,
			}),
		}))
		if err != nil {
			return nil, fmt.Errorf("connect to containerd at %q: %w: %w", w.address, err, errdefs.ErrUnavailable)
		}
		w.client = c
	}
	return w.client, nil
}

// begin returns the client and a context for one bounded call in namespace ns.
func (w *Watcher) begin(ctx context.Context, ns string) (*containerd.Client, context.Context, context.CancelFunc, error) {
	if err := namespaceRequired(ns); err != nil {
		return nil, nil, nil, err
	}
	c, err := w.connect()
	if err != nil {
		return nil, nil, nil, err
	}
	reconnect(ctx, c)
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(ctx, ns), w.timeout)
	return c, ctx, cancel, nil
}

// reconnectWait bounds the wait for a connection. One to a unix socket takes less than a millisecond where somebody listens.
const reconnectWait = 100 * time.Millisecond

// reconnect tries at once what gRPC would try when its backoff is over. Who asks about a pull has just been called by containerd,
// so it is there, and a layer would be placed blindly for nothing.
func reconnect(ctx context.Context, c *containerd.Client) {
	conn, ok := c.Conn().(*grpc.ClientConn)
	if !ok || conn.GetState() != connectivity.TransientFailure {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, reconnectWait)
	defer cancel()
	conn.ResetConnectBackoff()
	conn.WaitForStateChange(ctx, connectivity.TransientFailure) // the call will tell what came of it
}

func namespaceRequired(ns string) error {
	if ns == "" {
		return fmt.Errorf("containerd namespace is empty: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

// classify turns an error of a call that ran under a context of begin into one that says whether containerd was there.
// outer is the caller's context: if that is over, the caller knows why.
func (w *Watcher) classify(outer context.Context, what string, err error) error {
	if outer.Err() == nil && (errors.Is(err, context.DeadlineExceeded) || errdefs.IsDeadlineExceeded(err)) {
		return fmt.Errorf("%s: containerd at %q did not answer within %s: %w", what, w.address, w.timeout, errdefs.ErrUnavailable)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// Subscribe returns a channel that gets a value after something arrived in the content store or changed in the image store of
// namespace ns ("" for all), and after the connection to containerd came back, since events were missed then. Wake-ups that
// are not taken are merged into one, so the receiver looks at the whole state after each. They come while Run runs. containerd
// sends the event of an arrival since 2.1, and asynchronously: who must not miss one polls slowly beside it.
// The second value ends the subscription.
func (w *Watcher) Subscribe(ns string) (<-chan struct{}, func()) {
	s := &subscriber{namespace: ns, wake: make(chan struct{}, 1)}
	w.mu.Lock()
	w.subs[s] = struct{}{}
	w.mu.Unlock()
	return s.wake, func() {
		w.mu.Lock()
		delete(w.subs, s)
		w.mu.Unlock()
	}
}

// notify wakes the subscribers of ns; all of them if ns is "".
func (w *Watcher) notify(ns string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for s := range w.subs {
		if ns == "" || s.namespace == "" || s.namespace == ns {
			select {
			case s.wake <- struct{}{}:
			default: // one is waiting already
			}
		}
	}
}

// Run follows containerd's events and wakes subscribers until ctx is over, whose error it returns. It outlives restarts of
// containerd.
func (w *Watcher) Run(ctx context.Context) error {
	wait, lost := retryFirst, false
	for {
		seen, err := w.follow(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if seen {
			wait, lost = retryFirst, false
		}
		if !lost {
			log.G(ctx).WithError(err).WithField("address", w.address).Info("no events from containerd; trying again until it is back")
			lost = true
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
		wait = min(2*wait, retryMost)
	}
}

// follow handles events until the stream breaks, and tells whether containerd was reached.
func (w *Watcher) follow(ctx context.Context) (bool, error) {
	c, err := w.connect()
	if err != nil {
		return false, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	envelopes, errs := c.Subscribe(ctx, `topic=="/content/create"`, `topic~="^/images/"`)
	// The stream says nothing until the first event, so whether containerd is there is asked beside it.
	up := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(ctx, w.timeout)
		defer cancel()
		_, err := c.Version(ctx)
		up <- err
	}()
	seen := false
	for {
		select {
		case err := <-up:
			if err == nil {
				seen = true
				w.notify("")
			}
			up = nil
		case e := <-envelopes:
			seen = true
			w.handle(ctx, e)
		case err := <-errs:
			return seen, errgrpc.ToNative(err)
		}
	}
}

func (w *Watcher) handle(ctx context.Context, e *events.Envelope) {
	if e == nil {
		return
	}
	w.notify(e.Namespace)
	if e.Event == nil {
		return
	}
	v, err := typeurl.UnmarshalAny(e.Event)
	if err != nil {
		log.G(ctx).WithError(err).WithField("topic", e.Topic).Debug("event of containerd is not understood")
		return
	}
	if a, ok := v.(*eventtypes.ContentCreate); ok {
		log.G(ctx).WithField("digest", a.Digest).WithField("namespace", e.Namespace).Trace("content has arrived")
	}
}
