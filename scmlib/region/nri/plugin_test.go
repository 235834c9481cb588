// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package nri

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	nriapi "github.com/containerd/nri/pkg/api"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/scmlib/region/api"
)

// The integration tests have containerd call the plugin; here is what it answers.
func TestCreateContainer(t *testing.T) {
	t.Parallel()
	hook := filepath.Join(t.TempDir(), "nhybrid-scm-hook")
	require.NoError(t, os.WriteFile(hook, []byte("#!/bin/sh\n"), 0o755))
	var asked []api.Attach
	p := New(Config{Hook: hook, Daemon: "/run/scm.sock", Foresee: func(a api.Attach) error {
		asked = append(asked, a)
		if a.Size > 1<<20 {
			return fmt.Errorf("quota is 1 MiB: %w", errdefs.ErrResourceExhausted)
		}
		return nil
	}})
	s := &session{p: p}
	create := func(annotations map[string]string) (*nriapi.ContainerAdjustment, error) {
		adjust, updates, err := s.CreateContainer(t.Context(), &nriapi.PodSandbox{Namespace: "shop", Name: "web-0", Annotations: annotations},
			&nriapi.Container{Name: "web"})
		require.Empty(t, updates, "other containers are not touched")
		return adjust, err
	}

	adjust, err := create(map[string]string{"app": "web"})
	require.NoError(t, err)
	require.Nil(t, adjust)
	require.Empty(t, asked, "the daemon is not asked for pods that want nothing")

	adjust, err = create(map[string]string{"scm.nhybrid.io/size": "1m"})
	require.NoError(t, err)
	require.Len(t, asked, 1)
	require.Equal(t, Namespace, asked[0].Namespace)
	require.Equal(t, Tenant("shop"), asked[0].Tenant)
	require.Equal(t, []*nriapi.KeyValue{{Key: "SCM_REGION", Value: api.Device}}, adjust.GetEnv())
	require.Len(t, adjust.GetHooks().GetCreateRuntime(), 1)
	h := adjust.GetHooks().GetCreateRuntime()[0]
	require.Equal(t, hook, h.GetPath())
	require.Equal(t, "nhybrid-scm-hook", h.GetArgs()[0])
	require.Contains(t, h.GetArgs(), "/run/scm.sock")
	require.Positive(t, h.GetTimeout().GetValue())

	adjust, err = create(map[string]string{"scm.nhybrid.io/size": "2m"})
	require.Nil(t, adjust)
	require.ErrorIs(t, err, errdefs.ErrResourceExhausted)
	require.ErrorContains(t, err, "region for container web of pod shop/web-0: quota is 1 MiB")

	_, err = create(map[string]string{"scm.nhybrid.io/size": "much"})
	require.ErrorContains(t, err, `annotation "scm.nhybrid.io/size"`)

	require.NoError(t, os.Remove(hook))
	_, err = create(map[string]string{"scm.nhybrid.io/size": "1m"})
	require.ErrorContains(t, err, "cannot be run", "containerd would say nothing of a hook that is missing")
}

func TestPause(t *testing.T) {
	t.Parallel()
	wait := time.Duration(0)
	for range 10 {
		next := pause(wait, false, time.Millisecond)
		require.True(t, next == retry && wait == 0 || next == 2*wait || next == slowest)
		wait = next
	}
	require.Equal(t, slowest, wait)
	require.Equal(t, retry, pause(wait, true, time.Millisecond), "one that comes back has it soon")
	require.Equal(t, retry, pause(wait, false, 2*time.Second), "one that goes away after it served is waited for like one that is not there")
}
