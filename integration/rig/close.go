// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package rig

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/integration/hddsim/block"
)

// Close takes everything down: containers, shims, programs, mounts, loop devices, directories; also what a failed start
// or a killed containerd has left. With Options.Keep it leaves all that in place.
func (r *Rig) Close() error {
	var errs []error
	if r.Containerd != nil && r.Containerd.Running() && !r.options.Keep {
		errs = append(errs, r.removeContainers())
	}
	if r.Link != nil {
		r.Link.SetDown(true)
	}
	if r.linkServer != nil {
		errs = append(errs, r.linkServer.Close())
	}
	if r.Registry != nil {
		errs = append(errs, r.Registry.Close())
	}
	r.mu.Lock()
	if r.client != nil {
		errs = append(errs, r.client.Close())
		r.client = nil
	}
	r.mu.Unlock()
	if r.options.Keep {
		return errors.Join(errs...)
	}
	for _, p := range []*Process{r.Containerd, r.Daemon} {
		if p != nil {
			errs = append(errs, p.Stop())
		}
	}
	for _, f := range r.sockets {
		errs = append(errs, f.Close())
	}
	return errors.Join(append(errs, Remove(r.Dir))...)
}

// removeContainers removes the containers of all namespaces the orderly way, by which runc removes their cgroups too.
// What resists is left to Remove.
func (r *Rig) removeContainers() error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	c, err := r.Client()
	if err != nil {
		return err
	}
	all, err := c.NamespaceService().List(ctx)
	if err != nil {
		return fmt.Errorf("list namespaces: %w", err)
	}
	var errs []error
	for _, ns := range all {
		ctx := namespaces.WithNamespace(ctx, ns)
		containers, err := c.Containers(ctx)
		errs = append(errs, err)
		for _, container := range containers {
			errs = append(errs, removeContainer(ctx, c, container))
		}
	}
	return errors.Join(errs...)
}

func removeContainer(ctx context.Context, c *client.Client, container client.Container) error {
	task, err := container.Task(ctx, nil)
	if err == nil {
		info, getErr := c.TaskService().Get(ctx, &tasks.GetRequest{ContainerID: container.ID()})
		if _, err = task.Delete(ctx, client.WithProcessKill); err == nil && getErr == nil {
			removeFifos(info.GetProcess().GetStdout())
		}
	}
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("remove task %q: %w", container.ID(), err)
	}
	if err := container.Delete(ctx, client.WithSnapshotCleanup); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("remove container %q: %w", container.ID(), err)
	}
	return nil
}

// removeFifos removes the directory of a detached task's pipes, which its client left to whoever deletes the task.
func removeFifos(pipe string) {
	const common = "/run/containerd/fifo/"
	if dir, _, ok := strings.Cut(strings.TrimPrefix(pipe, common), "/"); ok && strings.HasPrefix(pipe, common) {
		_ = os.RemoveAll(common + dir)
	}
}

// Remove takes down what is left of a rig whose Close never ran, or kept it, from its directory alone: the
// processes that were started with a path in it and their children, mounts, loop devices, runc's state, the directory.
func Remove(dir string) error {
	if !filepath.IsAbs(dir) || filepath.Dir(dir) == "/" {
		return fmt.Errorf("remove rig %q: not the directory of a rig", dir)
	}
	tasks, _ := filepath.Glob(filepath.Join(dir, "run/io.containerd.runtime.v2.task/*/*"))
	spaces, _ := filepath.Glob(filepath.Join(dir, "run/io.containerd.runtime.v2.task/*"))
	errs := []error{killProcesses(dir), block.UnmountBelow(dir), block.DetachBelow(dir)}
	for _, task := range tasks {
		forgetContainer(task)
	}
	for _, space := range spaces {
		forgetNamespace(filepath.Base(space))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove rig %q: %w", dir, err)
	}
	return os.RemoveAll(dir)
}

// forgetContainer removes what is left outside the rig's directory of a container whose shim was killed: the shim's
// socket, runc's state, empty cgroups. Failures are not worth a word, the next boot clears all three.
func forgetContainer(task string) {
	namespace, id := filepath.Base(filepath.Dir(task)), filepath.Base(task)
	var bootstrap struct {
		Address string `json:"address"`
	}
	if b, err := os.ReadFile(filepath.Join(task, "bootstrap.json")); err == nil && json.Unmarshal(b, &bootstrap) == nil {
		if socket, ok := strings.CutPrefix(bootstrap.Address, "unix://"); ok {
			_ = os.Remove(socket)
		}
	}
	_ = os.RemoveAll(filepath.Join("/run/containerd/runc", namespace, id))
	removeGroups(namespace + "/" + id)
}

// forgetNamespace removes what is shared by the containers of a namespace, unless others are left in it.
func forgetNamespace(namespace string) {
	_ = os.Remove(filepath.Join("/run/containerd/runc", namespace))
	removeGroups(namespace)
}

func removeGroups(name string) {
	for _, root := range []string{"/sys/fs/cgroup/*/", "/sys/fs/cgroup/"} {
		groups, _ := filepath.Glob(root + name)
		for _, group := range groups {
			_ = os.Remove(group)
		}
	}
}

// ours are the programs that a rig starts, by the name they were started with.
var ours = map[string]bool{
	"containerd": true, "containerd-shim-runc-v2": true, "containerd-nhybrid-grpc": true, "nhybrid-hddsim": true,
}

// killProcesses kills our programs that have a path below dir among their arguments, shims with the containers below
// them, and waits until they are gone.
func killProcesses(dir string) error {
	deadline := time.Now().Add(stopTimeout)
	for {
		pids, err := processesOf(dir)
		if err != nil || len(pids) == 0 {
			return err
		}
		for _, pid := range pids {
			if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("kill process %d: %w", pid, err)
			}
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("processes %v are still there %v after SIGKILL", pids, stopTimeout)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func processesOf(dir string) ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	parent := map[int]int{}
	shim := map[int]bool{}
	var found []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		state, ppid := processState(pid)
		if state == "" || state == "Z" {
			continue // gone, or waits for its parent to look
		}
		parent[pid] = ppid
		cmdline, err := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if err != nil {
			continue
		}
		name, args, _ := strings.Cut(string(cmdline), "\x00")
		if ours[filepath.Base(name)] && strings.Contains("\x00"+args, "\x00"+dir+"/") {
			found = append(found, pid)
			shim[pid] = filepath.Base(name) == "containerd-shim-runc-v2"
		}
	}
	for pid, ppid := range parent {
		if shim[ppid] {
			found = append(found, pid) // the first process of a container: its death ends the others
		}
	}
	return found, nil
}

// processState reads state and parent of a process; "" where there is none.
func processState(pid int) (state string, ppid int) {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return "", 0
	}
	// The name, in parentheses, may hold anything.
	rest := string(b[strings.LastIndexByte(string(b), ')')+1:])
	if _, err := fmt.Sscan(rest, &state, &ppid); err != nil {
		return "", 0
	}
	return state, ppid
}
