// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/scmlib/region"
	"github.com/nhybrid/nhybrid/scmlib/region/api"
)

func (a *app) scmAttach() *cobra.Command {
	c := &cobra.Command{
		Use: "attach NAME [--] COMMAND [ARG...]", Short: "Run a program of the host with a volume", Args: cobra.MinimumNArgs(2), ValidArgsFunction: a.regionNames,
		Long: "Run a program of the host with a volume, under the rules for containers: nobody else has it until the program ends. The program\nfinds the volume where a container would, at " + api.Device + ", which SCM_REGION names; no other process sees it there.",
		RunE: func(c *cobra.Command, args []string) error {
			command := args[1:]
			if command[0] == "--" && len(command) > 1 {
				command = command[1:]
			}
			program, err := exec.LookPath(command[0])
			if err != nil {
				return fmt.Errorf("attach: %w", err)
			}
			var r region.Record
			got, err := a.ask(c.Context(), region.OpUse, region.Args{Namespace: a.within(), Region: args[0], Pid: os.Getpid()}, &r)
			if err != nil {
				return err
			}
			if len(got) != 1 {
				return fmt.Errorf("attach: the daemon answered with %d mounts", len(got))
			}
			// The program takes this process over: the daemon knows the volume's user by the process, and its end is the volume's.
			runtime.LockOSThread()
			if err := mountAlone(int(got[0].Fd()), api.Device); err != nil {
				return fmt.Errorf("attach: %w", err)
			}
			if err := os.Setenv("SCM_REGION", api.Device); err != nil { // not twice in the environment, of which programs take either
				return fmt.Errorf("attach: %w", err)
			}
			if err := syscall.Exec(program, command, os.Environ()); err != nil {
				return fmt.Errorf("attach: run %q: %w", program, err)
			}
			return nil
		},
	}
	c.Flags().SetInterspersed(false) // options of the program are its own
	return c
}

// mountAlone mounts a file at a path that this thread alone sees, and what it executes.
func mountAlone(mount int, path string) error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("make a mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("keep mounts from the host: %w", err)
	}
	dir := filepath.Dir(path)
	// This directory the host sees too. It stays, empty: whoever removed it would take the mounts of others with it.
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	if err := unix.Mount("scm", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0755,size=4k"); err != nil {
		return fmt.Errorf("mount a place for the region at %q: %w", dir, err)
	}
	if err := os.WriteFile(path, nil, 0o666); err != nil {
		return err
	}
	if err := unix.MoveMount(mount, "", unix.AT_FDCWD, path, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("mount region at %q: %w", path, err)
	}
	return nil
}
