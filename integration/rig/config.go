// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package rig

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"text/template"
)

// containerdTemplate is a configuration of version 4 (containerd 2.4), which has the address of the socket among the
// plugins and ignores a [grpc] at the top without a word.
var containerdTemplate = template.Must(template.New("containerd").Parse(`version = 4
root = '{{.ContainerdRoot}}'
state = '{{.Dir}}/run'
imports = []
{{- if not .CRI}}
disabled_plugins = ['io.containerd.grpc.v1.cri', 'io.containerd.cri.v1.runtime', 'io.containerd.cri.v1.images', 'io.containerd.podsandbox.controller.v1.podsandbox', 'io.containerd.nri.v1.nri']
{{- else}}
disabled_plugins = []
{{- end}}

[debug]
  level = 'debug'

[plugins.'io.containerd.server.v1.grpc']
  address = '{{.Dir}}/c.sock'
[plugins.'io.containerd.server.v1.ttrpc']
  address = '{{.Dir}}/c.sock.ttrpc'
{{- if .Daemon}}

[proxy_plugins.nhybrid]
  type = 'snapshot'
  address = '{{.Dir}}/n.sock'
  capabilities = [{{range $i, $c := .Capabilities}}{{if $i}}, {{end}}'{{$c}}'{{end}}]
  [proxy_plugins.nhybrid.exports]
    root = '{{.HDD}}'
    enable_remote_snapshot_annotations = 'true'

[proxy_plugins.nhybrid-diff]
  type = 'diff'
  address = '{{.Dir}}/n.sock'
{{- if .DiffService}}

[plugins.'io.containerd.service.v1.diff-service']
  default = ['nhybrid-diff', 'walking']
{{- end}}
{{- end}}

[plugins.'io.containerd.transfer.v1.local']
  max_concurrent_unpacks = {{.Unpacks}}
{{- range .Snapshotters}}
  [[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
    platform = 'linux/{{$.Arch}}'
    snapshotter = '{{.}}'
    differ = '{{if and (eq . "nhybrid") (not $.NoDiffer)}}nhybrid-diff{{else}}walking{{end}}'
{{- end}}
{{- if .CRI}}

[plugins.'io.containerd.cri.v1.images']
  snapshotter = '{{.Snapshotter}}'
  [plugins.'io.containerd.cri.v1.images'.pinned_images]
    sandbox = '{{.Pause}}'
[plugins.'io.containerd.cri.v1.runtime']
  # Where the machine itself is a container, it may not lower the score of others below its own.
  restrict_oom_score_adj = true
[plugins.'io.containerd.cri.v1.runtime'.containerd]
  default_runtime_name = 'runc'
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
    runtime_type = 'io.containerd.runc.v2'
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
      Root = '{{.Dir}}/runc'
[plugins.'io.containerd.nri.v1.nri']
  # Its own socket, and none of the machine's plugins.
  socket_path = '{{.Dir}}/nri.sock'
  plugin_path = '{{.Dir}}/nri'
  plugin_config_path = '{{.Dir}}/nri'
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ['/usr/lib/cni']
  conf_dir = '{{.Dir}}/cni'
{{- end}}
{{.ContainerdConfig}}`))

// writeContainerdConfig also links the shim into the rig's own directory of programs: containerd looks for shims and
// runc along its PATH.
func (r *Rig) writeContainerdConfig() error {
	var b strings.Builder
	err := containerdTemplate.Execute(&b, map[string]any{
		"Dir": r.Dir, "ContainerdRoot": r.options.ContainerdRoot, "CRI": r.options.CRI, "Daemon": !r.options.NoDaemon,
		"HDD": r.HDD, "Capabilities": r.options.Capabilities, "Unpacks": max(1, r.options.ConcurrentUnpacks),
		"Snapshotters": r.snapshotters(), "Snapshotter": r.Snapshotter, "Arch": runtime.GOARCH, "Pause": r.Ref(PauseName),
		"ContainerdConfig": r.options.ContainerdConfig,
		"DiffService":      r.options.DiffService, "NoDiffer": r.options.NoDiffer,
	})
	if err != nil {
		return fmt.Errorf("make configuration of containerd: %w", err)
	}
	return os.WriteFile(filepath.Join(r.Dir, "containerd.toml"), []byte(b.String()), 0o644)
}

func (r *Rig) snapshotters() []string {
	if r.options.NoDaemon {
		return []string{"overlayfs"}
	}
	return []string{"overlayfs", "nhybrid"}
}

// writeDaemonConfig holds what has no flag of its own.
func (r *Rig) writeDaemonConfig() error {
	config := fmt.Sprintf("version = 1\ncontrol_address = '%s'\nstate = '%s'\n%s\n",
		r.ControlSocket(), filepath.Join(r.Dir, "state"), r.options.DaemonConfig)
	if !strings.Contains(r.options.DaemonConfig, "[containerd]") {
		config += fmt.Sprintf("[containerd]\naddress = '%s'\n", r.ContainerdSocket())
	}
	return os.WriteFile(filepath.Join(r.Dir, "nhybrid.toml"), []byte(config), 0o644)
}
