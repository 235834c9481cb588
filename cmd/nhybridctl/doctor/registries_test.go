// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/cmd/internal/config"
)

func TestRegistries(t *testing.T) {
	t.Parallel()
	const cri = "\n[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = "
	for file, says := range map[string]string{
		"version = 4":              "",
		"version = 4" + cri + "''": "",
		"version = 4" + cri + "'/etc/containerd/certs.d:/etc/docker/certs.d'":                       "",
		"version = 4" + cri + "'/etc/certs.d'":                                                      `CRI reads hosts of registries in "/etc/certs.d", nhybrid in "/etc/containerd/certs.d:/etc/docker/certs.d"`,
		"version = 2\n[plugins.'io.containerd.grpc.v1.cri'.registry]\nconfig_path = '/etc/certs.d'": "CRI reads hosts",
		"version = 4\n[plugins.'io.containerd.transfer.v1.local']\nconfig_path = '/etc/certs.d'":    "the transfer service reads hosts",
	} {
		whole, _, err := Read(t.Context(), write(t, file), "")
		require.NoError(t, err)
		f := &findings{area: "containerd"}
		registries(f, whole, config.Default())
		if says == "" {
			require.Empty(t, f.all, file)
			continue
		}
		require.Len(t, f.all, 1, file)
		require.Contains(t, f.all[0].Text, says)
		require.Contains(t, f.all[0].Cure, `containerd.hosts = "/etc/certs.d"`)
	}
}
