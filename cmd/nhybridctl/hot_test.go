// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/cmd/internal/config"
	"github.com/nhybrid/nhybrid/hif/profile"
	"github.com/nhybrid/nhybrid/snapshotter/control"
)

func TestGoldenHot(t *testing.T) {
	for name, args := range map[string][]string{
		"profile-ls":           {"profile", "ls"},
		"profile-ls-namespace": {"profile", "ls", "-n", "default"},
		"profile-ls.json":      {"profile", "ls", "--json"},
		"profile-show":         {"profile", "show", image},
		"profile-show.json":    {"profile", "show", image, "--json"},
		"profile-pin":          {"profile", "pin", image, "/usr/lib/**"},
		"profile-unpin":        {"profile", "unpin", image, "/usr/bin/**"},
		"profile-exclude.json": {"profile", "exclude", image, "**/*.a", "--json"},
		"profile-rm":           {"profile", "rm", image},
		"profile-push":         {"profile", "push", image},
		"profile-push.json":    {"profile", "push", image, "--json"},
		"profile-pull":         {"profile", "pull", image},
		"profile-pull.json":    {"profile", "pull", image, "--json"},
		"profile-ready":        {"profile", "ready", "web"},
		"migrate-status":       {"migrate", "status"},
		"migrate-status.json":  {"migrate", "status", "--json"},
		"migrate-pause":        {"migrate", "pause"},
		"migrate-resume":       {"migrate", "resume"},
		"files":                {"inspect", "--files", image},
		"files-depth":          {"inspect", "--files", image, "--depth", "1", "--bytes"},
		"files-all":            {"inspect", "--files", image, "--all"},
		"files-all.json":       {"inspect", "--files", image, "--all", "--json"},
		"files-path":           {"inspect", "--files", image, "--path", "/usr/lib/", "--sort", "nvm"},
		"files-one":            {"inspect", "--files", image, "--path", "/usr/lib/jvm/modules"},
	} {
		t.Run(name, func(t *testing.T) {
			socket := serve(t, &backend{hot: newHot(t)}, config.Default())
			code, out, errs := ctl(t, append([]string{"--address", socket}, args...)...)
			require.Zero(t, code, errs)
			require.Empty(t, errs)
			require.NotContains(t, out, "\x1b")
			if strings.HasSuffix(name, ".json") {
				require.True(t, json.Valid([]byte(out)), out)
			}
			golden(t, name, out)
		})
	}
}

func TestPlainHTTP(t *testing.T) {
	h := newHot(t)
	socket := serve(t, &backend{hot: h}, config.Default())
	for _, args := range [][]string{{"push", image}, {"push", image, "--plain-http"}, {"pull", image}, {"pull", image, "--plain-http"}} {
		code, _, errs := ctl(t, append([]string{"profile", "--address", socket}, args...)...)
		require.Zero(t, code, errs)
	}
	require.Equal(t, []string{"push plain=false", "push plain=true", "pull plain=false", "pull plain=true"}, h.calls)
}

// What export writes, import takes, by file and by pipe, and also where it is larger than a message may be.
func TestExportAndImport(t *testing.T) {
	h := newHot(t)
	for i := range 60_000 {
		h.p.Files = append(h.p.Files, profile.File{Path: profile.Path(fmt.Sprintf("%s/%d", strings.Repeat("d", 100), i)), Size: 1, Kind: profile.Read, Touched: -1})
	}
	want := *h.p
	socket := serve(t, &backend{hot: h}, config.Default())
	code, exported, errs := ctl(t, "profile", "export", image, "--address", socket)
	require.Zero(t, code, errs)
	require.Greater(t, len(exported), 8<<20)

	file := filepath.Join(t.TempDir(), "profile")
	require.NoError(t, os.WriteFile(file, []byte(exported), 0o600))
	h.p = nil
	code, out, errs := ctl(t, "profile", "import", file, "--address", socket)
	require.Zero(t, code, errs)
	require.Contains(t, out, "imported the profile of "+image)
	require.NotContains(t, out, "left out")
	require.Equal(t, want, *h.p)

	h.p = nil
	code, out, errs = stdin(t, exported, "profile", "import", "-", "--image", image, "--address", socket)
	require.Zero(t, code, errs)
	require.Contains(t, out, "60004 files")
	require.Equal(t, want, *h.p)
}

// stdin runs a command with something on its standard input.
func stdin(t *testing.T, in string, args ...string) (code int, out, errs string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "stdin")
	require.NoError(t, os.WriteFile(file, []byte(in), 0o600))
	f, err := os.Open(file)
	require.NoError(t, err)
	defer f.Close()
	old := os.Stdin
	os.Stdin = f
	defer func() { os.Stdin = old }()
	return ctl(t, args...)
}

func TestImportNamesWhatIsLeftOut(t *testing.T) {
	h := newHot(t)
	p := *h.p
	for i := range 120 {
		p.Files = append(p.Files, profile.File{Path: profile.Path(fmt.Sprintf("gone/%d", i)), Size: 1, Kind: profile.Read})
	}
	socket := serve(t, &backend{hot: h}, config.Default())
	code, out, errs := stdin(t, encoded(t, p), "profile", "import", "-", "--address", socket)
	require.Zero(t, code, errs)
	require.Contains(t, out, "120 files are left out:\n  /gone/0: the image has no such regular file\n")
	require.True(t, strings.HasSuffix(out, "  and 20 more\n"), out)
}

func encoded(t *testing.T, p profile.Profile) string {
	t.Helper()
	var b bytes.Buffer
	require.NoError(t, profile.Encode(&b, p))
	return b.String()
}

func TestBadImports(t *testing.T) {
	h := newHot(t)
	socket := serve(t, &backend{hot: h}, config.Default())
	good := encoded(t, *h.p)
	other := strings.Replace(good, digest, base, 1)
	entry := `{"path":"a","layer":0,"size":1,"kind":"read","starts":0,"lastStart":0,"weight":0,"touched":-1}`
	head := good[:strings.Index(good, `"files":[`)+len(`"files":[`)]
	for name, x := range map[string]struct{ in, want string }{
		"no JSON":        {"GIF89a", "invalid character 'G'"},
		"empty":          {"", "unexpected EOF"},
		"cut":            {good[:len(good)/2], "unexpected EOF"},
		"future":         {`{"schema":7,"new":1}`, "schema 7 is newer than 1, the newest known here: upgrade nhybrid"},
		"other image":    {other, "profile is of image " + base},
		"path outside":   {strings.Replace(good, "usr/bin/python3.11", "usr/../../shadow", 1), `leads out by ".."`},
		"ten million":    {head + strings.Repeat(entry+",", 10_000_000/40) + entry + "]}", "more than"}, // 25 MB, 250 000 files
		"too many bytes": {head + strings.Repeat(entry+strings.Repeat(" ", 4000)+",", 10_000) + entry + "]}", "more than 32 MiB"},
	} {
		t.Run(name, func(t *testing.T) {
			code, out, errs := stdin(t, x.in, "profile", "import", "-", "--address", socket)
			require.Equal(t, exitFailure, code)
			require.Empty(t, out)
			require.Contains(t, errs, x.want)
			require.Equal(t, 1, strings.Count(errs, "\n"), errs)
			require.NotContains(t, errs, "older than nhybridctl")
			require.Equal(t, 3, h.p.Starts) // nothing came in
		})
	}
	code, _, errs := stdin(t, good, "profile", "import", "-", "--image", "docker.io/library/java:21", "--address", socket)
	require.Equal(t, exitFailure, code)
	require.Contains(t, errs, "profile is of image")
}

func TestDiff(t *testing.T) {
	h := newHot(t)
	newer := *h.p
	newer.Files = []profile.File{h.p.Files[0], h.p.Files[1], {Path: "etc/new", Size: 5, Kind: profile.Read, Touched: -1}}
	newer.Files[0].Touched, newer.Files[0].Ranges = 3_000_000, nil
	newer.Files[1].Size, newer.Files[1].Kind = 2_000_000, profile.Exec
	file := filepath.Join(t.TempDir(), "newer.json")
	require.NoError(t, os.WriteFile(file, []byte(encoded(t, newer)), 0o600))
	socket := serve(t, &backend{hot: h}, config.Default())
	code, out, errs := ctl(t, "profile", "diff", image, file, "--address", socket)
	require.Zero(t, code, errs)
	golden(t, "profile-diff", out)
	code, out, errs = ctl(t, "profile", "diff", image, file, "--json", "--address", socket)
	require.Zero(t, code, errs)
	golden(t, "profile-diff.json", out)
	code, out, errs = stdin(t, encoded(t, *h.p), "profile", "diff", image, "-", "--address", socket)
	require.Zero(t, code, errs)
	require.Equal(t, "0 removed (0 B), 0 added (0 B), 0 changed, 4 the same\n", out)
}

func TestWrongUseOfHot(t *testing.T) {
	socket := serve(t, &backend{hot: newHot(t)}, config.Default())
	for _, x := range []struct {
		args string
		code int
		text string
	}{
		{"profile", exitUsage, "say ls, show"},
		{"profile nonsense", exitUsage, "nonsense"},
		{"profile show", exitUsage, "accepts 1 arg(s), received 0; see nhybridctl profile show --help"},
		{"profile show nothing", exitFailure, `image "nothing": not found`},
		{"profile export nothing", exitFailure, `image "nothing": not found`},
		{"profile rm nothing", exitFailure, `image "nothing": not found`},
		{"profile push nothing", exitFailure, `image "nothing": not found`},
		{"profile pull nothing", exitFailure, `image "nothing": not found`},
		{"profile ready nothing", exitFailure, `container "nothing" is not starting: not found`},
		{"profile pin nothing *", exitFailure, `image "nothing": not found`},
		{"profile pin " + image, exitUsage, "accepts 2 arg"},
		{"profile pin " + image + " [a", exitFailure, `glob "[a" is malformed`},
		{"profile pin " + image + " {a,b}{a,b}{a,b}{a,b}{a,b}", exitFailure, "make several rules of it"},
		{"profile import /nowhere", exitFailure, "/nowhere: no such file"},
		{"profile import /", exitFailure, "read profile: read /: is a directory"},
		{"profile diff " + image + " ./missing.json", exitFailure, "./missing.json: no such file"},
		{"profile diff " + image + " hot_test.go", exitFailure, "hot_test.go: decode profile: invalid character '/'"},
		{"profile diff nothing " + image, exitFailure, `image "nothing": not found`},
		{"migrate", exitUsage, "say status"},
		{"migrate now please", exitUsage, "please"},
		{"top --interval 1ms", exitUsage, "--interval must be from 100ms to 1h0m0s"},
		{"top --interval soon", exitUsage, "soon"},
		{"inspect --files nothing", exitFailure, `"nothing": not found`},
		{"inspect --files " + image + " --path usr", exitUsage, "relative"},
		{"inspect --files " + image + " --path /not/there", exitFailure, `has no file with data at or below "/not/there"`},
		{"inspect --files " + image + " --path /usr/li", exitFailure, `has no file with data at or below "/usr/li"`},
		{"inspect --files " + image + " --path /usr --all", exitUsage, "exclude each other"},
		{"inspect --files " + image + " --depth -1", exitUsage, "--depth"},
		{"inspect --files " + image + " --sort heat", exitUsage, "path, files, size, hot, nvm"},
		{"inspect " + image + " --depth 1", exitUsage, "--depth is for --files"},
	} {
		code, out, errs := ctl(t, append(strings.Fields(x.args), "--address", socket)...)
		require.Equal(t, x.code, code, "%v: %s", x.args, errs)
		require.Empty(t, out, x.args)
		require.Contains(t, errs, x.text, "%v", x.args)
		require.Equal(t, 1, strings.Count(errs, "\n"), "%v: more than one line: %s", x.args, errs)
		require.True(t, strings.HasPrefix(errs, "nhybridctl: "), errs)
	}
}

func TestMigrateNow(t *testing.T) {
	state := func(s string, failed int64) *control.MigrationState {
		return &control.MigrationState{State: s, Now: s == "running", Failed: failed, LastError: "input/output error", LastErrorTime: moment}
	}
	for _, x := range []struct {
		name   string
		wait   bool
		states []*control.MigrationState // the first is before
		code   int
		want   string
	}{
		{"returns at once", false, []*control.MigrationState{state("idle", 0), state("running", 0)}, 0, "running, without limits"},
		{"nothing to do", true, []*control.MigrationState{state("idle", 4), state("idle", 4)}, 0, "idle"},
		{"waits", true, []*control.MigrationState{state("idle", 0), state("running", 0), state("waiting", 0), state("idle", 0)}, 0, "state    idle"},
		{"a file fails", true, []*control.MigrationState{state("idle", 1), state("running", 1), state("idle", 3)}, exitFailure, "2 files could not be moved; the last: input/output error"},
		{"paused", true, []*control.MigrationState{state("idle", 0), state("running", 0), state("paused", 0)}, exitFailure, "nhybridctl migrate resume"},
	} {
		t.Run(x.name, func(t *testing.T) {
			h := newHot(t)
			h.states = x.states
			args := []string{"migrate", "now", "--address", serve(t, &backend{hot: h}, config.Default())}
			if x.wait {
				args = append(args, "--wait")
			}
			code, out, errs := ctl(t, args...)
			require.Equal(t, x.code, code, errs)
			require.Contains(t, out+errs, x.want)
			if x.wait {
				require.Len(t, h.states, 1, "it did not wait to the end")
			}
		})
	}
}

func TestMigrateNowIsInterrupted(t *testing.T) {
	h := newHot(t) // waiting for ever
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var asked int
	h.asked = func() {
		if asked++; asked == 3 { // before, now, and while it waits
			cancel()
		}
	}
	socket := serve(t, &backend{hot: h}, config.Default())
	var out, errs bytes.Buffer
	require.Equal(t, exitFailure, run(ctx, []string{"migrate", "now", "--wait", "--address", socket}, &out, &errs))
	require.Contains(t, errs.String(), "the migration goes on")
}

func TestTop(t *testing.T) {
	socket := serve(t, &backend{hot: newHot(t)}, config.Default())
	code, out, errs := ctl(t, "top", "--once", "--address", socket)
	require.Zero(t, code, errs)
	require.Contains(t, out, "2 under way, 17 in all")
	require.Contains(t, out, "NVM 100, HDD 25, hit ratio 80.0 %\n")

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var lines []string
	var stderr bytes.Buffer
	code = run(ctx, []string{"top", "--json", "--interval", "100ms", "--address", socket}, writer(func(b []byte) {
		if lines = append(lines, string(b)); len(lines) == 3 {
			cancel()
		}
	}), &stderr)
	require.Zero(t, code, stderr.String())
	for i, l := range lines {
		var v struct {
			Sample struct {
				OpensNVM int64 `json:"opens_nvm"`
			} `json:"sample"`
			Rates *rates `json:"rates"`
		}
		require.NoError(t, json.Unmarshal([]byte(l), &v))
		require.Equal(t, 100*int64(i+2), v.Sample.OpensNVM)
		require.Equal(t, i > 0, v.Rates != nil)
		if i > 0 {
			require.InDelta(t, 0.8, *v.Rates.Hits, 1e-9)
			require.InDelta(t, 100, v.Rates.NVM*v.Rates.Seconds, 1e-6)
		}
	}
}

func TestTopText(t *testing.T) {
	var out bytes.Buffer
	a := &app{out: &out}
	require.NoError(t, a.topBlock(sample(1), nil))
	require.NoError(t, a.topBlock(sample(2), ratesOf(sample(1), sample(2))))
	quiet := sample(2)
	quiet.Time, quiet.Starts, quiet.TraceError = after(6*time.Second), nil, "fanotify is refused\nhere"
	require.NoError(t, a.topBlock(quiet, ratesOf(sample(2), quiet)))
	require.NoError(t, a.topBlock(&control.TopSample{}, ratesOf(quiet, &control.TopSample{}))) // the clock was set back
	golden(t, "top", out.String())

	out.Reset()
	c := &canvas{out: &out, width: 60, height: 12}
	require.NoError(t, a.topScreen(c, sample(1), nil))
	require.NoError(t, a.topScreen(c, quiet, ratesOf(sample(1), quiet)))
	golden(t, "top-screen", strings.ReplaceAll(out.String(), "\x1b", "<ESC>"))
}

func TestBar(t *testing.T) {
	for _, x := range []struct {
		h    heat
		want string
	}{
		{heat{}, "[          ]"},
		{heat{Bytes: 100, HotNVM: 100}, "[##########]"},
		{heat{Bytes: 100, HotNVM: 25, HotHDD: 25, ColdNVM: 25, ColdHDD: 25}, "[#+++===...]"},
		{heat{Bytes: 1e9, HotNVM: 1, HotHDD: 1, ColdNVM: 1, ColdHDD: 1e9 - 3}, "[#+=.......]"},
		{heat{Bytes: 3, HotNVM: 1, ColdHDD: 2}, "[###.......]"},
	} {
		require.Equal(t, x.want, x.h.bar(10, false))
	}
	painted := (&heat{Bytes: 2, HotNVM: 1, ColdHDD: 1}).bar(2, true)
	require.Equal(t, "[\x1b[31m#\x1b[0m\x1b[2m.\x1b[0m]", painted)
}
