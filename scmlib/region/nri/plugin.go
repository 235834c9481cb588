// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package nri lets the annotations of pods ask for regions, as a plugin of containerd's Node Resource Interface: what CRI is about to create gets the hook of
// regions and the variable that names its place (docs/regions.md).
package nri

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"sync"
	"time"

	"github.com/containerd/log"
	nriapi "github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/scmlib/region"
	"github.com/nhybrid/nhybrid/scmlib/region/api"
)

// Name of the plugin, by which NRI can be told to require it.
const Name = "nhybrid-scm"

const (
	index = "50" // among other plugins; nothing depends on it
	// retry is how long a containerd that comes back is without the plugin, at most.
	retry = 500 * time.Millisecond
	// slowest is the same where containerd is there and does not want the plugin, or drops it within brief.
	slowest = 30 * time.Second
	brief   = time.Second
	// patience is how long containerd may take to answer a plugin. Its own for plugins is 5 s.
	patience = 15 * time.Second
)

// Plugin adds regions to containers.
type Plugin struct {
	Socket string // of NRI
	Hook   string // absolute path of nhybrid-scm-hook
	Daemon string // the socket that the hook asks
	// Foresee tells early what the daemon would refuse; [region.Store.Foresee].
	Foresee func(api.Attach) error

	mu     sync.Mutex
	failed error
}

// Run serves containerd until ctx ends, and again whenever it comes back. That it is not there, or has no NRI, is no failure.
func (p *Plugin) Run(ctx context.Context) {
	var wait time.Duration
	for ctx.Err() == nil {
		begun := time.Now()
		err := p.serve(ctx)
		if ctx.Err() != nil {
			return
		}
		absent := errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED)
		wait = pause(wait, absent, time.Since(begun))
		if absent {
			err = nil
		}
		p.note(ctx, err)
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
}

// pause is how long to wait after a connection that lasted so long, where the last pause was before.
func pause(before time.Duration, absent bool, lasted time.Duration) time.Duration {
	if absent || lasted > brief {
		return retry
	}
	return min(max(retry, 2*before), slowest)
}

// Failed is why containerd does not take the plugin, nil if it does or is not there.
func (p *Plugin) Failed() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.failed
}

// note keeps an error, and says it once.
func (p *Plugin) note(ctx context.Context, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err != nil && (p.failed == nil || p.failed.Error() != err.Error()) {
		log.G(ctx).WithError(err).Warn("annotations of pods ask for regions in vain")
	}
	p.failed = err
}

// serve is one connection to containerd.
func (p *Plugin) serve(ctx context.Context) error {
	// The stub waits for ever, and holds its lock, where containerd goes away between two of its calls. So it has a connection that can be taken from it.
	conn, err := net.Dial("unix", p.Socket)
	if err != nil {
		return fmt.Errorf("connect to NRI: %w", err)
	}
	defer conn.Close()
	s := &session{p: p, known: make(chan struct{})}
	st, err := stub.New(s, stub.WithPluginName(Name), stub.WithPluginIdx(index), stub.WithConnection(conn), stub.WithLogger(logger{}))
	if err != nil {
		return fmt.Errorf("register with NRI at %q: %w", p.Socket, err)
	}
	ended := make(chan error, 1)
	go func() { ended <- st.Run(ctx) }()
	late := time.NewTimer(patience)
	defer late.Stop()
	select {
	case <-s.known:
	case <-late.C:
		return fmt.Errorf("register with NRI at %q: no answer within %v", p.Socket, patience)
	case err := <-ended:
		return fmt.Errorf("register with NRI at %q: %w", p.Socket, err)
	case <-ctx.Done():
		return ctx.Err()
	}
	p.note(ctx, nil)
	log.G(ctx).WithField("socket", p.Socket).Info("annotations of pods ask for regions")
	select {
	case err := <-ended: // containerd is gone, or does not want it any more: connecting again tells
		log.G(ctx).WithError(err).Debug("NRI ended")
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// session is what containerd calls, in one connection.
type session struct {
	p     *Plugin
	once  sync.Once
	known chan struct{} // closed when containerd knows the plugin
}

// Synchronize implements [stub.SynchronizeInterface]: containers that are there already stay as they are.
func (s *session) Synchronize(context.Context, []*nriapi.PodSandbox, []*nriapi.Container) ([]*nriapi.ContainerUpdate, error) {
	s.once.Do(func() { close(s.known) })
	return nil, nil
}

// CreateContainer implements [stub.CreateContainerInterface]. An error fails the creation of the container, with its text.
func (s *session) CreateContainer(ctx context.Context, pod *nriapi.PodSandbox, c *nriapi.Container) (*nriapi.ContainerAdjustment, []*nriapi.ContainerUpdate, error) {
	adjust, err := s.p.adjust(pod.GetNamespace(), pod.GetAnnotations(), c.GetName())
	if err != nil {
		err = fmt.Errorf("region for container %s of pod %s/%s: %w", c.GetName(), pod.GetNamespace(), pod.GetName(), err)
		log.G(ctx).WithError(err).Warn("pod is refused")
	}
	return adjust, nil, err
}

// adjust decides what a container gets; nil: nothing.
func (p *Plugin) adjust(namespace string, annotations map[string]string, container string) (*nriapi.ContainerAdjustment, error) {
	a, err := Ask(annotations, container)
	if a == nil || err != nil {
		return nil, err
	}
	a.Namespace, a.Tenant = Namespace, Tenant(namespace)
	if err := p.Foresee(*a); err != nil {
		return nil, err
	}
	if err := unix.Access(p.Hook, unix.X_OK); err != nil {
		return nil, fmt.Errorf("the hook %q cannot be run: %w", p.Hook, err)
	}
	adjust := &nriapi.ContainerAdjustment{}
	adjust.AddEnv("SCM_REGION", api.Device)
	adjust.AddHooks(&nriapi.Hooks{CreateRuntime: []*nriapi.Hook{{
		Path: p.Hook, Args: region.HookArgs(p.Hook, p.Daemon, *a), Timeout: nriapi.Int(region.HookTimeout),
	}}})
	return adjust, nil
}

// logger takes what NRI says of itself into the daemon's log, where only failures matter.
type logger struct{}

func (logger) Debugf(ctx context.Context, format string, args ...any) {
	log.G(ctx).Debugf("NRI: "+format, args...)
}

func (logger) Infof(ctx context.Context, format string, args ...any) {
	log.G(ctx).Debugf("NRI: "+format, args...)
}

func (logger) Warnf(ctx context.Context, format string, args ...any) {
	log.G(ctx).Warnf("NRI: "+format, args...)
}

func (logger) Errorf(ctx context.Context, format string, args ...any) {
	log.G(ctx).Errorf("NRI: "+format, args...)
}
