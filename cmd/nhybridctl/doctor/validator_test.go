// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/cmd/internal/config"
)

func TestValidator(t *testing.T) {
	t.Parallel()
	const on = "\n[plugins.'io.containerd.nri.v1.nri'.default_validator]\nenable = true\n"
	for _, c := range []struct {
		file  string
		off   bool
		level Level
		says  string
	}{
		{"", false, OK, "pods cannot require their region"},
		{"", true, "", ""},
		{on, false, OK, `required-plugins.noderesource.dev/pod: '["nhybrid-scm"]'`},
		{on, true, "", ""},
		{on + "required_plugins = ['nhybrid-scm']", false, OK, "while the daemon is away no container starts"},
		{on + "required_plugins = ['nhybrid-scm']", true, Fail, "no container starts"},
		{on + "required_plugins = ['other']", true, "", ""},
		{"\n[plugins.'io.containerd.nri.v1.nri'.default_validator]\nrequired_plugins = ['nhybrid-scm']", true, "", ""},
	} {
		file := write(t, good+c.file)
		whole, _, err := Read(t.Context(), file, "")
		require.NoError(t, err)
		settings := config.Default()
		settings.SCM.NRI = !c.off
		f := &findings{area: "containerd"}
		validator(f, file, whole, settings)
		if c.says == "" {
			require.Empty(t, f.all, c.file)
			continue
		}
		require.Len(t, f.all, 1, c.file)
		require.Equal(t, c.level, f.all[0].Level, c.file)
		require.Contains(t, f.all[0].Text, c.says)
	}
}
