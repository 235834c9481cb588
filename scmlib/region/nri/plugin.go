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
	"github.com/containerd/nri/pkg/stub"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/scmlib/region/api"
)

// Name of the plugin, by which NRI can be told to require it.
const Name = api.Plugin

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

// Config says where the plugin is and what it adds.
type Config struct {
	Socket string // of NRI
	Hook   string // absolute path of nhybrid-scm-hook
	Daemon string // the socket that the hook asks
	// Foresee tells early what the daemon would refuse; [region.Store.Foresee].
	Foresee func(api.Attach) error
}

// Plugin adds regions to containers. Its methods may be called concurrently.
type Plugin struct {
	Config

	once  sync.Once
	tried chan struct{} // see Tried

	mu      sync.Mutex
	failed  error
	without map[string]string // containers that run without the region that their pod asks for, by id
}

// New makes a plugin.
func New(c Config) *Plugin { return &Plugin{Config: c, tried: make(chan struct{})} }

// Tried is closed when containerd has been asked for the first time to take the plugin, and does or cannot. From then on it lets no container start before the
// plugin is told, which refuses one that was created without its region before.
func (p *Plugin) Tried() <-chan struct{} { return p.tried }

func (p *Plugin) introduced() { p.once.Do(func() { close(p.tried) }) }

// Run serves containerd until ctx ends, and again whenever it comes back. That it is not there, or has no NRI, is no failure.
func (p *Plugin) Run(ctx context.Context) {
	var wait time.Duration
	for ctx.Err() == nil {
		begun := time.Now()
		err := p.serve(ctx)
		p.introduced()
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
	s.version = st.RuntimeNRIVersion
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
