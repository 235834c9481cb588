// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/cmd/internal/config"
	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/control"
)

var update = flag.Bool("update", false, "write the golden files anew")

func golden(t *testing.T, name, have string) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		require.NoError(t, os.WriteFile(file, []byte(have), 0o644))
	}
	want, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, string(want), have, "run go test ./cmd/nhybridctl -update if this is meant")
}

func ctl(t *testing.T, args ...string) (code int, out, errs string) {
	t.Helper()
	var o, e bytes.Buffer
	code = run(t.Context(), args, &o, &e)
	return code, o.String(), e.String()
}

// changing is what no golden file can hold.
var changing = regexp.MustCompile(`(process +)\d+, up \S+|("pid": )\d+|("started": )"[^"]*"`)

func TestGolden(t *testing.T) {
	c := config.Default()
	c.SCM.Enabled = false // du would ask those of this machine
	socket := serve(t, &backend{trouble: "not durable before the crash\nand its blob is gone; pull the image again"}, c)
	for name, args := range map[string][]string{
		"status":         {"status"},
		"status.json":    {"status", "--json"},
		"ls":             {"ls"},
		"ls-bytes":       {"ls", "--bytes", "--labels"},
		"ls-namespace":   {"ls", "-n", "k8s.io"},
		"ls-size":        {"ls", "--size", "-n", "k8s.io"},
		"ls.json":        {"ls", "--json"},
		"inspect":        {"inspect", image},
		"inspect-active": {"inspect", "web"},
		"inspect.json":   {"inspect", image, "--json"},
		"why":            {"why", image},
		"why-layer":      {"why", image, "0"},
		"why-path":       {"why", image, "/usr/bin/python3.11"},
		"why-path.json":  {"why", image, "/usr/bin/python3.11", "--json"},
		"why-bytes":      {"why", image, "/n/bad\xff\nx"},
		"why-bytes.json": {"why", image, "/n/bad\xff", "--json"},
		"du":             {"du"},
		"du.json":        {"du", "--json"},
	} {
		t.Run(name, func(t *testing.T) {
			code, out, errs := ctl(t, append([]string{"--address", socket}, args...)...)
			require.Zero(t, code, errs)
			require.Empty(t, errs)
			if strings.HasSuffix(name, ".json") {
				require.True(t, json.Valid([]byte(out)), out)
			}
			golden(t, name, changing.ReplaceAllString(out, "$1$2$3-"))
		})
	}
}

func TestConfig(t *testing.T) {
	code, out, _ := ctl(t, "config", "default")
	require.Zero(t, code)
	example, err := os.ReadFile("../../config.toml.example")
	require.NoError(t, err)
	require.Equal(t, string(example), out)

	code, out, _ = ctl(t, "config", "default", "--json")
	require.Zero(t, code)
	var fromJSON, fromTOML map[string]any
	require.NoError(t, json.Unmarshal([]byte(out), &fromJSON))
	require.NoError(t, toml.Unmarshal(example, &fromTOML))
	require.Equal(t, fromTOML["placement"], fromJSON["placement"])

	running := config.Default()
	running.Placement.Policy = "boundary=2"
	want, err := running.Marshal()
	require.NoError(t, err)
	code, out, _ = ctl(t, "config", "dump", "--address", serve(t, &backend{}, running))
	require.Zero(t, code)
	require.Equal(t, string(want), out)

	file := filepath.Join(t.TempDir(), "config.toml")
	require.NoError(t, os.WriteFile(file, example, 0o600))
	code, out, _ = ctl(t, "config", "check", file)
	require.Zero(t, code)
	require.Equal(t, file+": ok\n", out)

	require.NoError(t, os.WriteFile(file, []byte("[placement]\npolice = \"lass\"\n"), 0o600))
	code, _, errs := ctl(t, "config", "check", file)
	require.Equal(t, exitFailure, code)
	require.Equal(t, "nhybridctl: "+file+":2: unknown key \"placement.police\"; did you mean \"placement.policy\"?\n", errs)
}

func TestWrongUse(t *testing.T) {
	socket := serve(t, &backend{}, config.Default())
	for _, x := range []struct {
		args []string
		code int
		text string
	}{
		{nil, exitUsage, "no command"},
		{[]string{"nonsense"}, exitUsage, `unknown command "nonsense"`},
		{[]string{"ls", "--nonsense"}, exitUsage, "unknown flag: --nonsense"},
		{[]string{"ls", "more"}, exitUsage, "more"},
		{[]string{"inspect"}, exitUsage, "accepts 1 arg"},
		{[]string{"why"}, exitUsage, "accepts between 1 and 2"},
		{[]string{"config"}, exitUsage, "default, dump or check"},
		{[]string{"ls", "--address", "relative.sock"}, exitUsage, "relative.sock"},
		{[]string{"ls", "--address", "/nowhere/control.sock"}, exitFailure, "no such file or directory"},
		{[]string{"inspect", "nothing", "--address", socket}, exitFailure, `"nothing": not found`},
		{[]string{"inspect", "unavailable", "--address", socket}, exitFailure, "containerd is away: unavailable"},
		{[]string{"inspect", "", "--address", socket}, exitFailure, "no image or snapshot is named"},
		{[]string{"simulate"}, exitUsage, "--layers"},
		{[]string{"simulate", "--layers", "/nowhere.csv"}, exitFailure, "/nowhere.csv"},
		{[]string{"simulate", "--layers", "x", "--bandwidth", "fast"}, exitUsage, "--bandwidth"},
		{[]string{"simulate", "--layers", "x", "--policy", "best"}, exitUsage, "--policy"},
		{[]string{"simulate", "--layers", "x", "--nvm-size", "big"}, exitUsage, "--nvm-size"},
		{[]string{"simulate", "--layers", "x", "--concurrent", "0"}, exitUsage, "--concurrent"},
		{[]string{"simulate", "--layers", "x", "--model", "best"}, exitUsage, "choose one of paper, one-pass"},
		{[]string{"simulate", "--layers", "x", "--cores", "0"}, exitUsage, "--cores"},
		{[]string{"simulate", "--layers", "x", "--commit", "-1s"}, exitUsage, "--commit"},
		{[]string{"simulate", "--layers", "x", "--hot", "2"}, exitUsage, "--hot"},
	} {
		code, out, errs := ctl(t, x.args...)
		require.Equal(t, x.code, code, "%v: %s", x.args, errs)
		require.Empty(t, out)
		require.Contains(t, errs, x.text, "%v", x.args)
		require.Equal(t, 1, strings.Count(errs, "\n"), "%v: more than one line: %s", x.args, errs)
		require.True(t, strings.HasPrefix(errs, "nhybridctl: "), errs)
	}
}

func TestSimulate(t *testing.T) {
	table := filepath.Join(t.TempDir(), "layers.csv")
	require.NoError(t, os.WriteFile(table, []byte("category,image,layer_index,compressed_bytes,uncompressed_bytes\n"+
		"db,a,0,1000000,2000000\ndb,a,1,9000000,18000000\ndb,a,2,100,200\nweb,b,0,5000,9000\n"), 0o600))
	code, out, errs := ctl(t, "simulate", "--layers", table, "--json", "--policy", "nvm", "--bandwidth", "1Gbit")
	require.Zero(t, code, errs)
	type group struct {
		Name     string             `json:"name"`
		Images   int                `json:"images"`
		NVMSaved map[string]float64 `json:"nvm_saved"`
	}
	var report struct {
		Images     []group `json:"images"`
		Categories []group `json:"categories"`
		All        group   `json:"all"`
	}
	require.NoError(t, json.Unmarshal([]byte(out), &report))
	require.Len(t, report.Images, 2)
	require.Len(t, report.Categories, 2)
	require.Equal(t, 2, report.All.Images)
	require.InDelta(t, 0.1, report.Images[0].NVMSaved["largest"], 1e-3)
	require.Zero(t, report.All.NVMSaved["sequential"]) // --policy nvm was heard
	require.Contains(t, report.All.NVMSaved, "parallel")
	require.Contains(t, report.All.NVMSaved, "drain")

	code, out, _ = ctl(t, "simulate", "--layers", table, "--images")
	require.Zero(t, code)
	require.Contains(t, out, "web")

	code, out, errs = ctl(t, "simulate", "--layers", table, "--json", "--model", "one-pass", "--policy", "boundary=1", "--commit", "1s", "--hot", "0.5", "--content-on-hdd")
	require.Zero(t, code, errs)
	var onePass struct {
		Options placement.Options `json:"options"`
		All     struct {
			NVMSaved  map[string]float64 `json:"nvm_saved"`
			TReturned map[string]float64 `json:"t_returned"`
		} `json:"all"`
	}
	require.NoError(t, json.Unmarshal([]byte(out), &onePass))
	require.Contains(t, onePass.All.NVMSaved, "drain")
	require.InDelta(t, (0.1+1)/2, onePass.All.NVMSaved["boundary=1"], 1e-3) // the largest layer of a, and none of b
	require.Greater(t, onePass.All.TReturned["hdd"], 2.0)                   // 1 s a layer: 3 s and 1 s
	require.Equal(t, 0.5, onePass.Options.Hot)
	require.True(t, onePass.Options.ContentOnHDD)

	code, out, _ = ctl(t, "simulate", "--layers", table, "--images", "--model", "one-pass")
	require.Zero(t, code)
	require.Contains(t, out, "seconds until durable")
	require.Contains(t, out, "web")
}

func TestCompletion(t *testing.T) {
	socket := serve(t, &backend{}, config.Default())
	code, out, _ := ctl(t, "__complete", "--address", socket, "inspect", "")
	require.Zero(t, code)
	require.Equal(t, image, strings.SplitN(out, "\n", 2)[0])
	code, out, _ = ctl(t, "__complete", "--address", "/nowhere", "inspect", "")
	require.Zero(t, code)
	require.True(t, strings.HasPrefix(out, ":4"), out)
	code, out, _ = ctl(t, "completion", "bash")
	require.Zero(t, code)
	require.Contains(t, out, "nhybridctl")
}

func events() []*control.Event {
	d := layers()[1].Decision
	return []*control.Event{
		{Time: moment, Type: "pull", Pull: "7", Image: image, Layers: []*control.LayerProgress{
			{Index: 0, Digest: base, Size: 64_900_000, Offset: 32_450_000, State: "downloading", Tier: "hdd"},
			{Index: 1, Digest: java, Size: 80_700_000, State: "waiting", Tier: "hdd"},
		}},
		{Time: moment, Type: "progress", Pull: "7", Layers: []*control.LayerProgress{{Index: 0, Digest: base, Size: 64_900_000, Offset: 64_900_000, State: "downloaded", Tier: "hdd"}}},
		{Time: moment, Type: "decision", Pull: "7", Image: image, Layers: []*control.LayerProgress{{Index: 1, Digest: java, Size: 80_700_000, Offset: 80_700_000, State: "storing", Tier: "nvm", Decision: d}}},
		{Time: moment, Type: "progress", Pull: "7", Layers: []*control.LayerProgress{{Index: 1, Digest: java, Size: 80_700_000, Offset: 80_700_000, State: "stored", Tier: "nvm"}}},
		{Time: moment, Type: "done", Pull: "7", Image: image},
	}
}

func TestWatch(t *testing.T) {
	socket := serve(t, &backend{events: events()}, config.Default())
	code, out, errs := ctl(t, "watch", "--once", "--address", socket)
	require.Zero(t, code, errs)
	golden(t, "watch", out)

	code, out, _ = ctl(t, "watch", "--once", "--json", "--address", socket)
	require.Zero(t, code)
	lines := strings.Split(strings.TrimSpace(out), "\n")
	require.Len(t, lines, 5)
	for _, l := range lines {
		require.True(t, json.Valid([]byte(l)), l)
	}

	failed := append(events()[:1], &control.Event{Time: moment, Type: "failed", Pull: "7", Image: image, Message: "registry\nis gone"})
	socket = serve(t, &backend{events: failed}, config.Default())
	code, out, errs = ctl(t, "watch", "--once", "--address", socket)
	require.Equal(t, exitFailure, code)
	require.Empty(t, errs)
	require.Contains(t, out, "failed "+image+": registry is gone\n")
}

// Ctrl-C is how a watch ends, no failure.
func TestWatchIsInterrupted(t *testing.T) {
	socket := serve(t, &backend{events: events()[:1]}, config.Default())
	ctx, cancel := context.WithCancel(t.Context())
	var errs bytes.Buffer
	code := run(ctx, []string{"watch", "--address", socket}, writer(func(b []byte) { cancel() }), &errs)
	require.Zero(t, code, errs.String())
}

type writer func([]byte)

func (w writer) Write(b []byte) (int, error) { w(b); return len(b), nil }

func TestScreen(t *testing.T) {
	var out bytes.Buffer
	a := &app{}
	s := &screen{canvas: canvas{out: &out, width: 120}, view: newView(a.size)}
	for _, e := range events() {
		require.NoError(t, s.event(e))
	}
	// An index from outside that makes no sense takes no memory.
	require.NoError(t, s.event(&control.Event{Pull: "8", Layers: []*control.LayerProgress{{Index: -1}, {Index: 1 << 30}, {Index: 1}}}))
	for _, line := range strings.Split(regexp.MustCompile("\x1b\\[[0-9]*[A-Z]").ReplaceAllString(out.String(), ""), "\n") {
		require.LessOrEqual(t, len([]rune(line)), 120)
	}
	golden(t, "screen", strings.ReplaceAll(out.String(), "\x1b", "<ESC>"))
}

func TestVersion(t *testing.T) {
	code, out, _ := ctl(t, "version", "--json")
	require.Zero(t, code)
	var v map[string]string
	require.NoError(t, json.Unmarshal([]byte(out), &v))
	require.NotEmpty(t, v["version"])
}
