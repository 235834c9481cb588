// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build integration

package parts

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/hif/trace"
	"github.com/nhybrid/nhybrid/integration/hddsim"
	"github.com/nhybrid/nhybrid/integration/hddsim/block"
	"github.com/nhybrid/nhybrid/integration/image"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// A subject is an image whose start opens large files.
type subject struct {
	name, packages string
	files          []image.Entry
	env            []string
	command        []string
	ready          string // a bash command run beside the container; "": the start is over when the program ends, well
}

func file(name string, mode int64, data string) image.Entry {
	return image.Entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, ModTime: time.Unix(1700000000, 0)}, Data: []byte(data)}
}

func subjects(t *testing.T) []subject {
	const http = `exec 3<>/dev/tcp/127.0.0.1/8000 && printf 'GET / HTTP/1.0\r\nHost: localhost\r\n\r\n' >&3 && head -1 <&3 | grep -q ' 200 '`
	return []subject{
		{name: "java -version", packages: "default-jre-headless", command: []string{"java", "-version"}},
		{name: "java", packages: "default-jre-headless", command: []string{"java", "-cp", "/app", "Main"},
			files: []image.Entry{file("app/Main.class", 0o644, string(javaClass(t)))}},
		{name: "node", packages: "nodejs node-express", command: []string{"node", "/app/server.js"}, ready: http, files: []image.Entry{file("app/server.js", 0o644,
			"const app = require('express')();\napp.get('/', (req, res) => res.send('hello'));\napp.listen(8000);\n")}},
		{name: "postgres", packages: "postgresql-15", command: []string{"/entry.sh"}, files: []image.Entry{file("entry.sh", 0o755, postgresEntry)},
			ready: `chroot "$ROOT" su postgres -c '/usr/lib/postgresql/15/bin/psql -c "select 1"'`},
		{name: "php", packages: "php-cli", command: []string{"php", "/app/index.php"},
			files: []image.Entry{file("app/index.php", 0o644, "<?php echo json_encode(['at' => date('c'), 'n' => preg_match('/x+/u', 'axx')]), \"\\n\";\n")}},
		{name: "go", command: []string{"/server"}, ready: http, files: []image.Entry{file("server", 0o755, string(goProgram(t)))}},
	}
}

const postgresEntry = `#!/bin/bash
set -Eeuo pipefail
export PATH=$PATH:/usr/lib/postgresql/15/bin PGDATA=/var/lib/postgresql/data LANG=C.UTF-8
if [ "$(id -u)" = '0' ]; then
	mkdir -p "$PGDATA" /var/run/postgresql
	chown -R postgres:postgres "$PGDATA" /var/run/postgresql
	exec setpriv --reuid=postgres --regid=postgres --init-groups "$BASH_SOURCE" "$@"
fi
initdb --username=postgres --no-sync >/dev/null
exec postgres
`

// javaClass is a program that does what small programs do: collections, streams, text, regular expressions, a thread.
func javaClass(t *testing.T) []byte {
	source := `import java.util.*; import java.util.stream.*; import java.util.regex.*;
public class Main { public static void main(String[] a) throws Exception {
	Map<String, List<Integer>> m = IntStream.range(0, 1000).boxed().collect(Collectors.groupingBy(i -> "k" + i % 7));
	Thread t = new Thread(() -> System.out.println(String.format("%s %d", Pattern.compile("k[0-9]").matcher("k1").matches(), m.size())));
	t.start(); t.join();
} }`
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "Main.java"), []byte(source), 0o600))
	run(t, "javac", "--release", "17", "-d", dir, filepath.Join(dir, "Main.java"))
	b, err := os.ReadFile(filepath.Join(dir, "Main.class"))
	require.NoError(t, err)
	return b
}

func goProgram(t *testing.T) []byte {
	source := `package main
import ("database/sql"; "encoding/json"; "html/template"; "net/http"; "os"; "go/parser"; "go/token"; "go/types"; "image/png"; "encoding/xml")
var _ = []any{sql.Open, template.New, parser.ParseFile, token.NewFileSet, types.NewPackage, png.Decode, xml.Marshal}
func main() {
	if len(os.Args) > 1 { fs := token.NewFileSet(); f, _ := parser.ParseFile(fs, os.Args[1], nil, 0); (&types.Config{}).Check("x", fs, nil, nil); _ = f; png.Decode(os.Stdin); template.Must(template.New("x").Parse(os.Args[1])).Execute(os.Stdout, os.Args) }
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) { json.NewEncoder(w).Encode(r.Header) })
	http.ListenAndServe("127.0.0.1:8000", nil)
}`
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "main.go"), []byte(source), 0o600))
	cmd := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-o", filepath.Join(dir, "server"), filepath.Join(dir, "main.go"))
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, string(out))
	b, err := os.ReadFile(filepath.Join(dir, "server"))
	require.NoError(t, err)
	return b
}

func build(t *testing.T, b *image.Builder, s subject) v1.Image {
	spec := image.Spec{Name: s.name, Steps: []image.Step{{Base: []string{}, History: "/bin/sh -c #(nop) ADD file:eb251942 in / "}}}
	if s.packages != "" {
		spec.Steps = append(spec.Steps, image.Step{Packages: strings.Fields(s.packages),
			History: "/bin/sh -c apt-get update && apt-get install -y --no-install-recommends " + s.packages + " && rm -rf /var/lib/apt/lists/*"})
	}
	if len(s.files) > 0 {
		spec.Steps = append(spec.Steps, image.Step{Files: s.files, History: "COPY . / # buildkit"})
	}
	img, err := b.Build(t.Context(), spec)
	require.NoError(t, err)
	return img
}

// bench is an emulated HDD, an NVM in memory, and one image on them, as one layer: a tree, its files in a pack on HDD, and
// in place of a view once more there, by their numbers.
type bench struct {
	t         *testing.T
	dir       string
	disk      *hddsim.Disk
	nvm, home string // data roots
	packs     *packs
	tree      string
	image     string
	bytes     int64               // of the files
	paths     map[pack.Ref]string // where containers see them
}

func newBench(t *testing.T) *bench {
	dir, err := os.MkdirTemp("/dev/shm", "parts-")
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	disk, err := hddsim.Start(t.Context(), hddsim.Options{Dir: filepath.Join(dir, "disk"), Model: &hddsim.Model{}})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, disk.Close()) })
	nvm := filepath.Join(dir, "nvm")
	require.NoError(t, os.WriteFile(nvm+".img", nil, 0o600))
	require.NoError(t, os.Truncate(nvm+".img", 2<<30))
	require.NoError(t, block.MakeExt4(t.Context(), nvm+".img"))
	loop, err := block.Attach(nvm + ".img")
	require.NoError(t, err)
	t.Cleanup(func() { loop.Close() })
	require.NoError(t, block.Mount(loop.Path(), nvm, "ext4", unix.MS_NOATIME, ""))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(nvm, unix.MNT_DETACH)) })
	b := &bench{t: t, dir: dir, disk: disk, nvm: filepath.Join(nvm, "d"), home: filepath.Join(disk.Mountpoint(), "h"), tree: filepath.Join(dir, "tree"), image: filepath.Join(nvm, "parts.erofs")}
	require.NoError(t, os.Mkdir(b.nvm, 0o755))
	require.NoError(t, os.Mkdir(b.home, 0o755))
	return b
}

// unpack puts the image on HDD as one layer, and its metadata into the tree.
func (b *bench) unpack(img v1.Image) {
	t := b.t
	b.packs, b.paths = newPacks(b.disk.Mountpoint()), map[pack.Ref]string{}
	unpacked := filepath.Join(b.disk.Mountpoint(), "unpacked")
	require.NoError(t, errors.Join(os.RemoveAll(unpacked), os.RemoveAll(b.tree), os.RemoveAll(filepath.Join(b.home, "1")),
		os.RemoveAll(filepath.Join(b.nvm, "1")), os.RemoveAll(b.packs.PackPath(1)), os.Mkdir(unpacked, 0o755)))
	layers, err := img.Layers()
	require.NoError(t, err)
	for _, l := range layers {
		r, err := l.Uncompressed()
		require.NoError(t, err)
		_, err = archive.Apply(t.Context(), unpacked, r)
		require.NoError(t, err)
		_, err = io.Copy(io.Discard, r)
		require.NoError(t, errors.Join(err, r.Close()))
	}
	run(t, "cp", "-a", "--attributes-only", unpacked, b.tree)
	b.bytes = 0
	ref := pack.Ref{Layer: 1}
	require.NoError(t, filepath.WalkDir(unpacked, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err != nil || info.Size() == 0 {
			return err
		}
		b.bytes += info.Size()
		ref.Number++
		redirect := ref.Redirect()
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		b.packs.add(t, redirect, data)
		b.paths[ref] = strings.TrimPrefix(path, unpacked)
		hole := b.tree + b.paths[ref]
		return errors.Join(os.MkdirAll(filepath.Dir(b.home+redirect), 0o755), os.Rename(path, b.home+redirect), os.Truncate(hole, info.Size()),
			unix.Setxattr(hole, "trusted.overlay.metacopy", nil, 0), unix.Setxattr(hole, "trusted.overlay.redirect", []byte(redirect), 0))
	}))
}

// promote puts whole files on NVM, and nothing else.
func (b *bench) promote(redirects []string) (bytes int64) {
	require.NoError(b.t, os.RemoveAll(filepath.Join(b.nvm, "1")))
	for _, r := range redirects {
		dst := b.nvm + r
		require.NoError(b.t, os.MkdirAll(filepath.Dir(dst), 0o755))
		run(b.t, "cp", b.home+r, dst)
		st, err := os.Stat(dst)
		require.NoError(b.t, err)
		bytes += st.Size()
	}
	return bytes
}

// opening ends when the command does, or when it is ready. Arguments: ROOT READY VARIABLE=… COMMAND…
const startScript = `set -u
export ROOT=$1; READY=$2; shift 2
ip link set lo up
mkdir -p "$ROOT/proc" "$ROOT/dev" "$ROOT/tmp" "$ROOT/run"
mount -t proc proc "$ROOT/proc"
mount -t tmpfs tmpfs "$ROOT/tmp"
mount --rbind /dev "$ROOT/dev"
mount -t tmpfs tmpfs "$ROOT/dev/shm"
date +%s%N
env -i "$@" </dev/null >/dev/null 2>&1 &
pid=$!
if [ -z "$READY" ]; then
	wait $pid || exit
else
	for i in $(seq 3000); do
		if (eval "$READY") >/dev/null 2>&1; then break; fi
		kill -0 $pid || exit 1
		sleep 0.01
	done
fi
date +%s%N
`

// result of a start.
type result struct {
	time  time.Duration
	reads int64 // of the HDD
	bytes int64 // read from the HDD
	trace trace.Trace
}

// start runs a container with cold caches.
func (b *bench) start(s subject, parts string, traced bool) result {
	t := b.t
	dir, err := os.MkdirTemp(b.dir, "run-")
	require.NoError(t, err)
	for _, d := range []string{"upper", "work", "root"} {
		require.NoError(t, os.Mkdir(filepath.Join(dir, d), 0o755))
	}
	root := filepath.Join(dir, "root")
	lower := []string{b.tree, b.nvm}
	if parts != "" {
		lower = append(lower, parts)
	}
	lower = append(lower, b.home)
	var w *trace.Watch
	var tr *trace.Tracer
	if traced {
		tr, err = trace.New(trace.Config{Root: b.nvm, Quiet: time.Hour, Max: time.Hour})
		require.NoError(t, err)
	}
	unix.Sync()
	require.NoError(t, os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0))
	if traced {
		w, err = tr.Watch(trace.Start{Snapshot: "1", Upper: filepath.Join(dir, "upper"), Tree: b.tree, Parts: parts, Home: b.home, Layers: []string{"1"},
			Path: func(ref pack.Ref) string { return b.paths[ref] }})
		require.NoError(t, err)
	}
	if parts != "" {
		ReadAhead(b.image, math.MaxInt64) // as the manager does while runc works
	}
	require.NoError(t, unix.Mount("overlay", root, "overlay", 0, "lowerdir="+strings.Join(lower, "::")+",upperdir="+dir+"/upper,workdir="+dir+"/work"))
	defer func() { require.NoError(t, errors.Join(unix.Unmount(root, unix.MNT_DETACH), os.RemoveAll(dir))) }()
	before, err := b.disk.Counters()
	require.NoError(t, err)
	env := append([]string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"}, s.env...)
	args := append([]string{"--mount", "--pid", "--net", "--ipc", "--fork", "--kill-child=SIGKILL", "bash", "-c", startScript, "bash", root, s.ready}, env...)
	args = append(append(args, "/usr/bin/unshare", "--root="+root, "--wd=/"), s.command...)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, "unshare", args...).Output()
	require.NoError(t, err, "%s", out)
	after, err := b.disk.Counters()
	require.NoError(t, err)
	var from, to int64
	_, err = fmt.Sscan(string(out), &from, &to)
	require.NoError(t, err)
	r := result{time: time.Duration(to - from), reads: after.Reads - before.Reads, bytes: after.ReadBytes - before.ReadBytes}
	if traced {
		w.Ready()
		r.trace = w.Result()
		require.True(t, r.trace.Complete)
		require.True(t, r.trace.Executed())
		require.NoError(t, tr.Close())
	}
	return r
}

func wants(files []trace.File) (all []Want) {
	for _, f := range files {
		if f.Touched < 0 || len(f.Ranges) == 0 {
			continue
		}
		w := Want{Redirect: f.Redirect(), Size: f.Size}
		for _, r := range f.Ranges {
			w.Ranges = append(w.Ranges, Range{r.Offset, r.Length})
		}
		all = append(all, w)
	}
	return all
}

func median(rs []result) result {
	slices.SortFunc(rs, func(a, b result) int { return int(a.time - b.time) })
	m := rs[len(rs)/2]
	for _, r := range rs {
		m.reads, m.bytes = max(m.reads, r.reads), max(m.bytes, r.bytes)
	}
	return m
}

// TestWhatPartsSave gives the figures of docs/hif.md. It drops the caches of the machine before each start.
func TestWhatPartsSave(t *testing.T) {
	builder, err := image.NewBuilder("")
	require.NoError(t, err)
	only, n := os.Getenv("NHYBRID_SUBJECT"), 5
	if v := os.Getenv("NHYBRID_STARTS"); v != "" {
		n, err = strconv.Atoi(v)
		require.NoError(t, err)
	}
	for _, s := range subjects(t) {
		if only != "" && s.name != only {
			continue
		}
		img := build(t, builder, s)
		t.Run(s.name, func(t *testing.T) {
			b := newBench(t)
			b.unpack(img)
			first := b.start(s, "", true)
			var hot []string
			for _, f := range first.trace.Files {
				hot = append(hot, f.Redirect())
			}
			whole := b.promote(hot)
			require.NoError(t, b.disk.SetModel(hddsim.HDD()))
			point := filepath.Join(b.dir, "point")
			t.Cleanup(func() { require.NoError(t, Unmount(point)) })
			set := Choose(wants(first.trace.Files), Rules{Spare: b.bytes * 3 / 100})
			files := set.Files
			st, err := Write(t.Context(), b.image, b.nvm, b.packs, set, noPace)
			require.NoError(t, err)
			require.NoError(t, Mount(b.image, point, b.packs.PackPath))
			divide := func() {
				for _, f := range files {
					require.NoError(t, os.Remove(b.nvm+f.Redirect))
				}
			}
			// By turns, since others work on the machine, too.
			var onNVM, divided []result
			for range n {
				b.promote(hot)
				onNVM = append(onNVM, b.start(s, "", false))
				divide()
				divided = append(divided, b.start(s, point, false))
			}
			a, d := median(onNVM), median(divided)
			t.Logf("| %s | %d, %.1f | %d, %.1f → %.1f | %.1f | %d, %d | %d ms, %d ms, %.2f |", s.name, len(hot), float64(whole)/1e6,
				len(files), float64(st.Whole)/1e6, float64(st.Bytes)/1e6, float64(whole-st.Whole+st.Bytes)/1e6, a.reads, d.reads,
				a.time.Milliseconds(), d.time.Milliseconds(), float64(d.time)/float64(a.time))
			// Of a start with parts is learned what it touched beyond them.
			second := b.start(s, point, true)
			parts, beyond := 0, int64(0)
			for _, f := range second.trace.Files {
				i := slices.IndexFunc(files, func(d File) bool { return d.Redirect == f.Redirect() })
				if !f.Parts {
					continue
				}
				parts++
				for _, r := range files[i].Cold(wants([]trace.File{f})[0].Ranges) {
					beyond += r.Length
				}
			}
			require.Len(t, files, parts)
			t.Logf("margin %d KiB; a second trace has %d kB beyond what is hot", set.Margin>>10, beyond/1000)
		})
	}
}
