// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
)

// kernelSeries is the oldest kernel with all that the guest shows: file-backed EROFS mounts (6.12) and data-only layers
// that still want metacopy=on (up to 6.15).
const kernelSeries = "6.12"

// programs that the set-up and the guest use, and the Debian package that brings each.
var programs = map[string]string{
	"qemu-system-x86_64": "qemu-system-x86",
	"busybox":            "busybox-static",
	"mkfs.ext4":          "e2fsprogs",
	"mkfs.xfs":           "xfsprogs",
	"ndctl":              "ndctl",
	"cpio":               "cpio",
	"modprobe":           "kmod",
	"xz":                 "xz-utils",
	"gcc":                "gcc",
}

// run executes a host command and returns its standard output; an error carries what it wrote to standard error.
func run(ctx context.Context, dir, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive", "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("run %q: %w: %s", strings.Join(cmd.Args, " "), err, lastLines(stderr.String(), 5))
	}
	return string(out), nil
}

func lastLines(s string, n int) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "; ")
}

// lookPath finds a program, also where only root's PATH would.
func lookPath(name string) (string, error) {
	if p, err := exec.LookPath(name); err == nil {
		return p, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if p, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("find program %q: %w", name, exec.ErrNotFound)
}

// installPrograms installs the Debian packages of those programs that are missing, and nothing where none is.
func installPrograms(ctx context.Context) error {
	var missing []string
	for program, pkg := range programs {
		if _, err := lookPath(program); err != nil {
			missing = append(missing, pkg)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	progress("installing %s", strings.Join(missing, " "))
	if err := aptUpdate(ctx); err != nil {
		return err
	}
	args := append([]string{"-q", "-y", "-o", "DPkg::Lock::Timeout=300", "install", "--no-install-recommends"}, missing...)
	if _, err := run(ctx, "", "apt-get", args...); err != nil {
		return fmt.Errorf("install packages: %w", err)
	}
	return nil
}

func aptUpdate(ctx context.Context, opts ...string) error {
	// Stale lists are no reason to stop: what is missing shows at the next step, with its name.
	_, err := run(ctx, "", "apt-get", append(opts, "-q", "-o", "DPkg::Lock::Timeout=300", "update")...)
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return fmt.Errorf("update package lists: %w", err)
	}
	return nil
}

// kernel is a Linux kernel package, unpacked below the cache and not installed.
type kernel struct {
	release string // as uname -r has it
	dir     string // holds boot/ and lib/modules/
}

func (k kernel) image() string { return filepath.Join(k.dir, "boot", "vmlinuz-"+k.release) }

// cachedKernel returns the kernel that an earlier run has left in cache.
func cachedKernel(cache string) (kernel, error) {
	found, err := filepath.Glob(filepath.Join(cache, "kernel", "boot", "vmlinuz-"+kernelSeries+"*"))
	if err != nil || len(found) != 1 {
		return kernel{}, fmt.Errorf("find cached kernel below %q: %w", cache, fs.ErrNotExist)
	}
	release := strings.TrimPrefix(filepath.Base(found[0]), "vmlinuz-")
	return kernel{release: release, dir: filepath.Join(cache, "kernel")}, nil
}

// fetchKernel downloads and unpacks the newest cloud kernel of kernelSeries that Debian has: from the package sources of this
// machine, or, where they have none, from the backports of the same mirror.
func fetchKernel(ctx context.Context, cache string) (kernel, error) {
	if k, err := cachedKernel(cache); err == nil {
		return k, nil
	}
	var opts []string
	pkg, err := newestKernel(ctx, opts)
	if errors.Is(err, fs.ErrNotExist) {
		// Lists may simply be missing or old; and only then are backports asked.
		if err := aptUpdate(ctx); err != nil {
			return kernel{}, err
		}
		pkg, err = newestKernel(ctx, opts)
	}
	if errors.Is(err, fs.ErrNotExist) {
		if opts, err = backports(ctx, cache); err != nil {
			return kernel{}, err
		}
		pkg, err = newestKernel(ctx, opts)
	}
	if err != nil {
		return kernel{}, err
	}
	progress("downloading %s", pkg)
	tmp, err := os.MkdirTemp(cache, "kernel-")
	if err != nil {
		return kernel{}, fmt.Errorf("make directory for kernel: %w", err)
	}
	defer os.RemoveAll(tmp)
	// Without a sandbox user apt does not complain that it cannot write here.
	get := append(append([]string{}, opts...), "-q", "-o", "APT::Sandbox::User=root", "download", pkg)
	if _, err := run(ctx, tmp, "apt-get", get...); err != nil {
		return kernel{}, fmt.Errorf("download kernel: %w", err)
	}
	debs, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil || len(debs) != 1 {
		return kernel{}, fmt.Errorf("download kernel %q: found %d packages, want 1", pkg, len(debs))
	}
	if _, err := run(ctx, tmp, "dpkg", "-x", debs[0], "x"); err != nil {
		return kernel{}, fmt.Errorf("unpack kernel: %w", err)
	}
	final := filepath.Join(cache, "kernel")
	if err := os.RemoveAll(final); err != nil {
		return kernel{}, fmt.Errorf("clear kernel cache: %w", err)
	}
	if err := os.Rename(filepath.Join(tmp, "x"), final); err != nil {
		return kernel{}, fmt.Errorf("keep kernel: %w", err)
	}
	k, err := cachedKernel(cache)
	if err != nil {
		return kernel{}, err
	}
	if _, err := os.Stat(filepath.Join(k.dir, "usr", "lib", "modules")); err == nil {
		// Newer packages are merged-/usr; modprobe -d wants lib/modules.
		if err := os.Symlink("usr/lib", filepath.Join(k.dir, "lib")); err != nil && !errors.Is(err, fs.ErrExist) {
			return kernel{}, fmt.Errorf("link kernel modules: %w", err)
		}
	}
	if _, err := run(ctx, "", "depmod", "-b", k.dir, k.release); err != nil {
		return kernel{}, fmt.Errorf("index kernel modules: %w", err)
	}
	return k, nil
}

// kernelName is the name of a kernel package; those of the meta packages hold no digits after the series.
var kernelName = regexp.MustCompile(`^linux-image-` + regexp.QuoteMeta(kernelSeries) + `\.[0-9].*-cloud-amd64$`)

// newestKernel asks apt for the newest kernel package of kernelSeries; the error is fs.ErrNotExist where there is none.
func newestKernel(ctx context.Context, opts []string) (string, error) {
	args := append(append([]string{}, opts...), "search", "--names-only", kernelName.String())
	out, err := run(ctx, "", "apt-cache", args...)
	if err != nil {
		return "", fmt.Errorf("search kernel: %w", err)
	}
	newest := ""
	for line := range strings.Lines(out) {
		name, _, _ := strings.Cut(strings.TrimSpace(line), " ")
		if !kernelName.MatchString(name) {
			continue
		}
		if newest != "" {
			if _, err := run(ctx, "", "dpkg", "--compare-versions", name[len("linux-image-"):], "gt", newest[len("linux-image-"):]); err != nil {
				continue
			}
		}
		newest = name
	}
	if newest == "" {
		return "", fmt.Errorf("search kernel %s cloud-amd64 in the package lists: %w", kernelSeries, fs.ErrNotExist)
	}
	return newest, nil
}

// backports fetches the package list of this release's backports from the mirror and under the keys that this machine is
// configured with, into a place of its own, and returns the options that make apt use it.
func backports(ctx context.Context, cache string) ([]string, error) {
	out, err := run(ctx, "", "apt-get", "indextargets", "--format", "$(REPO_URI) $(ORIGIN) $(CODENAME) $(SUITE)", "Created-By: Packages", "Component: main")
	if err != nil {
		return nil, fmt.Errorf("read package sources: %w", err)
	}
	var uri, codename string
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		// The release itself, not its updates.
		if len(f) == 4 && f[1] == "Debian" && !strings.Contains(f[2], "-") {
			uri, codename = f[0], f[2]
			break
		}
	}
	if uri == "" {
		return nil, errors.New("find backports: this machine's package sources name no Debian release; add one to /etc/apt/sources.list.d")
	}
	// The keys that Debian's own sources name; where they are not there, apt looks in its usual places.
	const keys = "/usr/share/keyrings/debian-archive-keyring.gpg"
	signed := ""
	if _, err := os.Stat(keys); err == nil {
		signed = "[signed-by=" + keys + "] "
	}
	dir := filepath.Join(cache, "apt")
	if err := os.MkdirAll(filepath.Join(dir, "lists", "partial"), 0o755); err != nil {
		return nil, fmt.Errorf("make directory for package lists: %w", err)
	}
	list := filepath.Join(dir, "backports.list")
	entry := fmt.Sprintf("deb %s%s %s-backports main\n", signed, uri, codename)
	if err := os.WriteFile(list, []byte(entry), 0o644); err != nil {
		return nil, fmt.Errorf("write package source: %w", err)
	}
	opts := []string{
		"-o", "Dir::Etc::sourcelist=" + list, "-o", "Dir::Etc::sourceparts=/dev/null",
		"-o", "Dir::State::lists=" + filepath.Join(dir, "lists"), "-o", "APT::Sandbox::User=root",
	}
	return opts, aptUpdate(ctx, opts...)
}
