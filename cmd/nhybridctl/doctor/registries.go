// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"fmt"

	"github.com/nhybrid/nhybrid/cmd/internal/config"
)

// registries compares where containerd and the daemon read about the hosts of registries.
func registries(f *findings, t Table, c config.Config) {
	cri := t.at("plugins", "io.containerd.cri.v1.images", "registry")
	if t.number("version") < 3 {
		cri = t.at("plugins", pluginCRI, "registry")
	}
	for _, of := range []struct {
		who  string
		path string
	}{{"CRI", cri.text("config_path")}, {"the transfer service", t.at("plugins", "io.containerd.transfer.v1.local").text("config_path")}} {
		if of.path != "" && of.path != c.Containerd.Hosts {
			f.add(Warn, fmt.Sprintf("set containerd.hosts = %q in nhybrid's configuration, if the registries of profiles and regions are described there", of.path),
				"%s reads hosts of registries in %q, nhybrid in %q", of.who, of.path, c.Containerd.Hosts)
		}
	}
}
