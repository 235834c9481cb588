// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/cmd/internal/config"
)

// good is a configuration that leaves nothing to be wished for; tests break it in one place each.
const good = `
version = 4
root = 'ROOT'
[plugins.'io.containerd.server.v1.grpc']
  address = '/run/containerd/containerd.sock'
[proxy_plugins.nhybrid]
  type = 'snapshot'
  address = '/run/nhybrid/nhybrid.sock'
  capabilities = ['remap-ids', 'rebase']
  [proxy_plugins.nhybrid.exports]
    root = '/var/lib/nhybrid'
    enable_remote_snapshot_annotations = 'true'
[proxy_plugins.nhybrid-diff]
  type = 'diff'
  address = '/run/nhybrid/nhybrid.sock'
[plugins.'io.containerd.service.v1.diff-service']
  default = ['walking']
[plugins.'io.containerd.transfer.v1.local']
  max_concurrent_unpacks = 3
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = 'linux/ARCH'
  snapshotter = 'overlayfs'
  differ = 'walking'
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = 'linux/ARCH'
  snapshotter = 'nhybrid'
  differ = 'nhybrid-diff'
[plugins.'io.containerd.cri.v1.images']
  snapshotter = 'nhybrid'
`

func write(t *testing.T, content string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "config.toml")
	content = strings.NewReplacer("ROOT", t.TempDir(), "ARCH", runtime.GOARCH).Replace(content)
	require.NoError(t, os.WriteFile(file, []byte(content), 0o600))
	return file
}

func look(t *testing.T, file string) []Finding {
	t.Helper()
	whole, raw, err := Read(t.Context(), file, "")
	require.NoError(t, err)
	return Containerd(file, whole, raw, config.Default(), "nhybrid", fast)
}

func fast(string) (time.Duration, error) { return 100 * time.Microsecond, nil }

// bad gives what is not ok, one line each, and checks what holds for every finding.
func bad(t *testing.T, all []Finding) []string {
	t.Helper()
	var lines []string
	for _, f := range all {
		require.NotContains(t, f.Text+f.Cure, "\n")
		require.NotEmpty(t, f.Area)
		if f.Level == OK {
			require.Empty(t, f.Cure, f.Text)
			continue
		}
		require.NotEmpty(t, f.Cure, f.Text)
		lines = append(lines, string(f.Level)+" "+f.Text+" -> "+f.Cure)
	}
	return lines
}

func TestGoodConfigurations(t *testing.T) {
	v3 := strings.NewReplacer("version = 4", "version = 3", "[plugins.'io.containerd.server.v1.grpc']", "[grpc]").Replace(good)
	v2 := strings.NewReplacer("version = 3", "version = 2", "io.containerd.cri.v1.images'", "io.containerd.grpc.v1.cri'.containerd").Replace(v3)
	for name, content := range map[string]string{
		"version 4": good, "version 3": v3, "version 2": v2,
		"no CRI":               strings.Replace(good, "version = 4", "version = 4\ndisabled_plugins = ['io.containerd.cri.v1.images']", 1),
		"all of linux":         strings.ReplaceAll(good, "linux/ARCH", "linux"),
		"full types":           strings.NewReplacer("'snapshot'", "'io.containerd.snapshotter.v1'", "'diff'", "'io.containerd.differ.v1'").Replace(good),
		"a runtime of its own": strings.Replace(good, "[plugins.'io.containerd.cri.v1.images']\n", "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.fast]\n", 1),
		"another name":         strings.NewReplacer("proxy_plugins.nhybrid", "proxy_plugins.tiers", "snapshotter = 'nhybrid'", "snapshotter = 'tiers'", "nhybrid-diff", "tiers-diff").Replace(good),
		"no diff service":      strings.Replace(good, "  default = ['walking']\n", "", 1),
		"one at a time":        strings.NewReplacer("max_concurrent_unpacks = 3", "", ", 'rebase'", "").Replace(good),
		"no address":           strings.Replace(good, "[plugins.'io.containerd.server.v1.grpc']\n  address = '/run/containerd/containerd.sock'\n", "", 1),
	} {
		require.Empty(t, bad(t, look(t, write(t, content))), name)
	}
}

func TestBrokenConfigurations(t *testing.T) {
	for name, x := range map[string]struct {
		old, new string
		want     []string // start of each line
	}{
		"no plugin": {"[proxy_plugins.nhybrid", "[elsewhere.nhybrid", []string{
			`fail containerd knows no snapshotter "nhybrid": [proxy_plugins.nhybrid] is missing`, `warn containerd knows no differ "nhybrid-diff"`,
			`fail unpack_config of "nhybrid" names differ "nhybrid-diff", which containerd does not know: it does not start`,
		}},
		"no differ": {"[proxy_plugins.nhybrid-diff]", "[elsewhere.nhybrid-diff]", []string{
			`warn containerd knows no differ "nhybrid-diff": layers are unpacked by containerd`, `fail unpack_config of "nhybrid" names differ "nhybrid-diff", which`,
		}},
		"no differ anywhere": {"[proxy_plugins.nhybrid-diff]\n  type = 'diff'\n  address = '/run/nhybrid/nhybrid.sock'\n", "", []string{
			`warn containerd knows no differ`, `fail unpack_config of "nhybrid" names differ`,
		}},
		"differ of wrong type":    {"type = 'diff'", "type = 'snapshot'", []string{`fail [proxy_plugins.nhybrid-diff] has type "snapshot"`}},
		"differ not in unpack":    {"  differ = 'nhybrid-diff'\n", "", []string{`warn unpack_config of "nhybrid" names no differ`, `warn containerd unpacks 3 layers at a time by itself, and then gives a directory`}},
		"containerd's differ":     {"differ = 'nhybrid-diff'", "differ = 'walking'", []string{`warn unpack_config of "nhybrid" names differ "walking"`, `warn containerd unpacks 3 layers`}},
		"no differ for overlayfs": {"  differ = 'walking'\n", "", []string{`warn unpack_config of "overlayfs" names no differ: containerd may take "nhybrid-diff"`}},
		"ours for overlayfs":      {"differ = 'walking'", "differ = 'nhybrid-diff'", []string{`fail unpack_config of "overlayfs" names differ "nhybrid-diff", which unpacks for "nhybrid" only`}},
		"diff service":            {"default = ['walking']", "default = ['nhybrid-diff', 'walking']", []string{"warn every snapshotter depends on the daemon: while it is down, pulls and commits by clients of the diff service (ctr --local, nerdctl before 2.3,"}},
		"diff service, behind":    {"default = ['walking']", "default = ['walking', 'nhybrid-diff']", []string{`warn [plugins.'io.containerd.service.v1.diff-service'] has "nhybrid-diff" behind "walking"`}},
		"diff service, alone":     {"default = ['walking']", "default = ['nhybrid-diff']", []string{"fail [plugins.'io.containerd.service.v1.diff-service'] names no other differ"}},
		"CRI pulls by itself":     {"cri.v1.images']", "cri.v1.images']\n  use_local_image_pull = true", []string{"warn CRI pulls without the transfer service because of use_local_image_pull"}},
		"CRI pulls more":          {"cri.v1.images']", "cri.v1.images']\n  max_concurrent_downloads = 6", []string{"warn CRI pulls without the transfer service because of max_concurrent_downloads"}},
		"CRI annotates":           {"cri.v1.images']", "cri.v1.images']\n  disable_snapshot_annotations = false", []string{"warn CRI pulls without the transfer service because of disable_snapshot_annotations"}},
		"wrong type":              {"type = 'snapshot'", "type = 'content'", []string{`fail [proxy_plugins.nhybrid] has type "content"`}},
		"no type":                 {"type = 'snapshot'", "", []string{`fail [proxy_plugins.nhybrid] has type ""`}},
		"wrong address": {"nhybrid.sock", "other.sock", []string{
			`fail [proxy_plugins.nhybrid] has address "/run/nhybrid/other.sock", the daemon listens on "/run/nhybrid/nhybrid.sock"`, `fail [proxy_plugins.nhybrid-diff] has address`,
		}},
		"address as URL":                   {"'/run/nhybrid/nhybrid.sock'", "'unix:///run/nhybrid/nhybrid.sock'", []string{`fail [proxy_plugins.nhybrid] has address "unix:///run`, `fail [proxy_plugins.nhybrid-diff] has address "unix:///run`}},
		"no exports":                       {"[proxy_plugins.nhybrid.exports]", "[proxy_plugins.nhybrid.imports]", []string{"warn exports.root is missing", "warn enable_remote_snapshot_annotations"}},
		"wrong root":                       {"/var/lib/nhybrid", "/var/lib/other", []string{`warn exports.root is "/var/lib/other"`}},
		"annotations no string":            {"= 'true'", "= true", []string{"warn enable_remote_snapshot_annotations is not \"true\""}},
		"no remap-ids":                     {"'remap-ids', ", "", []string{"warn capability remap-ids is missing"}},
		"no unpack_config":                 {"unpack_config]]", "pack_config]]", []string{"fail no unpack_config names \"nhybrid\""}},
		"unpack_config of another machine": {"linux/ARCH", "linux/pdp11", []string{"fail no unpack_config names \"nhybrid\""}},
		"unpack_config without overlayfs":  {"'overlayfs'", "'native'", []string{"warn unpack_config does not name overlayfs"}},
		"CRI uses another":                 {"cri.v1.images']\n  snapshotter = 'nhybrid'", "cri.v1.images']\n  snapshotter = 'native'", []string{"warn CRI: pods use \"native\""}},
		"CRI uses the default":             {"cri.v1.images']\n  snapshotter = 'nhybrid'", "cri.v1.images']", []string{"warn CRI: pods use \"overlayfs\""}},
		"blobs are discarded":              {"cri.v1.images']", "cri.v1.images']\n  discard_unpacked_layers = true", []string{"warn CRI throws blobs away", "warn CRI pulls without the transfer service because of discard_unpacked_layers"}},
		"containerd elsewhere":             {"/run/containerd/containerd.sock", "/run/k3s/containerd.sock", []string{`fail containerd listens on "/run/k3s/containerd.sock" and nhybrid asks "/run/containerd/containerd.sock"`}},
		"grpc ignored":                     {"[proxy_plugins.nhybrid]", "[grpc]\n  address = '/x.sock'\n[proxy_plugins.nhybrid]", []string{"warn [grpc] in a configuration of version 4 is ignored"}},
		"version 1":                        {"version = 4", "version = 1", []string{"warn the configuration is of version 1", "warn CRI: pods use"}},
		"version 9":                        {"version = 4", "version = 9", []string{"warn the configuration is of version 9"}},
		"plugin is no table":               {"version = 4", "version = 4\nplugins = 5", nil},
	} {
		content := strings.ReplaceAll(good, x.old, x.new)
		require.NotEqual(t, good, content, name)
		if x.want == nil { // not even TOML any more
			_, _, err := Read(t.Context(), write(t, content), "")
			require.Error(t, err, name)
			continue
		}
		have := bad(t, look(t, write(t, content)))
		require.Len(t, have, len(x.want), "%s: %v", name, have)
		for i := range have {
			require.True(t, strings.HasPrefix(have[i], x.want[i]), "%s: %s", name, have[i])
		}
	}
}

// With nhybrid's differ first in the diff service CRI may pull as it likes.
func TestDiffServiceServesCRI(t *testing.T) {
	content := strings.NewReplacer("default = ['walking']", "default = ['nhybrid-diff', 'walking']", "cri.v1.images']", "cri.v1.images']\n  use_local_image_pull = true").Replace(good)
	have := bad(t, look(t, write(t, content)))
	require.Len(t, have, 1, have)
	require.Contains(t, have[0], "every snapshotter depends on the daemon")
}

func TestMetadataOnSlowDisk(t *testing.T) {
	file := write(t, good)
	whole, raw, err := Read(t.Context(), file, "")
	require.NoError(t, err)
	slow := func(dir string) (time.Duration, error) {
		require.Equal(t, whole.text("root"), dir)
		return 27 * time.Millisecond, nil
	}
	have := bad(t, Containerd(file, whole, raw, config.Default(), "nhybrid", slow))
	require.Len(t, have, 1)
	require.Contains(t, have[0], "27.0 ms a write: each start of a container waits about 324ms for it")
}

// Values of types that nobody expects are as good as missing.
func TestNonsenseTypes(t *testing.T) {
	file := write(t, "version = 'four'\nroot = 7\nproxy_plugins = ['nhybrid']\ngrpc = 1\ndisabled_plugins = [1, 2]\n[plugins]\n'io.containerd.transfer.v1.local' = { unpack_config = [1, 'x'] }\n")
	require.NotPanics(t, func() { require.NotEmpty(t, bad(t, look(t, file))) })
}

func TestImports(t *testing.T) {
	dir := t.TempDir()
	put := func(name, content string) string {
		file := filepath.Join(dir, name)
		require.NoError(t, os.MkdirAll(filepath.Dir(file), 0o755))
		require.NoError(t, os.WriteFile(file, []byte(content), 0o600))
		return file
	}
	main := put("config.toml", "version = 3\nimports = ['conf.d/*.toml']\nroot = '/a'\n[plugins.p]\nx = 1\ny = 1\n")
	put("conf.d/10.toml", "version = 2\nroot = '/b'\n[plugins.p]\ny = 2\n")
	put("conf.d/20.toml", "imports = ['../config.toml', 'more/one.toml']\nroot = '/c'\n") // a circle
	put("conf.d/more/one.toml", "[plugins.q]\nz = 3\n")
	whole, _, err := Read(t.Context(), main, "")
	require.NoError(t, err)
	require.Equal(t, int64(3), whole.number("version"))
	require.Equal(t, "/c", whole.text("root"))
	require.Equal(t, int64(1), whole.at("plugins", "p").number("x"))
	require.Equal(t, int64(2), whole.at("plugins", "p").number("y"))
	require.Equal(t, int64(3), whole.at("plugins", "q").number("z"))

	put("conf.d/30.toml", "imports = ['gone.toml']\n")
	_, _, err = Read(t.Context(), main, "")
	require.ErrorContains(t, err, "gone.toml")
	put("conf.d/30.toml", "broken = \n")
	_, _, err = Read(t.Context(), main, "")
	require.ErrorContains(t, err, "30.toml:1:")
	_, _, err = Read(t.Context(), filepath.Join(dir, "none.toml"), "")
	require.ErrorIs(t, err, os.ErrNotExist)
}

// With containerd's program at hand its own word counts, and its complaint is told.
func TestReadAsksContainerd(t *testing.T) {
	program := filepath.Join(t.TempDir(), "containerd")
	script := "#!/bin/sh\n[ \"$1 $3 $4\" = '--config config dump' ] || { echo wrong use >&2; exit 1; }\ngrep -q broken \"$2\" && { echo invalid plugin >&2; exit 1; }\nprintf 'version = 4\\nroot = \"/from-containerd\"\\n'\n"
	require.NoError(t, os.WriteFile(program, []byte(script), 0o700))
	whole, raw, err := Read(t.Context(), write(t, "version = 3\n"), program)
	require.NoError(t, err)
	require.Equal(t, "/from-containerd", whole.text("root"))
	require.Equal(t, int64(3), raw.number("version"))
	_, _, err = Read(t.Context(), write(t, "broken = 3\n"), program)
	require.ErrorContains(t, err, "invalid plugin")
}
