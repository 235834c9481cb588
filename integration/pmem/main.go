// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Command pmem tests nhybrid on emulated persistent memory: it boots a Debian kernel in QEMU with an NVDIMM, once with ext4 and once with
// XFS on it, runs containerd with nhybrid inside, cuts the power after a pull and while programs work in persistent memory, boots again and
// goes on. See docs/pmem.md.
//
// It exits with 1 when a check fails, is missing, or does not end in time.
package main

import (
	"context"
	"embed"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	rootDiskBytes = 512 << 20
	nvdimmBytes   = 1 << 30
	hddBytes      = 2 << 30
	// bootTimeout is ten times and more what a boot with all its checks takes on two busy cores.
	bootTimeout = 40 * time.Minute
)

// etc holds the configuration files of the guest.
//
//go:embed etc
var etc embed.FS

var started = time.Now()

// progress prints one line of what goes on, with the seconds since the start.
func progress(format string, args ...any) {
	fmt.Printf("%7.1fs %s\n", time.Since(started).Seconds(), fmt.Sprintf(format, args...))
}

type options struct {
	bin, scm, cache, out string
	filesystems          []string
	snapshotter          string
}

func main() {
	var o options
	var filesystems string
	flag.StringVar(&o.bin, "bin", "bin", "directory of containerd, ctr, containerd-shim-runc-v2, runc and nhybrid's own programs")
	flag.StringVar(&o.scm, "scm", "out/scmlib-c", "directory of libscm.a; `make scmlib-c` makes it")
	flag.StringVar(&o.cache, "cache", "out/cache/pmem", "directory for the kernel, the initramfs and the root disk, kept for the next run")
	flag.StringVar(&o.out, "out", "out/pmem", "directory for the consoles of the guests")
	flag.StringVar(&filesystems, "fs", "ext4,xfs", "filesystems for the NVM tier, each in a guest of its own")
	flag.StringVar(&o.snapshotter, "snapshotter", "nhybrid", "snapshotter under test; overlayfs tells a fault of the guest from one of nhybrid")
	flag.Parse()
	o.filesystems = strings.Split(filesystems, ",")

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	passed, failed, err := test(ctx, o)
	if err != nil {
		fmt.Fprintf(os.Stderr, "test-pmem: %v\n", err)
		failed++
	}
	fmt.Printf("test-pmem: %.0f s\n%d passed, %d failed\n", time.Since(started).Seconds(), passed, failed)
	if failed > 0 {
		stop()
		os.Exit(1)
	}
}

// test sets everything up, runs one machine for each filesystem, and counts the checks.
func test(ctx context.Context, o options) (passed, failed int, err error) {
	for _, fs := range o.filesystems {
		if fs != "ext4" && fs != "xfs" {
			return 0, 0, fmt.Errorf("filesystem %q is not known; -fs takes ext4 and xfs", fs)
		}
	}
	for _, dir := range []*string{&o.bin, &o.scm, &o.cache, &o.out} {
		if *dir, err = filepath.Abs(*dir); err != nil {
			return 0, 0, fmt.Errorf("find directory: %w", err)
		}
	}
	for _, dir := range []string{o.cache, o.out} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return 0, 0, fmt.Errorf("make directory: %w", err)
		}
	}
	if err := installPrograms(ctx); err != nil {
		return 0, 0, err
	}
	kernel, err := fetchKernel(ctx, o.cache)
	if err != nil {
		return 0, 0, err
	}
	initramfs := filepath.Join(o.cache, "initramfs.cpio")
	if err := buildInitramfs(ctx, kernel, initramfs); err != nil {
		return 0, 0, err
	}
	own, err := buildPrograms(ctx, o)
	if err != nil {
		return 0, 0, err
	}
	image, err := layers(own)
	if err != nil {
		return 0, 0, err
	}
	root, err := buildRootDisk(ctx, o, own, image)
	if err != nil {
		return 0, 0, err
	}
	progress("set up, with kernel %s", kernel.release)

	// A guest has one processor (TCG with two is slower), so two guests fit on the two cores of a small machine.
	var all tally
	var wg sync.WaitGroup
	for _, fs := range o.filesystems {
		wg.Go(func() {
			m := machine{kernel: kernel, initramfs: initramfs, root: root, fs: fs, snapshotter: o.snapshotter, out: o.out}
			all.add(m.test(ctx, image))
		})
	}
	wg.Wait()
	return all.passed, all.failed, ctx.Err()
}

// tally counts checks of several machines at once.
type tally struct {
	mu             sync.Mutex
	passed, failed int
}

func (t *tally) add(passed, failed int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.passed += passed
	t.failed += failed
}

// buildGo builds a package below this one as a static program, and returns its path.
func buildGo(ctx context.Context, cache, pkg string) (string, error) {
	out := filepath.Join(cache, pkg)
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", out, "github.com/nhybrid/nhybrid/integration/pmem/"+pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if msg, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build %s: %w: %s", pkg, err, lastLines(string(msg), 5))
	}
	return out, nil
}

// buildPrograms builds what runs both in containers and beside them: by the name that it has there.
func buildPrograms(ctx context.Context, o options) (map[string]string, error) {
	programs := map[string]string{}
	for name, pkg := range map[string]string{"probe": "daxprobe", "ledger-go": "ledger"} {
		path, err := buildGo(ctx, o.cache, pkg)
		if err != nil {
			return nil, err
		}
		programs[name] = path
	}
	// Static, as there are no libraries in the image.
	path := filepath.Join(o.cache, "ledger-c")
	source, err := run(ctx, "", "go", "list", "-f", "{{.Dir}}", "github.com/nhybrid/nhybrid/scmlib/c")
	if err != nil {
		return nil, err
	}
	include, ledger := filepath.Join(strings.TrimSpace(source), "include"), filepath.Join(strings.TrimSpace(source), "../../integration/pmem/ledgerc/ledger.c")
	if _, err := run(ctx, "", "gcc", "-static", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-I", include, "-o", path, ledger,
		filepath.Join(o.scm, "libscm.a"), "-pthread"); err != nil {
		return nil, fmt.Errorf("build the ledger in C: %w", err)
	}
	programs["ledger-c"] = path
	return programs, nil
}

// buildRootDisk makes the disk that the guest runs from. It is made anew each time, since the programs on it change.
func buildRootDisk(ctx context.Context, o options, own map[string]string, image [][]entry) (string, error) {
	guest, err := buildGo(ctx, o.cache, "guest")
	if err != nil {
		return "", err
	}
	expected, err := json.Marshal(merged(image))
	if err != nil {
		return "", fmt.Errorf("describe image: %w", err)
	}
	disk := rootDisk{
		copies: map[string]string{"sbin/guest": guest, "bin/busybox": "busybox"},
		texts:  map[string]string{"etc/expected.json": string(expected)},
	}
	for name, path := range own {
		disk.copies["bin/"+name] = path
	}
	// Where the programs look for them by default.
	for name, place := range map[string]string{"containerd.toml": "etc/containerd/config.toml", "nhybrid.toml": "etc/nhybrid/config.toml", "mke2fs.conf": "etc/mke2fs.conf"} {
		text, err := etc.ReadFile("etc/" + name)
		if err != nil {
			return "", fmt.Errorf("read configuration: %w", err)
		}
		disk.texts[place] = string(text)
	}
	for _, program := range []string{"ndctl", "mkfs.ext4", "mkfs.xfs"} {
		disk.copies["sbin/"+program] = program
	}
	needed := []string{"containerd", "ctr", "containerd-shim-runc-v2", "runc"}
	if o.snapshotter == "nhybrid" {
		needed = append(needed, "containerd-nhybrid-grpc", "nhybridctl", "nhybrid-scm-hook")
	}
	for _, program := range needed {
		path := filepath.Join(o.bin, program)
		if _, err := os.Stat(path); err != nil {
			return "", fmt.Errorf("find program %q in %q; `make tools build` makes it: %w", program, o.bin, errors.Unwrap(err))
		}
		disk.copies["bin/"+program] = path
	}
	dst := filepath.Join(o.cache, "root.img")
	return dst, disk.write(ctx, dst)
}

// report prints the result of a check and counts it.
func (r *bootResult) report(prefix, name, why string) {
	r.seen = append(r.seen, name)
	if why == "" {
		r.passed++
		progress("%s ok   %s", prefix, name)
		return
	}
	r.failed++
	progress("%s FAIL %s: %s", prefix, name, why)
}

// missing reports the checks that a guest has announced and not made.
func (r *bootResult) missing(prefix, why string) {
	if len(r.planned) == 0 {
		r.report(prefix, "boot", why)
	}
	for _, name := range r.planned {
		if !slices.Contains(r.seen, name) {
			r.report(prefix, name, why)
		}
	}
}
