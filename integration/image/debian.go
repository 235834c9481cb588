// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package image

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

//go:embed chroot.sh
var chrootScript string

// quiet keeps packages from asking and from starting services; minimal images lack the directory that some
// packages link manuals into.
const quiet = `mkdir -p /usr/share/man/man1`

// tidy removes what differs from run to run and nobody needs.
const tidy = `rm -f /var/log/apt/* /var/log/dpkg.log /var/log/alternatives.log /var/cache/ldconfig/aux-cache /var/cache/debconf/*-old /var/lib/dpkg/*-old`

// makeBase installs a minimal Debian. It uses the sources, keys and connection settings of the host's apt, and leaves
// none of them in the tree.
func makeBase(ctx context.Context, tree string, packages []string) error {
	connection, err := exec.CommandContext(ctx, "apt-config", "dump", "Acquire").Output()
	if err != nil {
		return fmt.Errorf("apt-config dump: %w", err)
	}
	conf, err := os.CreateTemp("", "nhybrid-apt-*.conf")
	if err != nil {
		return err
	}
	defer os.Remove(conf.Name())
	if _, err := conf.Write(connection); err != nil {
		return err
	}
	if err := conf.Close(); err != nil {
		return err
	}
	sources, err := aptSources()
	if err != nil {
		return err
	}
	// Services are not started in the chroots of later steps: no init runs there.
	const noServices = `printf '#!/bin/sh\nexit 101\n' >"$1/usr/sbin/policy-rc.d"; chmod 755 "$1/usr/sbin/policy-rc.d"`
	const noApt = `rm -rf "$1/etc/apt/apt.conf.d/99mmdebstrap" "$1/etc/apt/sources.list" "$1"/etc/apt/sources.list.d/* "$1/etc/resolv.conf" "$1/etc/hostname"`
	args := []string{
		"--quiet", "--mode=root", "--format=directory", "--variant=minbase", "--aptopt=" + conf.Name(),
		"--customize-hook=" + noServices, "--customize-hook=" + noApt,
	}
	if len(packages) > 0 {
		args = append(args, "--include="+strings.Join(packages, ","))
	}
	return run(ctx, nil, "mmdebstrap", append(append(args, suite, tree), sources...)...)
}

// aptSources are the host's lists of sources. The one-line files and the deb822 ones are both in use.
func aptSources() ([]string, error) {
	var found []string
	for _, pattern := range []string{"/etc/apt/sources.list", "/etc/apt/sources.list.d/*.list", "/etc/apt/sources.list.d/*.sources"} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			return nil, err
		}
		for _, f := range files {
			if st, err := os.Stat(f); err == nil && st.Size() > 0 {
				found = append(found, f)
			}
		}
	}
	if len(found) == 0 {
		return nil, errors.New("apt has no sources in /etc/apt: images are made from the packages that apt can reach")
	}
	return found, nil
}

// download fetches, with the host's apt, what the packages need beyond what is installed in the layers below.
func (b *Builder) download(ctx context.Context, debs string, lowers []string, tmp string, packages []string) error {
	if err := os.MkdirAll(filepath.Join(debs, "partial"), 0o755); err != nil {
		return err
	}
	status, err := topmost(lowers, "var/lib/dpkg/status")
	if err != nil {
		return err
	}
	args := []string{
		"-qq", "-y", "--no-install-recommends", "--download-only",
		"-o", "Dir::State::status=" + status, "-o", "Dir::State::extended_states=" + filepath.Join(tmp, "extended_states"),
		"-o", "Dir::Cache::archives=" + debs, "-o", "Dir::Cache::pkgcache=", "-o", "Dir::Cache::srcpkgcache=",
		// It is not the host's state that changes.
		"-o", "Debug::NoLocking=true", "-o", "APT::Sandbox::User=root",
		// Hooks of the host would clean the archive.
		"-o", "DPkg::Post-Invoke=", "-o", "APT::Update::Post-Invoke=",
		"install",
	}
	return aptGet(ctx, append(args, packages...))
}

// aptGet runs apt-get, and once more after an update where the lists of packages are missing or out of date.
func aptGet(ctx context.Context, args []string) error {
	err := run(ctx, nil, "apt-get", args...)
	if err == nil || ctx.Err() != nil {
		return err
	}
	if updateErr := run(ctx, nil, "apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300", "update"); updateErr != nil {
		return errors.Join(err, updateErr)
	}
	return run(ctx, nil, "apt-get", args...)
}

// topmost finds a file in a stack of trees.
func topmost(lowers []string, path string) (string, error) {
	for _, dir := range lowers {
		if st, err := os.Lstat(filepath.Join(dir, path)); err == nil && st.Mode().IsRegular() {
			return filepath.Join(dir, path), nil
		}
	}
	return "", fmt.Errorf("no /%s in the layers below", path)
}

// extract unpacks the files of packages without installing them.
func extract(ctx context.Context, debs, tree string, packages []string) error {
	if err := os.MkdirAll(debs, 0o755); err != nil {
		return err
	}
	// What the host has installed, perhaps from elsewhere, must not decide about the version.
	script := `cd "$1"; shift; exec apt-get -qq -o APT::Sandbox::User=root -o Dir::State::status=/dev/null download "$@"`
	fetch := append([]string{"-euc", script, "sh", debs}, packages...)
	if err := run(ctx, nil, "sh", fetch...); err != nil {
		if updateErr := run(ctx, nil, "apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300", "update"); updateErr != nil {
			return errors.Join(err, updateErr)
		}
		if err := run(ctx, nil, "sh", fetch...); err != nil {
			return err
		}
	}
	files, err := filepath.Glob(filepath.Join(debs, "*.deb"))
	if err != nil {
		return err
	}
	for _, f := range files {
		if err := run(ctx, nil, "dpkg-deb", "-x", f, tree); err != nil {
			return err
		}
	}
	return nil
}

// chroot runs a command on the layers below; what it changes goes to tmp/tree.
func (b *Builder) chroot(ctx context.Context, tmp string, lowers []string, debs, command string) error {
	root, work := filepath.Join(tmp, "root"), filepath.Join(tmp, "work")
	if err := errors.Join(os.MkdirAll(root, 0o755), os.MkdirAll(work, 0o755)); err != nil {
		return err
	}
	return run(ctx, nil, "unshare", "--mount", "--pid", "--fork", "--kill-child=SIGKILL", "--net",
		"sh", "-c", chrootScript, "sh", strings.Join(lowers, ":"), filepath.Join(tmp, "tree"), work, root, debs, command)
}
