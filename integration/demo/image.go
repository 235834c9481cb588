// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"context"
	_ "embed"
	"path/filepath"
	"runtime"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/nhybrid/nhybrid/integration/image"
)

// recipe is an image to show. Which of its layers is downloaded last is not for it to say; sizes alone make one likely.
type recipe struct {
	about   string
	names   []string // of the layers, bottom first
	build   func(ctx context.Context, cache string) (v1.Image, error)
	command []string // to run in a container
	file    string   // of the image, to ask about
}

//go:embed app.py
var app []byte

// packages of Debian 12 by layer. Their files are unpacked, not installed: a minimal installed Debian would be larger than
// any layer above it that a demo has the time for, and the last to arrive. So what a package needs stands beside it, and what its
// installation scripts would do is in environment. The layer of node and perl is large enough to be still on its way when the
// daemon is asked for a place for that of python, and to be there before it.
var packages = [][]string{
	{
		"base-files", "base-passwd", "bash", "coreutils", "dash", "debianutils", "grep", "sed", "libacl1", "libattr1", "libc6", "libc-bin",
		"libcrypt1", "libgcc-s1", "libgmp10", "libpcre2-8-0", "libselinux1", "libtinfo6", "zlib1g",
	},
	{"ca-certificates"},
	{"tzdata"},
	{
		"python3", "python3-minimal", "python3.11", "python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib", "libbz2-1.0",
		"libdb5.3", "libexpat1", "libffi8", "liblzma5", "libncursesw6", "libreadline8", "libsqlite3-0", "libuuid1", "media-types",
		"python3-numpy", "python3-scipy", "python3-decorator", "libopenblas0-pthread", "libgfortran5", "libquadmath0", "libgomp1", "libstdc++6",
		"liblbfgsb0", "libssl3",
	},
	{
		"nodejs", "libnode108", "libbrotli1", "libc-ares2", "libicu72", "libnghttp2-14", "libuv1", "perl", "perl-base",
		"perl-modules-5.36", "libperl5.36", "libgdbm6", "libgdbm-compat4",
	},
}

// libraries is Debian's directory for this architecture.
var libraries = "/usr/lib/" + map[string]string{"amd64": "x86_64", "arm64": "aarch64"}[runtime.GOARCH] + "-linux-gnu"

var environment = []string{
	"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", "TZ=Europe/Prague",
	"LD_LIBRARY_PATH=" + libraries + "/openblas-pthread",
}

var packagesNames = []string{"base", "ca-certificates", "tzdata", "python, numpy, scipy", "node, perl", "app", "conf"}

var packagesRecipe = recipe{
	about: "of Debian 12 packages, kept in out/cache",
	names: packagesNames,
	build: func(ctx context.Context, cache string) (v1.Image, error) {
		b, err := image.NewBuilder(cache)
		if err != nil {
			return nil, err
		}
		b.Log = func(format string, args ...any) { line("  "+format, args...) }
		spec := image.Spec{Name: "demo", Config: v1.Config{Env: environment, Cmd: []string{"python3", "/opt/app.py"}}}
		for _, names := range packages {
			spec.Steps = append(spec.Steps, image.Step{Extract: names})
		}
		spec.Steps = append(spec.Steps, files("opt/app.py", app), files("etc/app.conf", []byte("greeting = Hello from two tiers\n")))
		for i := range spec.Steps {
			spec.Steps[i].History = packagesNames[i]
		}
		return b.Build(ctx, spec)
	},
	command: []string{"python3", "/opt/app.py"},
	file:    "/usr/bin/python3.11",
}

// files is a layer of one file.
func files(name string, data []byte) image.Step {
	old := time.Unix(1_700_000_000, 0) // fixed, so that equal content has equal digests
	return image.Step{Files: []image.Entry{
		{Header: tar.Header{Typeflag: tar.TypeDir, Name: filepath.Dir(name) + "/", Mode: 0o755, ModTime: old}},
		{Header: tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, ModTime: old}, Data: data},
	}}
}

// tinyRecipe needs no packages, and a second.
var tinyRecipe = recipe{
	about: "of generated files over busybox",
	names: []string{"busybox", "small", "small", "big", "small", "app", "conf"},
	build: func(context.Context, string) (v1.Image, error) {
		return image.Tiny(image.TinySpec{Runnable: true, Layers: []int64{200_000, 100_000, 15_000_000, 100_000, 50_000, 0}})
	},
	command: []string{"sh", "-c", "echo $(busybox | head -n 1): $(ls /data | wc -l) entries, shared is of layer $(cat /data/shared)"},
	file:    "/bin/busybox",
}
