// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package region

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestCDI(t *testing.T) {
	c := CDI{Path: filepath.Join(t.TempDir(), "cdi", "x.json"), Hook: "/usr/libexec/nhybrid-scm-hook", Socket: "/run/s.sock", Sizes: DefaultSizes()}
	require.NoError(t, c.Write([]string{"orders"}))
	b, err := os.ReadFile(c.Path)
	require.NoError(t, err)
	var spec cdiSpec
	require.NoError(t, json.Unmarshal(b, &spec))
	require.Equal(t, "nhybrid.io/scm", spec.Kind)
	require.Len(t, spec.Devices, 17)
	names := map[string]cdiDevice{}
	for _, d := range spec.Devices {
		names[d.Name] = d
	}
	require.Len(t, names, 17)
	d := names["256m"].Edits
	require.Equal(t, []string{"SCM_REGION=/dev/scm/region"}, d.Env)
	require.Equal(t, cdiHook{Name: "createRuntime", Path: c.Hook, Args: []string{"nhybrid-scm-hook", "-socket", "/run/s.sock", "-size", "268435456"}, Timeout: 300}, d.Hooks[0])
	require.Equal(t, []string{"nhybrid-scm-hook", "-socket", "/run/s.sock", "-volume", "orders"}, names["orders"].Edits.Hooks[0].Args)
	require.Contains(t, names, "image")
	left, err := os.ReadDir(filepath.Dir(c.Path))
	require.NoError(t, err)
	require.Len(t, left, 1)
	c.Hook = "relative"
	require.ErrorContains(t, c.Write(nil), "not absolute")
}
