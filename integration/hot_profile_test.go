//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/integration/image"
	"github.com/nhybrid/nhybrid/integration/rig"
	"github.com/nhybrid/nhybrid/integration/workload"
)

// versions pushes app:1 and app:2, which have all but the topmost layer in common. Of /top the second has another content of
// one file, and one more.
func versions(t *testing.T, r *rig.Rig) {
	t.Helper()
	var common []image.Entry
	for i := range 20 {
		common = append(common, plain(fmt.Sprintf("common/%d", i), workload.Bytes(uint64(i), 20000)))
	}
	base := ofFiles(t, common...)
	one := []image.Entry{plain("top/a", workload.Bytes(50, 9000)), plain("top/b", workload.Bytes(51, 9000)), plain("top/c", workload.Bytes(52, 9000))}
	_, err := r.PushBusybox(t.Context(), "app:1", base, ofFiles(t, one...))
	require.NoError(t, err)
	two := append(one[:2:2], plain("top/c", workload.Bytes(53, 9001)), plain("top/new", workload.Bytes(54, 9000)))
	_, err = r.PushBusybox(t.Context(), "app:2", base, ofFiles(t, two...))
	require.NoError(t, err)
}

const startOfApp = "cat /common/3 /common/7 /top/a /top/c >/dev/null"

var hotOfApp = []string{"bin/busybox", "common/3", "common/7", "top/a", "top/c"}

// fast tells which files of an image are on NVM, but for those that containerd reads.
func fast(t *testing.T, r *rig.Rig, ref string) []string {
	t.Helper()
	var answer struct{ Files []hotFile }
	ctl(t, r, &answer, "inspect", "--files", "--all", "--sort", "path", ref)
	var all []string
	for _, f := range answer.Files {
		if f.NVMBytes > 0 {
			all = append(all, f.Path)
		}
	}
	return withoutUsers(all)
}

// now has everything moved that is due.
func now(t *testing.T, r *rig.Rig) {
	t.Helper()
	_, err := r.Nhybridctl(soon(t), "migrate", "now", "--wait")
	require.NoError(t, err)
}

// One node learns, and pushes what it knows beside the image; another pulls the image and has its hot files on NVM before
// it has ever started it. A third does not ask registries, and carries what it learned over to the next version.
func TestProfilesTravel(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	args := hot("--set", "hot.predict=off", "--set", "placement.policy=hdd")
	first := newRig(t, rig.Options{DaemonArgs: args})
	versions(t, first)
	ref := first.Ref("app:1")
	require.NoError(t, first.Pull(ctx, "app:1"))
	_, err := first.Nhybridctl(ctx, "profile", "push", ref)
	require.ErrorContains(t, err, "not found")
	run(t, first, "app:1", "sh", "-c", startOfApp)
	awaitMigration(t, first, 1)
	require.Equal(t, hotOfApp, fast(t, first, ref))
	_, err = first.Nhybridctl(ctx, "profile", "push", ref)
	require.NoError(t, err)

	pull := func(r *rig.Rig, ref string) {
		t.Helper()
		_, err := r.Ctr(ctx, "images", "pull", "--plain-http", ref)
		require.NoError(t, err)
	}
	second := newRig(t, rig.Options{DaemonArgs: args})
	pull(second, ref)
	p := awaitProfile(t, second, ref, func(s shown) error {
		if s.Info.Known != "pulled" {
			return fmt.Errorf("known: %q", s.Info.Known)
		}
		return nil
	})
	require.Equal(t, hotOfApp, withoutUsers(p.paths()))
	now(t, second)
	require.Equal(t, hotOfApp, fast(t, second, ref), "before it was ever started")
	// What is learned here is added.
	_, err = second.Ctr(ctx, "run", "--rm", ref, "c", "cat", "/common/9")
	require.NoError(t, err)
	awaitMigration(t, second, 1)
	p = profileOf(t, second, ref)
	require.Equal(t, "traced", p.Info.Known)
	require.Contains(t, p.paths(), "common/9")
	require.Contains(t, p.paths(), "top/a")

	third := newRig(t, rig.Options{DaemonArgs: append(args, "--set", "hot.fetch_profiles=false")})
	pull(third, ref)
	now(t, third)
	_, err = third.Nhybridctl(ctx, "profile", "show", ref)
	require.ErrorContains(t, err, "not found")
	require.Empty(t, fast(t, third, ref))
	// But it can be told to.
	_, err = third.Nhybridctl(ctx, "profile", "pull", ref)
	require.NoError(t, err)
	require.Equal(t, "pulled", profileOf(t, third, ref).Info.Known)
	_, err = third.Nhybridctl(ctx, "profile", "rm", ref)
	require.NoError(t, err)
	_, err = third.Nhybridctl(ctx, "profile", "show", ref)
	require.ErrorContains(t, err, "not found")

	_, err = third.Ctr(ctx, "run", "--rm", ref, "c", "sh", "-c", startOfApp)
	require.NoError(t, err)
	awaitMigration(t, third, 1)
	digest := profileOf(t, third, ref).Profile.Image
	_, err = third.Ctr(ctx, "images", "rm", "--sync", ref)
	require.NoError(t, err)
	awaitEmpty(t, third)
	ref = first.Ref("app:2")
	pull(third, ref)
	p = awaitProfile(t, third, ref, func(s shown) error {
		if s.Info.Known != "inherited" {
			return fmt.Errorf("known: %q", s.Info.Known)
		}
		return nil
	})
	require.Equal(t, digest, p.Profile.Inherited)
	now(t, third)
	require.Equal(t, hotOfApp, fast(t, third, ref), "before it was ever started")
}

// What comes from outside is held against the image, and bad input leaves everything as it was.
func TestImportOfProfiles(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{DaemonArgs: hot()})
	versions(t, r)
	ref := r.Ref("app:1")
	require.NoError(t, r.Pull(ctx, "app:1"))
	run(t, r, "app:1", "sh", "-c", startOfApp)
	awaitMigration(t, r, 1)
	good, err := r.Nhybridctl(ctx, "profile", "export", ref)
	require.NoError(t, err)

	bring := func(data string, args ...string) (string, error) {
		cmd, err := r.Command(ctx, "nhybridctl", append([]string{"profile", "import", "--json", "-"}, args...)...)
		require.NoError(t, err)
		cmd.Stdin = strings.NewReader(data)
		var out, said bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &said
		if err := cmd.Run(); err != nil {
			return "", fmt.Errorf("%w: %s", err, &said)
		}
		return out.String(), nil
	}
	// changed is the good profile with some of it replaced; with "file", in that of top/c.
	changed := func(what map[string]any) string {
		var p map[string]any
		require.NoError(t, json.Unmarshal([]byte(good), &p))
		if file, ok := what["file"].(map[string]any); ok {
			for _, f := range p["files"].([]any) {
				if f := f.(map[string]any); f["path"] == "top/c" {
					maps.Copy(f, file)
				}
			}
		} else {
			maps.Copy(p, what)
		}
		schema, err := json.Marshal(p["schema"])
		require.NoError(t, err)
		delete(p, "schema")
		b, err := json.Marshal(p)
		require.NoError(t, err)
		return fmt.Sprintf(`{"schema":%s,%s`, schema, b[1:]) // it comes first
	}
	file := func(key string, value any) string { return changed(map[string]any{"file": map[string]any{key: value}}) }
	many := strings.Builder{}
	for i := range 200_001 {
		fmt.Fprintf(&many, `{"path":"f%d","layer":0,"size":1,"kind":"read","starts":1,"lastStart":1,"weight":1,"touched":-1},`, i)
	}
	other := "sha256:" + strings.Repeat("ab", 32)
	for name, c := range map[string]struct {
		data string
		want []string
	}{
		"outside":           {file("path", "../etc/passwd"), []string{"../etc/passwd"}},
		"dots":              {file("path", "top/../../etc/passwd"), []string{"top/../../etc/passwd"}},
		"absolute":          {file("path", "/etc/passwd"), []string{"/etc/passwd"}},
		"zero":              {file("path", "etc/pass\x00wd"), []string{"zero byte"}},
		"no path":           {file("path", ""), []string{"path"}},
		"no such layer":     {file("layer", 9), []string{"layer 9"}},
		"weight":            {file("weight", 7), []string{"weight"}},
		"other image":       {changed(map[string]any{"image": other}), []string{other, "not found"}},
		"other layers":      {changed(map[string]any{"layers": []string{other, other, other}}), []string{"layer 0", other}},
		"schema to come":    {changed(map[string]any{"schema": 2}), []string{"schema 2"}},
		"no schema":         {changed(map[string]any{"schema": nil}), []string{"schema"}},
		"unknown field":     {changed(map[string]any{"surprise": 1}), []string{"surprise"}},
		"malformed glob":    {changed(map[string]any{"rules": []any{map[string]string{"glob": "[", "action": "pin"}}}), []string{"malformed"}},
		"cut off":           {good[:len(good)/2], []string{"profile"}},
		"no JSON":           {"hello", []string{"profile"}},
		"nothing":           {"", []string{"profile"}},
		"too many files":    {strings.Replace(changed(nil), `"files":[`, `"files":[`+many.String(), 1), []string{"200000"}},
		"too many bytes":    {strings.Repeat(" ", 33<<20), []string{"profile"}},
		"of the wrong type": {changed(map[string]any{"files": "all"}), []string{"files"}},
	} {
		_, err := bring(c.data)
		require.Error(t, err, name)
		said := err.Error()
		require.Equal(t, 1, strings.Count(strings.TrimSpace(said), "nhybridctl:"), "%s: one line: %s", name, said)
		require.Less(t, len(said), 600, "%s: %s", name, said)
		require.NotContains(t, strings.TrimSpace(said), "\n", name)
		for _, w := range c.want {
			require.Contains(t, said, w, name)
		}
		after, err := r.Nhybridctl(ctx, "profile", "export", ref)
		require.NoError(t, err)
		require.Equal(t, good, after, "%s: changed something", name)
	}
	_, err = bring(good, "--image", r.Ref("none:1"))
	require.ErrorContains(t, err, "not found")

	// What the image does not have is left out and named.
	for key, c := range map[string]struct {
		value any
		why   string
	}{"path": {"bin/sh", "no such regular file"}, "size": {99999, "bytes, not 99999"}, "layer": {0, "not 0"}} {
		out, err := bring(file(key, c.value))
		require.NoError(t, err, key)
		require.Contains(t, out, c.why)
		p := profileOf(t, r, ref)
		require.Equal(t, "pulled", p.Info.Known)
		require.NotContains(t, p.paths(), "bin/sh")
	}
	out, err := bring(file("path", "top/none"))
	require.NoError(t, err)
	require.Contains(t, out, "top/none")
	_, err = bring(good)
	require.NoError(t, err)
	require.Equal(t, hotOfApp, withoutUsers(func() []string { p := profileOf(t, r, ref); return p.paths() }()))
}

// Rules of the operator move files at once; forgetting a profile forgets them.
func TestPinAndExclude(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{DaemonArgs: hot("--set", "hot.predict=off")})
	versions(t, r)
	ref := r.Ref("app:1")
	require.NoError(t, r.Pull(ctx, "app:1"))
	run(t, r, "app:1", "sh", "-c", startOfApp)
	awaitMigration(t, r, 1)
	profile := func(args ...string) {
		t.Helper()
		_, err := r.Nhybridctl(ctx, append([]string{"profile"}, args...)...)
		require.NoError(t, err)
	}
	becomes := func(path string, there bool) {
		t.Helper()
		await(t, func(context.Context) error {
			if f := hotFiles(t, r, "app:1")[path]; (f.NVMBytes > 0) != there {
				return fmt.Errorf("%+v", f)
			}
			return nil
		})
	}
	profile("pin", ref, "/common/1?")
	for i := 10; i < 20; i++ {
		becomes(fmt.Sprintf("common/%d", i), true)
	}
	require.True(t, hotFiles(t, r, "app:1")["common/11"].Pinned)
	profile("exclude", ref, "**/1[0-4]")
	becomes("common/10", false)
	becomes("common/15", true)
	profile("exclude", ref, "top/a")
	becomes("top/a", false)
	run(t, r, "app:1", "sh", "-c", startOfApp)
	awaitMigration(t, r, 2)
	require.Zero(t, hotFiles(t, r, "app:1")["top/a"].NVMBytes, "though starts use it")
	profile("unpin", ref, "top/a")
	becomes("top/a", true)
	_, err := r.Nhybridctl(ctx, "profile", "pin", ref, "[")
	require.ErrorContains(t, err, "malformed")

	// Of an image that is not known, nothing leaves: what stands on NVM stays, pins included.
	profile("rm", ref)
	_, err = r.Nhybridctl(ctx, "profile", "rm", ref)
	require.ErrorContains(t, err, "not found")
	now(t, r)
	for _, f := range hotFiles(t, r, "app:1") {
		require.False(t, f.Hot || f.Pinned, "%+v", f)
	}
	run(t, r, "app:1", "sh", "-c", startOfApp)
	awaitMigration(t, r, 3)
	require.Equal(t, hotOfApp, fast(t, r, ref))
	removeImage(t, r, "app:1")
	awaitEmpty(t, r)
}
