// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scm

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/nhybrid/nhybrid/integration/image"
)

const (
	goWorker     = "scm-go"
	cWorker      = "scm-c"
	pmdkWorker   = "scm-pmdk"
	pmdkWide     = "scm-pmdk-wide" // with nodes of 32 children
	sqliteWorker = "scm-sqlite"
	preload      = "libscm_preload.so"
	redisServer  = "redis-server"
	module       = "github.com/nhybrid/nhybrid"
)

// directory is where a package of this repository lies.
func directory(ctx context.Context, pkg string) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "list", "-f", "{{.Dir}}", module+"/"+pkg).Output()
	if err != nil {
		return "", fmt.Errorf("find package %q: %w; run it within the repository", pkg, err)
	}
	return strings.TrimSpace(string(out)), nil
}

// build builds the workers, libscm and libscm_preload into bin.
func build(ctx context.Context, scratch, bin string) error {
	here, err := directory(ctx, "integration/bench/scm")
	if err != nil {
		return err
	}
	lib, err := directory(ctx, "scmlib/c")
	if err != nil {
		return err
	}
	libs, c := filepath.Join(scratch, "libscm"), filepath.Join(here, "c")
	flags := []string{"-std=c11", "-O3", "-Wall", "-Wextra", "-Werror", "-Wshadow", "-pthread"}
	gcc := func(name string, args ...string) []string {
		return slices.Concat([]string{"gcc"}, flags, []string{"-o", filepath.Join(bin, name)}, args)
	}
	for _, args := range [][]string{
		{"go", "build", "-trimpath", "-buildvcs=false", "-o", filepath.Join(bin, goWorker), module + "/integration/bench/scm/worker"},
		{"make", "-s", "-C", lib, "O=" + libs, "all"},
		gcc(cWorker, "-static", "-I"+lib+"/include", filepath.Join(c, "worker.c"), filepath.Join(libs, "libscm.a")),
		gcc(pmdkWorker, "-DPMDK", filepath.Join(c, "worker.c"), "-lpmemobj"),
		gcc(pmdkWide, "-DPMDK", "-DORDER=32", filepath.Join(c, "worker.c"), "-lpmemobj"),
		gcc(sqliteWorker, filepath.Join(c, "sqlite.c"), "-lsqlite3"),
		{"cp", filepath.Join(libs, preload), filepath.Join(bin, preload)},
	} {
		cmd := exec.CommandContext(ctx, args[0], args[1:]...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("build the programs of the benchmark: %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(out))
		}
	}
	return nil
}

// benchImage is busybox with the workers and Redis, which brings the libraries that it wants along.
func benchImage(ctx context.Context, bin string) (v1.Image, error) {
	var entries []image.Entry
	add := func(name, path string) error {
		b, err := os.ReadFile(path)
		if err == nil {
			entries = append(entries, image.Entry{
				Header: tar.Header{Typeflag: tar.TypeReg, Name: strings.TrimPrefix(name, "/"), Mode: 0o755, ModTime: time.Unix(1, 0)}, Data: b,
			})
		}
		return err
	}
	for _, name := range []string{goWorker, cWorker, preload} {
		if err := add("bench/"+name, filepath.Join(bin, name)); err != nil {
			return nil, fmt.Errorf("make image: %w", err)
		}
	}
	redis, err := exec.LookPath(redisServer)
	if err != nil {
		return nil, fmt.Errorf("make image: %w: install the Debian package redis-server", err)
	}
	if err := errors.Join(os.Symlink(redis, filepath.Join(bin, redisServer)), add("bench/"+redisServer, redis)); err != nil {
		return nil, fmt.Errorf("make image: %w", err)
	}
	out, err := exec.CommandContext(ctx, "ldd", redis).Output()
	if err != nil {
		return nil, fmt.Errorf("list libraries of %q: %w", redis, err)
	}
	for _, lib := range libraries(out) {
		if err := add(lib, lib); err != nil {
			return nil, fmt.Errorf("make image: %w", err)
		}
	}
	layer, err := image.Layer(entries)
	if err != nil {
		return nil, err
	}
	return image.Busybox(layer)
}

// libraries are the paths in the output of ldd(1): "name => path (address)" and "path (address)".
func libraries(ldd []byte) (paths []string) {
	lines := bufio.NewScanner(bytes.NewReader(ldd))
	for lines.Scan() {
		for _, word := range strings.Fields(lines.Text()) {
			if strings.HasPrefix(word, "/") {
				paths = append(paths, word)
				break
			}
		}
	}
	return paths
}
