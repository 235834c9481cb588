// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// modules that the guest needs, beside those they depend on. The guest loads them all at its start: nothing in it loads on demand.
var modules = []string{
	"virtio_pci", "virtio_blk", "virtio_net", "nfit", "nd_pmem", "ext4", "xfs", "overlay", "erofs", "loop", "quota_v2",
	"crc32c_generic", "crc32c-intel",
}

const initScript = `#!/bin/busybox sh
# Copyright The nhybrid Authors.
# SPDX-License-Identifier: Apache-2.0
# runc cannot pivot_root on an initramfs, so this only loads the modules and goes over to the root disk.
/bin/busybox mount -t devtmpfs dev /dev
for m in /modules/*; do /bin/busybox insmod "$m" || echo "cannot load $m"; done
/bin/busybox mount -t ext4 -o ro,noload /dev/vda /root || exec /bin/busybox poweroff -f
exec /bin/busybox switch_root /root /sbin/guest
`

// buildInitramfs writes busybox, the modules in the order of their dependencies, and initScript as a cpio archive to dst.
func buildInitramfs(ctx context.Context, k kernel, dst string) error {
	root, err := os.MkdirTemp(filepath.Dir(dst), "initramfs-")
	if err != nil {
		return fmt.Errorf("make directory for initramfs: %w", err)
	}
	defer os.RemoveAll(root)
	for _, d := range []string{"bin", "dev", "modules", "root"} {
		if err := os.Mkdir(filepath.Join(root, d), 0o755); err != nil {
			return fmt.Errorf("make initramfs: %w", err)
		}
	}
	if err := copyProgram("busybox", filepath.Join(root, "bin", "busybox")); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(root, "init"), []byte(initScript), 0o755); err != nil {
		return fmt.Errorf("make initramfs: %w", err)
	}
	files, err := moduleFiles(ctx, k)
	if err != nil {
		return err
	}
	for i, file := range files {
		to := filepath.Join(root, "modules", fmt.Sprintf("%03d-%s", i, filepath.Base(file)))
		if err := copyFile(file, to, 0o644); err != nil {
			return err
		}
		if strings.HasSuffix(to, ".xz") {
			// busybox cannot load a compressed module.
			if _, err := run(ctx, "", "xz", "-d", to); err != nil {
				return fmt.Errorf("unpack module: %w", err)
			}
		}
	}
	tmp := dst + ".tmp"
	if _, err := run(ctx, root, "sh", "-c", `find . | cpio --quiet -o -H newc >"$0"`, tmp); err != nil {
		return fmt.Errorf("write initramfs: %w", err)
	}
	return os.Rename(tmp, dst)
}

// moduleFiles lists the files of modules and of what they depend on, each after its dependencies; built-in ones are left out.
func moduleFiles(ctx context.Context, k kernel) ([]string, error) {
	var files []string
	for _, m := range modules {
		// Without -C the machine's own configuration is read, where ndctl's package replaces the loading of libnvdimm by a command.
		out, err := run(ctx, "", "modprobe", "-C", "/dev/null", "-d", k.dir, "-S", k.release, "--show-depends", m)
		if err != nil {
			return nil, fmt.Errorf("find module: %w", err)
		}
		for line := range strings.Lines(out) {
			f := strings.Fields(line)
			if len(f) >= 2 && f[0] == "insmod" && !slices.Contains(files, f[1]) {
				files = append(files, f[1])
			}
		}
	}
	return files, nil
}

// rootDisk describes the files of the guest's root disk.
type rootDisk struct {
	copies map[string]string // path in the guest, from path or program name here; their shared libraries come along
	texts  map[string]string // path in the guest, content
}

// write makes an ext4 image of the disk at dst, without any mount.
func (d rootDisk) write(ctx context.Context, dst string) error {
	root, err := os.MkdirTemp(filepath.Dir(dst), "root-")
	if err != nil {
		return fmt.Errorf("make directory for root disk: %w", err)
	}
	defer os.RemoveAll(root)
	for _, dir := range []string{"bin", "dev", "etc", "hdd", "nvm", "proc", "root", "run", "sbin", "sys", "tmp", "usr", "var"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			return fmt.Errorf("make root disk: %w", err)
		}
	}
	for to, from := range d.copies {
		if err := copyProgram(from, filepath.Join(root, to)); err != nil {
			return err
		}
		libs, err := sharedLibraries(ctx, filepath.Join(root, to))
		if err != nil {
			return err
		}
		for _, lib := range libs {
			if err := copyFile(lib, filepath.Join(root, lib), 0o755); err != nil {
				return err
			}
		}
	}
	for to, text := range d.texts {
		path := filepath.Join(root, to)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return fmt.Errorf("make root disk: %w", err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return fmt.Errorf("make root disk: %w", err)
		}
	}
	tmp := dst + ".tmp"
	if err := sparseFile(tmp, rootDiskBytes); err != nil {
		return err
	}
	if _, err := run(ctx, "", "mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", "-d", root, tmp); err != nil {
		return fmt.Errorf("make root disk: %w", err)
	}
	return os.Rename(tmp, dst)
}

var libraryPath = regexp.MustCompile(`(?m)(/\S+) \(0x[0-9a-f]+\)$`)

// sharedLibraries lists what the dynamic linker would load for a program, the linker included; none for a static one.
func sharedLibraries(ctx context.Context, program string) ([]string, error) {
	out, err := run(ctx, "", "ldd", program)
	if err != nil {
		if strings.Contains(err.Error(), "not a dynamic executable") {
			return nil, nil
		}
		return nil, fmt.Errorf("find libraries: %w", err)
	}
	var libs []string
	for _, m := range libraryPath.FindAllStringSubmatch(out, -1) {
		libs = append(libs, m[1])
	}
	return libs, nil
}

// copyProgram copies a program, given by path or by name, to dst.
func copyProgram(program, dst string) error {
	from, err := lookPath(program)
	if err != nil {
		return err
	}
	return copyFile(from, dst, 0o755)
}

func copyFile(from, to string, mode fs.FileMode) (err error) {
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return fmt.Errorf("copy %q: %w", from, err)
	}
	in, err := os.Open(from)
	if err != nil {
		return fmt.Errorf("copy: %w", err)
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, mode)
	if err != nil {
		return fmt.Errorf("copy %q: %w", from, err)
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	if _, err := io.Copy(out, in); err != nil {
		return fmt.Errorf("copy %q to %q: %w", from, to, err)
	}
	return nil
}

// sparseFile makes a file of size bytes that takes no room yet.
func sparseFile(path string, size int64) error {
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		return fmt.Errorf("make disk: %w", err)
	}
	if err := os.Truncate(path, size); err != nil {
		return fmt.Errorf("make disk: %w", err)
	}
	return nil
}
