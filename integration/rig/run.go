// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package rig

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// Command prepares one of ctr, nerdctl, crictl and nhybridctl with the arguments that lead it to this rig, for callers
// that want its input, output or process. The snapshotter of ctr and nerdctl is the rig's unless arguments say
// otherwise.
func (r *Rig) Command(ctx context.Context, tool string, args ...string) (*exec.Cmd, error) {
	program := filepath.Join(r.bin, tool)
	var env []string
	switch tool {
	case "ctr":
		args = append([]string{"-a", r.ContainerdSocket(), "-n", r.Namespace}, args...)
		env = []string{"CONTAINERD_SNAPSHOTTER=" + r.Snapshotter}
	case "nerdctl":
		if err := r.NerdctlUnobtainable(); err != nil {
			return nil, err
		}
		args = append([]string{
			"--address", r.ContainerdSocket(), "--namespace", r.Namespace, "--snapshotter", r.Snapshotter,
			"--data-root", filepath.Join(r.Dir, "nerdctl"), "--hosts-dir", filepath.Join(r.Dir, "hosts"),
			"--cni-path", "/usr/lib/cni", "--cni-netconfpath", filepath.Join(r.Dir, "cni"),
			"--cgroup-manager", "cgroupfs", "--insecure-registry",
		}, args...)
	case "crictl":
		if !r.options.CRI {
			return nil, errors.New("crictl: this rig was started without Options.CRI")
		}
		endpoint := "unix://" + r.ContainerdSocket()
		args = append([]string{"--config", "/dev/null", "--runtime-endpoint", endpoint, "--image-endpoint", endpoint, "--timeout", "2m"}, args...)
	case "nhybridctl":
		args = append([]string{"--address", r.ControlSocket(), "--namespace", r.Namespace}, args...)
	default:
		return nil, fmt.Errorf("tool %q: the rig knows ctr, nerdctl, crictl and nhybridctl", tool)
	}
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = append(append(os.Environ(), "PATH="+r.bin+":"+os.Getenv("PATH")), env...)
	return cmd, nil
}

// Run runs a tool to its end and returns its standard output without trailing newlines. A failure carries the command
// and its standard error.
func (r *Rig) Run(ctx context.Context, tool string, args ...string) (string, error) {
	cmd, err := r.Command(ctx, tool, args...)
	if err != nil {
		return "", err
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return tidyLines(stdout.String()), fmt.Errorf("%s %s: %w: %s", tool, strings.Join(args, " "), err, tidyLines(stderr.String()))
	}
	return tidyLines(stdout.String()), nil
}

// Ctr runs ctr in the rig's namespace.
func (r *Rig) Ctr(ctx context.Context, args ...string) (string, error) {
	return r.Run(ctx, "ctr", args...)
}

// Nerdctl runs nerdctl in the rig's namespace.
func (r *Rig) Nerdctl(ctx context.Context, args ...string) (string, error) {
	return r.Run(ctx, "nerdctl", args...)
}

// NerdctlRun runs `nerdctl run` without network and without logs: nerdctl 2.1's process for them asks for the task for ever
// where the container has ended before it looks, and nerdctl waits for that process, in `start --attach` as well.
func (r *Rig) NerdctlRun(ctx context.Context, args ...string) (string, error) {
	return r.Nerdctl(ctx, append([]string{"run", "--net", "none", "--log-driver", "none"}, args...)...)
}

// Crictl runs crictl. containerd's namespace of CRI is k8s.io.
func (r *Rig) Crictl(ctx context.Context, args ...string) (string, error) {
	return r.Run(ctx, "crictl", args...)
}

// Nhybridctl runs nhybridctl against the rig's daemon.
func (r *Rig) Nhybridctl(ctx context.Context, args ...string) (string, error) {
	return r.Run(ctx, "nhybridctl", args...)
}

// Pull pulls an image through the link by `ctr images pull`, containerd's transfer service. A pull from under which
// containerd itself has collected a snapshot is made again, as its users do (containerd issue 3787).
func (r *Rig) Pull(ctx context.Context, name string, args ...string) error {
	args = append(append([]string{"images", "pull", "--plain-http"}, args...), r.Ref(name))
	var err error
	for range 3 {
		before := len(collected.FindAllString(r.Containerd.Log(), -1))
		_, err = r.Ctr(ctx, args...)
		if err == nil || len(collected.FindAllString(r.Containerd.Log(), -1)) == before {
			return err
		}
	}
	return fmt.Errorf("pull %q: containerd collects its snapshots again and again: %w", name, err)
}

// collected is what containerd's log says when it wants to clean up after a failed pull, and its own metadata (not the
// snapshotter) do not have the snapshot any more.
var collected = regexp.MustCompile(`failed to cleanup .*extract-.*error="snapshot extract-.* does not exist: not found"`)

// RunContainer runs a command in a new container of the image by `ctr run --rm` and returns its output, standard error
// included, without trailing newlines. The output goes through a file: ctr itself gives up pipes that it has not come to
// open yet when the container has already ended, and with them what was written.
func (r *Rig) RunContainer(ctx context.Context, name, id string, command ...string) (string, error) {
	return r.RunContainerWith(ctx, nil, name, id, command...)
}

// RunContainerWith is RunContainer with further flags of `ctr run`.
func (r *Rig) RunContainerWith(ctx context.Context, flags []string, name, id string, command ...string) (string, error) {
	dir, err := os.MkdirTemp(r.Dir, "out-")
	if err != nil {
		return "", fmt.Errorf("make directory for output: %w", err)
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "out")
	_, err = r.Ctr(ctx, slices.Concat([]string{"run", "--rm", "--log-uri", "file://" + file}, flags, []string{r.Ref(name), id}, command)...)
	b, readErr := os.ReadFile(file)
	if errors.Is(readErr, os.ErrNotExist) {
		readErr = nil // it never ran
	}
	out := tidyLines(string(b))
	if err != nil && out != "" {
		err = fmt.Errorf("%w: %s", err, out)
	}
	return out, errors.Join(err, readErr)
}

// ErrNerdctlUnobtainable says that the module proxy no longer served nerdctl when `make tools` ran. Tests skip with it;
// that nerdctl is missing for any other reason is a plain error.
var ErrNerdctlUnobtainable = errors.New("nerdctl could not be obtained")

// NerdctlUnobtainable is nil where bin/ has nerdctl.
func (r *Rig) NerdctlUnobtainable() error {
	_, err := os.Stat(filepath.Join(r.bin, "nerdctl"))
	if err == nil {
		return nil
	}
	reason, readErr := os.ReadFile(filepath.Join(r.bin, ".nerdctl-unobtainable"))
	if readErr != nil {
		return fmt.Errorf("%w: run `make tools` first", err)
	}
	return fmt.Errorf("%w: %s", ErrNerdctlUnobtainable, bytes.TrimSpace(reason))
}
