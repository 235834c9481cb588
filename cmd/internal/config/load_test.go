// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package config

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/pflag"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/scmlib/region"
)

func file(t *testing.T, content string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "config.toml")
	require.NoError(t, os.WriteFile(name, []byte(content), 0o600))
	return name
}

func TestPrecedence(t *testing.T) {
	name := file(t, "root = '/file'\nnvm_root = '/file-nvm'\nlog_level = 'warn'\n[placement]\npolicy = 'hdd'\n[background]\nworkers = 7\nwrite_back = false\n")
	env := []string{"NHYBRID_NVM_ROOT=/env-nvm", "NHYBRID_LOG_LEVEL=error", "NHYBRID_BACKGROUND_WORKERS=9", "NHYBRID_BACKGROUND_WRITE_BACK=true", "NHYBRID_CONTAINERD_TIMEOUT=7s", "HOME=/root", "broken"}
	c, err := Load(name, env, map[string]string{"log_level": "debug", "placement.policy": "boundary=3", "placement.nvm_reserve": "2GiB"})
	require.NoError(t, err)

	want := Default()
	want.Root = "/file"              // file before default
	want.NVMRoot = "/env-nvm"        // environment before file
	want.LogLevel = "debug"          // command line before environment
	want.Background.Workers = 9      // environment, a number
	want.Background.WriteBack = true // environment, true or false
	want.Containerd.Timeout = Duration(7 * time.Second)
	want.Placement.Policy = "boundary=3"
	want.Placement.NVMReserve = Space{Bytes: 2 << 30}
	require.Equal(t, want, c)
}

func TestNoFile(t *testing.T) {
	_, err := Load(filepath.Join(t.TempDir(), "missing.toml"), nil, nil)
	require.ErrorIs(t, err, fs.ErrNotExist)
	require.ErrorContains(t, err, "missing.toml")
	_, err = Load(t.TempDir(), nil, nil)
	require.ErrorContains(t, err, "is a directory")
}

func TestBadFile(t *testing.T) {
	for content, want := range map[string]string{
		"rooot = '/x'": `:1: unknown key "rooot"; did you mean "root"?`,
		"root = '/a'\n[placement]\npolicyy = 'x'":  `:3: unknown key "placement.policyy"; did you mean "placement.policy"?`,
		"policy = 'lass'":                          `:1: unknown key "policy"; did you mean "placement.policy"?`,
		"[placment]\npolicy = 'lass'":              `unknown key "placment`,
		"completely_different_from_all_others = 1": `unknown key "completely_different_from_all_others"`,
		"root = ":                                            ":1: ",
		"root = '/a'\nroot = '/b'":                           ":2: root: key root is already defined",
		"root = 5":                                           ":1: root: the value is of type integer and should be of type string",
		"placement = 1":                                      ":1: placement: this is a table, not a value of type integer",
		"[background]\nworkers = 'two'":                      ":2: background.workers: the value is of type string and should be of type int",
		"[placement]\nnvm_reserve = '5x'":                    `:2: placement.nvm_reserve: size "5x"`,
		"[placement]\nnvm_reserve = '-5%'":                   `share "-5%"`,
		"[placement]\nnvm_reserve = '100%'":                  `share "100%"`,
		"[placement]\nnvm_reserve = -5":                      `size "-5"`,
		"[placement]\nhdd_rate = 'fast'":                     `:2: placement.hdd_rate: rate "fast"`,
		"[placement]\nhdd_rate = -1":                         "placement.hdd_rate: ",
		"[background]\nwrite_back_rate = -1":                 "background.write_back_rate: ",
		"[unpack]\nconcurrency = 0":                          "unpack.concurrency: 0 is not a number of layers from 1 to 256",
		"[unpack]\nconcurrency = 257":                        "unpack.concurrency: 257 is not",
		"[unpack]\nmax_bytes = '0'":                          "unpack.max_bytes: 0 is not a size",
		"[unpack]\nmax_metadata = '0'":                       "unpack.max_metadata: 0 is not a size",
		"[stream_processors.x]\npath = 'x'\naccepts = ['y']": "stream_processors.x: needs accepts (media types), returns",
		"[stream_processors.x]\npath = 'x'\naccepts = ['y']\nreturns = 'y'":                                                                    `what the programs for "y" return goes round in a circle`,
		"[stream_processors.x]\npath = 'x'\naccepts = ['a']\nreturns = 'b'\n[stream_processors.y]\npath = 'x'\naccepts = ['b']\nreturns = 'a'": "in a circle",
		"[stream_processors.x]\npath = 'x'\naccepts = ['a']\nreturns = 'b'\n[stream_processors.y]\npath = 'x'\naccepts = ['a']\nreturns = 'c'": `stream_processors.y: another program accepts "a"`,
		"[stream_processors.x]\npaths = 'x'":                    `unknown key "stream_processors.x.paths"`,
		"[unpack]\nmax_bytes = '5%'":                            "unpack.max_bytes: 5% is not a size",
		"[unpack]\nmax_byte = 5":                                `unknown key "unpack.max_byte"; did you mean "unpack.max_bytes"?`,
		"[containerd]\ntimeout = 'soon'":                        `:2: containerd.timeout: duration "soon"`,
		"[containerd]\ntimeout = '-1s'":                         `duration "-1s"`,
		"[containerd]\ntimeout = 5":                             "containerd.timeout: 5ns is too short",
		"[placement]\npoll_interval = '0s'":                     "placement.poll_interval: 0s is too short",
		"version = 2":                                           "version: 2 is not known",
		"root = 'var/lib/nhybrid'":                              `root: "var/lib/nhybrid" is relative`,
		"nvm_root = './nvm'":                                    `nvm_root: "./nvm" is relative`,
		"nvm_root = ''":                                         "nvm_root: is empty",
		"root = '/'":                                            `root: "/" cannot be a tier`,
		"root = '/a/../b'":                                      `root: write "/a/../b" as "/b"`,
		"root = '/a:b'":                                         "root: \"/a:b\" holds one of",
		"root = '/a,b'":                                         "mount options cannot carry",
		"root = '/" + strings.Repeat("x", 300) + "'":            "root: is longer than 255 bytes",
		"root = '/a'\nnvm_root = '/a'":                          "nvm_root: is the same directory as root",
		"root = '/a'\nnvm_root = '/a/nvm'":                      `nvm_root: "/a/nvm" lies inside root`,
		"root = '/a/hdd'\nnvm_root = '/a'":                      `root: "/a/hdd" lies inside nvm_root`,
		"state = 'run'":                                         `state: "run" is relative`,
		"state = '/var/lib/nhybrid'":                            "state: \"/var/lib/nhybrid\" is the directory of a tier",
		"address = 'nhybrid.sock'":                              `address: "nhybrid.sock" is relative`,
		"address = 'unix:///run/x.sock'":                        "without unix://",
		"address = ''":                                          "address: is empty",
		"control_address = '/" + strings.Repeat("x", 108) + "'": "control_address: is longer than 107 bytes",
		"address = '/run/containerd/containerd.sock'":           "three different sockets",
		"metrics_address = 'here'":                              `metrics_address: "here" is neither`,
		"metrics_address = '127.0.0.1:0'":                       `metrics_address: "127.0.0.1:0" is neither`,
		"metrics_address = '127.0.0.1:70000'":                   "is neither host:port",
		"log_level = 'loud'":                                    `log_level: "loud" is none of`,
		"log_format = 'xml'":                                    `log_format: "xml" is neither`,
		"[placement]\npolicy = 'best'":                          `placement.policy: unknown policy "best"`,
		"[placement]\npolicy = 'boundary=x'":                    `placement.policy: policy "boundary=x"`,
		"[snapshot]\nupper_tier = 'ssd'":                        `snapshot.upper_tier: "ssd" is neither`,
		"[snapshot]\nsync_remove = 'no'":                        "snapshot.sync_remove: the value is of type string and should be of type bool",
		"[background]\nworkers = 0":                             "background.workers: 0 is too few",
		"[scm]\naddress = 'scm.sock'":                           `scm.address: "scm.sock" is relative`,
		"[containerd]\nhosts = '/etc/certs.d:certs.d'":          `containerd.hosts: "certs.d" is relative`,
		"[scm]\naddress = '/run/nhybrid/control.sock'":          "scm.address: is the socket of control_address",
		"[scm]\nlimit = 'all'":                                  `:2: scm.limit: size "all"`,
		"[scm]\nregions = -1":                                   "scm.regions: -1 is negative",
		"[scm]\nquotas = 'team-a'":                              `:2: scm.quotas: "team-a" is not name=value`,
		"[scm]\nquotas = 'a=1GiB, a=2GiB'":                      `scm.quotas: "a" is there twice`,
		"[scm]\nquotas = 'a=much'":                              `scm.quotas: a: size "much"`,
		"[scm]\nquotas = 'a/b=1GiB'":                            `scm.quotas: "a/b" is not the name of a namespace`,
		"[scm]\npool = 'big=1'":                                 `scm.pool: size "big"`,
		"[scm]\npool = '256m=many'":                             "scm.pool: 256m=many: give a number of regions",
		"[scm]\npool = '1g=1, 1024m=1'":                         "scm.pool: 1024m is there twice",
		"[scm]\nrate = 'fast'":                                  `scm.rate: rate "fast"`,
		"[scm]\ncdi_spec = 'scm.json'":                          `scm.cdi_spec: "scm.json" is not the absolute path`,
		"[scm]\ncdi_spec = '/etc/cdi/scm'":                      `scm.cdi_spec: "/etc/cdi/scm" is not`,
		"[scm]\ncdi_kind = 'scm'":                               `scm.cdi_kind: "scm" is not a vendor and a class`,
		"[scm]\nhook = 'nhybrid-scm-hook'":                      `scm.hook: "nhybrid-scm-hook" is relative`,
		"[scm]\nreserve = '60%'":                                `scm.reserve: 60% is more than scm.limit, which is 50%`,
		"[scm]\nlimit = '1GiB'\nreserve = '2GiB'":               "scm.reserve: 2GiB is more than scm.limit, which is 1GiB",
		"[scm]\nnri_socket = 'nri.sock'":                        `scm.nri_socket: "nri.sock" is relative`,
		"\x00":                                                  ":1: ",
	} {
		_, err := Load(file(t, content), nil, nil)
		require.ErrorContains(t, err, want, "%q", content)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, "%q", content)
		require.NotContains(t, err.Error(), "\n", "%q", content)
	}
}

func TestBadEnvironmentAndFlags(t *testing.T) {
	name := file(t, "")
	for _, x := range []struct {
		env   []string
		flags map[string]string
		want  string
	}{
		{[]string{"NHYBRID_BACKGROUND_WORKERS=many"}, nil, `environment: NHYBRID_BACKGROUND_WORKERS: "many" is not a whole number`},
		{[]string{"NHYBRID_SNAPSHOT_SYNC_REMOVE=perhaps"}, nil, `"perhaps" is not true or false`},
		{[]string{"NHYBRID_PLACEMENT_NVM_RESERVE=much"}, nil, `environment: NHYBRID_PLACEMENT_NVM_RESERVE: size "much"`},
		{[]string{"NHYBRID_ROOT=relative"}, nil, `root: "relative" is relative`},
		{nil, map[string]string{"nvm-root": "/x"}, `command line: unknown key "nvm-root"; did you mean "nvm_root"?`},
		{nil, map[string]string{"containerd.timeout": "x"}, `command line: containerd.timeout: duration "x"`},
	} {
		_, err := Load(name, x.env, x.flags)
		require.ErrorContains(t, err, x.want)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	}
	require.Equal(t, []string{"NHYBRID_ROOOT", "NHYBRID_SERVICE_HOST"},
		UnknownEnv([]string{"NHYBRID_ROOT=/a", "NHYBRID_ROOOT=/a", "NHYBRID_SERVICE_HOST=10.0.0.1", "NHYBRID_CONFIG=/x", "OTHER=1"}))
}

func TestFlags(t *testing.T) {
	f := pflag.NewFlagSet("test", pflag.ContinueOnError)
	get := Flags(f)
	require.NoError(t, f.Parse([]string{"--config", "/c", "--root", "/r", "--nvm-root=/n", "--set", "placement.policy=hdd", "--set", "root=/overruled", "--log-level", ""}))
	name, values, err := get()
	require.NoError(t, err)
	require.Equal(t, "/c", name)
	require.Equal(t, map[string]string{"root": "/r", "nvm_root": "/n", "placement.policy": "hdd", "log_level": ""}, values)
	require.NoError(t, f.Parse([]string{"--set", "nonsense"}))
	_, _, err = get()
	require.ErrorContains(t, err, `--set "nonsense" is not key=value`)
}

// What is not the default must survive being written and read, too.
func TestMarshalRoundTrip(t *testing.T) {
	c := Default()
	c.Placement = Placement{Policy: "drain", NVMReserve: Space{Bytes: 12345}, HDDRate: 47_000_000, PollInterval: Duration(time.Second)}
	c.Unpack = Unpack{Concurrency: 9, MaxBytes: Space{Bytes: 20 << 30}, MaxMetadata: Space{Bytes: 3 << 29}}
	c.StreamProcessors = map[string]StreamProcessor{"a.b": {Accepts: []string{"x", "y"}, Returns: "z", Path: "p", Args: []string{"-q"}, Env: []string{}}}
	c.Background = Background{Workers: 5, WriteBackRate: 1 << 20}
	c.Snapshot = Snapshot{UpperTier: "hdd", SyncRemove: true}
	c.MetricsAddress = "127.0.0.1:9100"
	c.SCM.Pool, c.SCM.Quotas = List{{"256m", "4"}, {"1g", "2"}}, List{{"team-a", "20GiB"}, {"batch", "5%"}}
	pool, err := c.SCM.PoolOf()
	require.NoError(t, err)
	require.Equal(t, map[int64]int{256 << 20: 4, 1 << 30: 2}, pool)
	quotas, err := c.SCM.QuotaOf(1000)
	require.NoError(t, err)
	require.Equal(t, map[string]region.Quota{"team-a": {Bytes: 20 << 30}, "batch": {Bytes: 50}}, quotas)
	require.Equal(t, "/usr/bin/nhybrid-scm-hook", c.SCM.HookPath("/usr/bin/containerd-nhybrid-grpc"))
	b, err := c.Marshal()
	require.NoError(t, err)
	back, err := Parse("x", b)
	require.NoError(t, err)
	require.Equal(t, c, back)
}

func TestSizes(t *testing.T) {
	for text, want := range map[string]int64{
		"0": 0, "4096": 4096, "1kB": 1000, "1KB": 1000, "1KiB": 1024, " 2 GiB ": 2 << 30, "1.5GiB": 3 << 29, "50MB": 50e6, "7B": 7,
		"9223372036854775807": 1<<63 - 1, ".5MB": 500_000, "9007199254740993kB": 9007199254740993e3, "9007199254.740993GB": 9007199254740993e3,
	} {
		n, err := ParseSize(text)
		require.NoError(t, err, text)
		require.Equal(t, want, n, text)
	}
	for _, text := range []string{"", "GiB", "-1", "+1", "1e3", "0x10", "Inf", "NaN", "1.2.3", ".", "5%", "1gb", "1 0", "9223372036854775808", "9999999999TiB", "1_000"} {
		_, err := ParseSize(text)
		require.Error(t, err, text)
	}
	require.Equal(t, int64(50), Space{Percent: 5}.Of(1000))
	require.Equal(t, int64(7), Space{Bytes: 7}.Of(1000))
}

func FuzzParseSize(f *testing.F) {
	for _, s := range []string{"2GiB", "5%", "1.5 MB", "-1", "9223372036854775807B", "0.0000001TiB"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := ParseSize(s)
		if err != nil {
			return
		}
		require.GreaterOrEqual(t, n, int64(0))
		again, err := ParseSize(FormatSize(n))
		require.NoError(t, err)
		require.Equal(t, n, again)
	})
}

func FuzzParse(f *testing.F) {
	example, err := Default().Marshal()
	require.NoError(f, err)
	f.Add(example)
	f.Add([]byte("[placement]\nnvm_reserve = {}\n"))
	f.Add([]byte("a.b.c = [1, 'x', {y = 2}]"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := Parse("fuzz", data)
		if err != nil {
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			require.NotContains(t, err.Error(), "\n")
			return
		}
		// What was accepted is written as something that is accepted, and means the same.
		b, err := c.Marshal()
		require.NoError(t, err)
		again, err := Parse("again", b)
		require.NoError(t, err)
		require.Equal(t, c, again)
	})
}
