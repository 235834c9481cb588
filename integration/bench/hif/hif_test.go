// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestParseStrace(t *testing.T) {
	o := parseStrace([]byte(`10 execve("/usr/bin/env", ["env"], 0x7ff /* 3 vars */) = 0
10 openat(AT_FDCWD</>, "/etc/ld.so.cache", O_RDONLY|O_CLOEXEC) = 3</etc/ld.so.cache>
10 openat(AT_FDCWD</>, "/gone", O_RDONLY) = -1 ENOENT (No such file or directory)
10 openat(AT_FDCWD</>, "/usr", O_RDONLY|O_PATH) = 3</usr>
10 openat(AT_FDCWD</>, "/etc/made", O_WRONLY|O_CREAT|O_TRUNC, 0666) = 4</etc/made>
11 openat(AT_FDCWD</srv>, "a b", O_RDONLY <unfinished ...>
10 execve("/missing", ["missing"], 0x7ff /* 3 vars */) = -1 ENOENT (No such file or directory)
12 execve("/bin/sh", ["sh"], 0x7ff /* 3 vars */ <unfinished ...>
11 <... openat resumed>) = 5</srv/a\40b\74c\76>
12 <... execve resumed>) = 0
10 execveat(AT_FDCWD</srv>, "run", ["run"], 0x7ff, 0) = 0
10 +++ exited with 0 +++
`))
	require.Equal(t, []string{"/etc/ld.so.cache", "/srv/a b<c>"}, o.files)
	require.Equal(t, []string{"/usr/bin/env", "/bin/sh", "run"}, o.programs)
}

func TestCompareFindsEveryDifference(t *testing.T) {
	trees := [2]string{t.TempDir(), t.TempDir()}
	for _, dir := range trees {
		require.NoError(t, os.MkdirAll(filepath.Join(dir, "d", "e"), 0o755))
		for _, name := range []string{"same", "content", "size", "mode", "time", "missing", "d/attribute"} {
			require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte("abc"), 0o644))
		}
		require.NoError(t, os.Symlink("same", filepath.Join(dir, "link")))
		for _, name := range []string{"same", "content", "size", "mode", "time", "missing", "d/attribute", "link"} {
			times := []unix.Timespec{{Sec: 1}, {Sec: 2}}
			require.NoError(t, unix.UtimesNanoAt(unix.AT_FDCWD, filepath.Join(dir, name), times, unix.AT_SYMLINK_NOFOLLOW))
		}
	}
	c, err := compare(t.Context(), trees[0], trees[1])
	require.NoError(t, err)
	require.Zero(t, c.Errors, c.First)
	require.Equal(t, 10, c.Entries)
	require.EqualValues(t, 21, c.Bytes)

	at := func(name string) string { return filepath.Join(trees[1], name) }
	keep := func(name string) {
		require.NoError(t, unix.UtimesNanoAt(unix.AT_FDCWD, at(name), []unix.Timespec{{Sec: 1}, {Sec: 2}}, unix.AT_SYMLINK_NOFOLLOW))
	}
	require.NoError(t, os.WriteFile(at("content"), []byte("abx"), 0o644))
	keep("content")
	require.NoError(t, os.WriteFile(at("size"), []byte("ab"), 0o644))
	keep("size")
	require.NoError(t, os.Chmod(at("mode"), 0o600))
	require.NoError(t, unix.UtimesNanoAt(unix.AT_FDCWD, at("time"), []unix.Timespec{{Sec: 1}, {Sec: 2, Nsec: 1}}, 0))
	require.NoError(t, os.Remove(at("missing")))
	require.NoError(t, os.WriteFile(at("new"), nil, 0o644))
	require.NoError(t, os.Remove(at("link")))
	require.NoError(t, os.Symlink("mode", at("link")))
	keep("link")
	if err := unix.Setxattr(at("d/attribute"), "user.x", []byte("1"), 0); err != nil {
		require.ErrorIs(t, err, unix.ENOTSUP)
		t.Skip("no extended attributes here")
	}
	c, err = compare(t.Context(), trees[0], trees[1])
	require.NoError(t, err)
	said := strings.Join(c.First, "\n")
	for _, name := range []string{"/content", "/size", "/mode", "/time", "/missing", "/new", "/link", "/d/attribute"} {
		require.Contains(t, said, name+":")
	}
	require.NotContains(t, said, "/same")
}

func TestFigures(t *testing.T) {
	image := func(name, category string, all, migrated, reads int64, missing ...string) row {
		return row{Part: partImages, Name: name, Image: &imageRow{
			Image: name, Category: category, Space: space{AllNVM: all, Migrated: migrated, Fixed: 10}, Integrity: &integrity{Errors: len(missing)},
			Trace: traceResult{Missing: missing}, First: map[string]start{},
			Second: map[string][]start{
				hybrid: {{ReadyS: 2}, {ReadyS: 1.1, Reads: reads}}, overlayNVM: {{ReadyS: 2}, {ReadyS: 1}}, overlayHDD: {{ReadyS: 8}},
			},
		}}
	}
	all := rows{image("a", "x", 100, 10, 0), image("b", "y", 100, 30, 3, "lost"), {Part: partCosts, Costs: &costRow{
		Watched: []float64{50}, Unwatched: []float64{100}, IdleCPUS: 1, IdleS: 60, MemoryBytes: 2e6, MemoryFiles: 1000,
	}}}
	all = append(all, row{Part: partSaved, Saved: &savedRow{Space: map[string]space{savedWarm: {AllNVM: 100, Migrated: 10}, savedReadAhead: {AllNVM: 50, Migrated: 20}}}},
		row{Part: partSaved, Saved: &savedRow{Space: map[string]space{savedWarm: {AllNVM: 100, Migrated: 20}, savedReadAhead: {AllNVM: 50, Migrated: 30}}}})
	got := map[string]float64{}
	all.figures(func(name string, v float64) { got[name] = v })
	for name, want := range map[string]float64{
		"nvm_saved_mean": 0.8, "nvm_saved_min": 0.7, "nvm_saved_fixed_mean": 0.7, "nvm_saved.x": 0.9, "trace_missing_max": 1,
		"second_start_hdd_reads_max": 3, "second_start_vs_nvm": 1.05, "second_start_vs_hdd": 0.25, "integrity_errors": 1,
		"nvm_saved_mean_warm": 0.85, "nvm_saved_min_warm": 0.8, "nvm_saved_mean_default_readahead": 0.5,
		"trace_overhead": 0.5, "trace_kb_per_1000_files": 2000,
	} {
		require.InDelta(t, want, got[name], 1e-9, name)
	}
	for _, r := range all {
		require.NotEqual(t, "nothing", r.summary())
	}
}

func TestPictureIsXML(t *testing.T) {
	c := curve{Samples: []sample{{0, 0}, {1.5, 80e6}, {4, 5e6}}, Marks: []mark{{0, "pull"}, {2, "a < b"}}}
	for _, r := range []*curveRow{{Image: "<&>", Hybrid: c, AllNVM: c}, {}} {
		for d := xml.NewDecoder(strings.NewReader(string(picture(r)))); ; {
			_, err := d.Token()
			if errors.Is(err, io.EOF) {
				break
			}
			require.NoError(t, err)
		}
	}
}
