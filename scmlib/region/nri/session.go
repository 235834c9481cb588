// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package nri

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/log"
	nriapi "github.com/containerd/nri/pkg/api"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/scmlib/region"
	"github.com/nhybrid/nhybrid/scmlib/region/api"
)

// session is what containerd calls, in one connection. Between two connections containers are created without the plugin, and one whose creation the plugin does
// not answer in time is created without it, too; containerd passes over both without a word. So what was missed is looked for afterwards, at three places:
//
//   - ValidateContainerAdjustment: containerd fails a creation whose validator does not answer. A daemon that stalls, or that died a moment ago, fails one
//     creation by it instead of losing its region.
//   - StartContainer: what was created meanwhile and comes to its start with the plugin there is refused. CRI starts no container while a plugin that has
//     introduced itself waits to be taken (BlockPluginSync in its StartContainer), so none slips through between.
//   - Synchronize: what runs already is said, and stays in Without.
type session struct {
	p       *Plugin
	version func() string // of containerd's NRI
	once    sync.Once
	known   chan struct{} // closed when containerd knows the plugin
}

// Configure implements [stub.ConfigureInterface]. containerd refuses a plugin for events that it does not know.
func (s *session) Configure(context.Context, string, string, string) (nriapi.EventMask, error) {
	s.p.introduced()
	return events(s.version()), nil
}

// events are those that a version of NRI has; validators came with 0.10 (containerd 2.2). What is not of the form v0.N.M is newer.
func events(version string) nriapi.EventMask {
	var mask nriapi.EventMask
	mask.Set(nriapi.Event_CREATE_CONTAINER, nriapi.Event_START_CONTAINER, nriapi.Event_STOP_CONTAINER, nriapi.Event_REMOVE_CONTAINER)
	var minor int
	if n, _ := fmt.Sscanf(version, "v0.%d.", &minor); n == 0 || minor >= 10 {
		mask.Set(nriapi.Event_VALIDATE_CONTAINER_ADJUSTMENT)
	}
	return mask
}

// Synchronize implements [stub.SynchronizeInterface]: containers that are there already stay as they are, and what they lack is said.
func (s *session) Synchronize(ctx context.Context, pods []*nriapi.PodSandbox, containers []*nriapi.Container) ([]*nriapi.ContainerUpdate, error) {
	s.p.compare(ctx, pods, containers)
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

// ValidateContainerAdjustment implements [stub.ValidateContainerAdjustmentInterface]: the region must be among what the plugins have asked for together.
func (s *session) ValidateContainerAdjustment(ctx context.Context, req *nriapi.ValidateContainerAdjustmentRequest) error {
	pod, c := req.GetPod(), req.GetContainer()
	if !asks(pod, c) || s.p.hooked(req.GetAdjust().GetHooks()) || s.p.hooked(c.GetHooks()) {
		return nil
	}
	err := fmt.Errorf("container %s of pod %s/%s would be created without the region that its pod asks for", c.GetName(), pod.GetNamespace(), pod.GetName())
	log.G(ctx).WithError(err).Warn("pod is refused")
	return err
}

// StartContainer implements [stub.StartContainerInterface]. An error fails the start, and whoever wanted it creates the container anew.
func (s *session) StartContainer(ctx context.Context, pod *nriapi.PodSandbox, c *nriapi.Container) error {
	if !s.p.lacks(pod, c) {
		return nil
	}
	err := fmt.Errorf("container %s of pod %s/%s was created without the region that its pod asks for, while the daemon was away or did not answer: create it anew",
		c.GetName(), pod.GetNamespace(), pod.GetName())
	log.G(ctx).WithError(err).Warn("container is not started")
	return err
}

// StopContainer implements [stub.StopContainerInterface]; containerd calls it for containers that end by themselves, too.
func (s *session) StopContainer(_ context.Context, _ *nriapi.PodSandbox, c *nriapi.Container) ([]*nriapi.ContainerUpdate, error) {
	s.p.gone(c.GetId())
	return nil, nil
}

// RemoveContainer implements [stub.RemoveContainerInterface].
func (s *session) RemoveContainer(_ context.Context, _ *nriapi.PodSandbox, c *nriapi.Container) error {
	s.p.gone(c.GetId())
	return nil
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

// asks tells whether a pod wants a region for its container, be it in words that make no sense.
func asks(pod *nriapi.PodSandbox, c *nriapi.Container) bool {
	a, err := Ask(pod.GetAnnotations(), c.GetName())
	return a != nil || err != nil
}

// hooked tells whether the hook of regions is among others. Another release may have it at another place.
func (p *Plugin) hooked(h *nriapi.Hooks) bool {
	return slices.ContainsFunc(h.GetCreateRuntime(), func(h *nriapi.Hook) bool { return filepath.Base(h.GetPath()) == filepath.Base(p.Hook) })
}

// lacks tells whether a container was created without the region that its pod wants.
func (p *Plugin) lacks(pod *nriapi.PodSandbox, c *nriapi.Container) bool {
	return asks(pod, c) && !p.hooked(c.GetHooks())
}

// compare finds the containers that run without their region.
func (p *Plugin) compare(ctx context.Context, pods []*nriapi.PodSandbox, containers []*nriapi.Container) {
	byID := map[string]*nriapi.PodSandbox{}
	for _, pod := range pods {
		byID[pod.GetId()] = pod
	}
	without := map[string]string{}
	for _, c := range containers {
		// What was not started yet is refused when it is.
		if pod := byID[c.GetPodSandboxId()]; c.GetState() == nriapi.ContainerState_CONTAINER_RUNNING && p.lacks(pod, c) {
			without[c.GetId()] = fmt.Sprintf("%s of pod %s/%s", c.GetName(), pod.GetNamespace(), pod.GetName())
		}
	}
	p.mu.Lock()
	p.without = without
	p.mu.Unlock()
	if err := p.Without(); err != nil {
		log.G(ctx).Warn(err.Error())
	}
}

func (p *Plugin) gone(id string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.without, id)
}

// mostNamed bounds a message.
const mostNamed = 10

// Without says which containers run without the region that their pods ask for; nil: none.
func (p *Plugin) Without() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.without) == 0 {
		return nil
	}
	names := slices.Sorted(maps.Values(p.without))
	more := ""
	if n := len(names) - mostNamed; n > 0 {
		names, more = names[:mostNamed], fmt.Sprintf(", and %d more", n)
	}
	return errors.New("containers run without the region that their pods ask for, since they were started while the daemon was away or did not answer; delete these pods, and what makes them anew gives them one: " +
		strings.Join(names, ", ") + more)
}
