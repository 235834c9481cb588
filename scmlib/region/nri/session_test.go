// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package nri

import (
	"fmt"
	"testing"

	nriapi "github.com/containerd/nri/pkg/api"
	"github.com/stretchr/testify/require"
)

func hooks(path string) *nriapi.Hooks {
	return &nriapi.Hooks{CreateRuntime: []*nriapi.Hook{{Path: "/usr/bin/other"}, {Path: path}}}
}

// What was created without the plugin is not started.
func TestStartContainer(t *testing.T) {
	t.Parallel()
	s := &session{p: New(Config{Hook: "/usr/local/bin/nhybrid-scm-hook"})}
	for _, c := range []struct {
		annotations map[string]string
		hooks       *nriapi.Hooks
		refused     bool
	}{
		{map[string]string{"app": "web"}, nil, false},
		{map[string]string{"scm.nhybrid.io/size": "1m"}, hooks("/usr/local/bin/nhybrid-scm-hook"), false},
		{map[string]string{"scm.nhybrid.io/size": "1m"}, hooks("/opt/old/nhybrid-scm-hook"), false},
		{map[string]string{"scm.nhybrid.io/size": "1m"}, nil, true},
		{map[string]string{"scm.nhybrid.io/size": "1m"}, hooks("/usr/bin/more"), true},
		{map[string]string{"size.scm.nhybrid.io/container.other": "1m"}, nil, false},
		{map[string]string{"scm.nhybrid.io/size": "much"}, nil, true},
	} {
		pod := &nriapi.PodSandbox{Namespace: "shop", Name: "web-0", Annotations: c.annotations}
		err := s.StartContainer(t.Context(), pod, &nriapi.Container{Name: "web", Hooks: c.hooks})
		// The same of what is about to be created, where the hook is among the adjustments.
		validated := s.ValidateContainerAdjustment(t.Context(), &nriapi.ValidateContainerAdjustmentRequest{
			Pod: pod, Container: &nriapi.Container{Name: "web"}, Adjust: &nriapi.ContainerAdjustment{Hooks: c.hooks},
		})
		if !c.refused {
			require.NoError(t, err, c)
			require.NoError(t, validated, c)
			continue
		}
		require.ErrorContains(t, err, "container web of pod shop/web-0 was created without the region")
		require.ErrorContains(t, validated, "container web of pod shop/web-0 would be created without the region")
	}
}

// What runs without its region is named until it ends.
func TestSynchronize(t *testing.T) {
	t.Parallel()
	p := New(Config{Hook: "/usr/local/bin/nhybrid-scm-hook"})
	s := &session{p: p, known: make(chan struct{})}
	asking := map[string]string{"scm.nhybrid.io/size": "1m"}
	const runs = nriapi.ContainerState_CONTAINER_RUNNING
	synchronize := func(containers ...*nriapi.Container) {
		_, err := s.Synchronize(t.Context(), []*nriapi.PodSandbox{
			{Id: "p1", Namespace: "shop", Name: "web-0", Annotations: asking}, {Id: "p2", Namespace: "shop", Name: "plain"},
		}, containers)
		require.NoError(t, err)
	}
	synchronize()
	<-s.known
	require.NoError(t, p.Without())
	synchronize(
		&nriapi.Container{Id: "1", PodSandboxId: "p1", Name: "lacks", State: runs},
		&nriapi.Container{Id: "2", PodSandboxId: "p1", Name: "has", State: runs, Hooks: hooks(p.Hook)},
		&nriapi.Container{Id: "3", PodSandboxId: "p2", Name: "wants-none", State: runs},
		&nriapi.Container{Id: "4", PodSandboxId: "p1", Name: "not-started", State: nriapi.ContainerState_CONTAINER_CREATED},
		&nriapi.Container{Id: "5", PodSandboxId: "none", Name: "pod-is-gone", State: runs},
		&nriapi.Container{Id: "6", PodSandboxId: "p1", Name: "too", State: runs},
	)
	require.ErrorContains(t, p.Without(), "gives them one: lacks of pod shop/web-0, too of pod shop/web-0")
	for _, name := range []string{"has", "wants-none", "not-started", "pod-is-gone"} {
		require.NotContains(t, p.Without().Error(), name)
	}
	_, err := s.StopContainer(t.Context(), nil, &nriapi.Container{Id: "1"})
	require.NoError(t, err)
	require.ErrorContains(t, p.Without(), "gives them one: too of pod shop/web-0")
	require.NoError(t, s.RemoveContainer(t.Context(), nil, &nriapi.Container{Id: "6"}))
	require.NoError(t, p.Without())

	var many []*nriapi.Container
	for i := range mostNamed + 2 {
		many = append(many, &nriapi.Container{Id: fmt.Sprint(i), PodSandboxId: "p1", Name: "c", State: runs})
	}
	synchronize(many...)
	require.ErrorContains(t, p.Without(), ", and 2 more")
	synchronize()
	require.NoError(t, p.Without(), "containerd knows best")
}

// An older NRI refuses a plugin for an event that it does not know.
func TestEvents(t *testing.T) {
	t.Parallel()
	for version, validates := range map[string]bool{"v0.3.0": false, "v0.8.0": false, "v0.10.0": true, "v0.12.3": true, "v1.0.0": true, "devel": true, "": true} {
		mask := events(version)
		require.Equal(t, validates, mask.IsSet(nriapi.Event_VALIDATE_CONTAINER_ADJUSTMENT), version)
		require.True(t, mask.IsSet(nriapi.Event_CREATE_CONTAINER) && mask.IsSet(nriapi.Event_START_CONTAINER), version)
	}
	p := New(Config{})
	s := &session{p: p, version: func() string { return "v0.8.0" }}
	mask, err := s.Configure(t.Context(), "", "containerd", "v2.1.1")
	require.NoError(t, err)
	require.Equal(t, events("v0.8.0"), mask)
	<-p.Tried()
}
