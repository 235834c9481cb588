// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"fmt"
	"slices"

	"github.com/nhybrid/nhybrid/cmd/internal/config"
	"github.com/nhybrid/nhybrid/scmlib/region/api"
)

// validator looks whether pods can require their region: by containerd's validator, which refuses containers whose plugin is missing. NRI has no call that
// would tell the plugin whether it is on.
func validator(f *findings, file string, t Table, c config.Config) {
	plugin := t.at("plugins", pluginNRI, "default_validator")
	section := fmt.Sprintf("[plugins.'%s'.default_validator]", pluginNRI)
	served := c.SCM.Enabled && c.SCM.NRI
	required := slices.Contains(plugin.texts("required_plugins"), api.Plugin)
	switch {
	case plugin.truth("enable") && required && !served:
		f.add(Fail, fmt.Sprintf("in %s, %s: take %q out of required_plugins, or set nhybrid's scm.enabled and scm.nri to true", file, section, api.Plugin),
			"CRI: no container starts, since all are to have the plugin %s, and nhybrid serves no annotations of pods", api.Plugin)
	case !served:
	case plugin.truth("enable") && required:
		f.ok("CRI: while the daemon is away no container starts, whatever its pod asks for: %s is among required_plugins", api.Plugin)
	case plugin.truth("enable"):
		f.ok("CRI: pods can require their region, by required-plugins.noderesource.dev/pod: '[%q]'", api.Plugin)
	default:
		f.ok("CRI: pods cannot require their region: one that is created and started while the daemon is away runs without it (%s in %s: enable = true)", section, file)
	}
}
