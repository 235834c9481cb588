// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// nhybrid-scm-hook is the OCI createRuntime hook that brings a container its region. The container runtime starts it as root, in the host's
// namespaces, when the root filesystem of the container is mounted and nothing in it runs yet. It asks the daemon for the region and attaches the
// mount that it gets. It fails the creation of the container with one line that says why.
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/scmlib/region/api"
)

func init() {
	// One thread changes its mount namespace: it must be the one that goes on.
	runtime.LockOSThread()
}

func main() {
	var a api.Attach
	socket := flag.String("socket", api.Socket, "socket of the daemon")
	flag.Int64Var(&a.Size, "size", 0, "size of the region in bytes")
	flag.StringVar(&a.Volume, "volume", "", "name of a volume")
	flag.StringVar(&a.Tenant, "tenant", "", "namespace whose quota counts and that has the volume, if not that of the container")
	flag.BoolVar(&a.FromImage, "image", false, "size and content of the region that the image carries")
	flag.Parse()
	if err := run(*socket, a, os.Stdin); err != nil {
		fmt.Fprintln(os.Stderr, "nhybrid-scm-hook:", err)
		os.Exit(1)
	}
}

// state is what the runtime writes to the hook (OCI runtime specification, runtime.md, State).
type state struct {
	ID     string `json:"id"`
	Pid    int    `json:"pid"`
	Bundle string `json:"bundle"`
}

const maxInput = 4 << 20

func run(socket string, a api.Attach, in io.Reader) error {
	var st state
	if err := json.NewDecoder(io.LimitReader(in, maxInput)).Decode(&st); err != nil {
		return fmt.Errorf("read state of container: %w", err)
	}
	// containerd's bundles lie at STATE/NAMESPACE/ID. The name of the namespace is nowhere else that a container could not choose.
	a.Container, a.Namespace, a.Pid = st.ID, filepath.Base(filepath.Dir(st.Bundle)), st.Pid
	if st.Pid <= 0 || filepath.Base(st.Bundle) != st.ID {
		return fmt.Errorf("container %q, process %d, bundle %q: not as containerd runs containers, in a bundle that is called by its id", st.ID, st.Pid, st.Bundle)
	}
	rootfs, err := rootfsOf(st.Bundle)
	if err != nil {
		return err
	}
	if err := enter(st.Pid); err != nil {
		return err
	}
	root, err := unix.Open(rootfs, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open root filesystem %q: %w", rootfs, err)
	}
	var files []*os.File
	if a.Volume == "" {
		if f, err := imageOf(root); err != nil {
			return err
		} else if f != nil {
			files = append(files, f)
		}
	}
	target, err := makeTarget(root)
	if err != nil {
		return err
	}
	got, err := api.Call(socket, api.OpAttach, a, nil, files...)
	if err != nil {
		return err
	}
	if len(got) != 1 {
		return fmt.Errorf("the daemon answered with %d mounts", len(got))
	}
	if err := unix.MoveMount(int(got[0].Fd()), "", target, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH); err != nil {
		return fmt.Errorf("mount region at %s: %w", api.Device, err)
	}
	return nil
}

func rootfsOf(bundle string) (string, error) {
	f, err := os.Open(filepath.Join(bundle, "config.json"))
	if err != nil {
		return "", fmt.Errorf("read specification of container: %w", err)
	}
	defer f.Close()
	var spec struct {
		Root struct {
			Path string `json:"path"`
		} `json:"root"`
	}
	if err := json.NewDecoder(io.LimitReader(f, maxInput)).Decode(&spec); err != nil {
		return "", fmt.Errorf("read specification of container: %w", err)
	}
	if filepath.IsAbs(spec.Root.Path) {
		return spec.Root.Path, nil
	}
	return filepath.Join(bundle, spec.Root.Path), nil
}

// enter goes to the mount namespace of the container, in which the root filesystem still lies where it does on the host.
func enter(pid int) error {
	ns, err := unix.Open(fmt.Sprintf("/proc/%d/ns/mnt", pid), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open mount namespace of process %d: %w", pid, err)
	}
	defer unix.Close(ns)
	// Threads of a process share their root and working directory, and who shares cannot change namespace (setns(2)).
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	if err := unix.Setns(ns, unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("enter mount namespace of process %d: %w", pid, err)
	}
	return nil
}

// in opens below the container's root, as the container would: links in the image lead nowhere else.
func in(dir int, path string, flags uint64, resolve uint64) (int, error) {
	return unix.Openat2(dir, path, &unix.OpenHow{Flags: flags | unix.O_CLOEXEC, Resolve: resolve | unix.RESOLVE_NO_MAGICLINKS})
}

// imageOf opens the region that the image carries, if it does.
func imageOf(root int) (*os.File, error) {
	fd, err := in(root, api.Image, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, unix.RESOLVE_IN_ROOT)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open /%s in the image: %w", api.Image, err)
	}
	return os.NewFile(uintptr(fd), api.Image), nil
}

// makeTarget makes the file over which the region is mounted.
func makeTarget(root int) (int, error) {
	dev, err := in(root, "dev", unix.O_PATH|unix.O_DIRECTORY, unix.RESOLVE_IN_ROOT)
	if err != nil {
		return -1, fmt.Errorf("open /dev of the container: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(dev, &st); err != nil {
		return -1, fmt.Errorf("look at /dev of the container: %w", err)
	}
	// In a user namespace /dev belongs to its root, and knows no other users of the host: files are made in that one's name.
	if st.Uid != 0 || st.Gid != 0 {
		if err := errors.Join(unix.Setfsgid(int(st.Gid)), unix.Setfsuid(int(st.Uid))); err != nil {
			return -1, fmt.Errorf("act as the container's root: %w", err)
		}
		defer func() { _ = errors.Join(unix.Setfsuid(0), unix.Setfsgid(0)) }()
	}
	if err := unix.Mkdirat(dev, "scm", 0o755); err != nil && !errors.Is(err, unix.EEXIST) {
		return -1, fmt.Errorf("make /dev/scm in the container: %w", err)
	}
	dir, err := in(dev, "scm", unix.O_PATH|unix.O_DIRECTORY, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_SYMLINKS)
	if err != nil {
		return -1, fmt.Errorf("open /dev/scm of the container: %w", err)
	}
	fd, err := unix.Openat(dir, "region", unix.O_RDONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o666)
	if errors.Is(err, unix.EEXIST) {
		fd, err = again(dir)
	}
	if err != nil {
		return -1, fmt.Errorf("make %s in the container: %w", api.Device, err)
	}
	return fd, nil
}

// again opens the file that is there already: where a container has the /dev of the host, an earlier one has left it.
func again(dir int) (int, error) {
	fd, err := in(dir, "region", unix.O_PATH|unix.O_NOFOLLOW, unix.RESOLVE_BENEATH)
	if err != nil {
		return -1, err
	}
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_TYPE, &st); err != nil {
		return -1, err
	}
	if st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0 {
		return -1, fmt.Errorf("there is a region already; a container has one, so ask for one %s device", api.Kind)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return -1, errors.New("there is something that is no file")
	}
	return fd, nil
}
