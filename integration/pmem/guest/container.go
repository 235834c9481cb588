// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/nhybrid/nhybrid/integration/pmem/internal/manifest"
)

// maxShown keeps a failure readable on one line.
const maxShown = 5

// runOnce runs a container of the image to its end and returns its output.
func (g *guest) runOnce(ctx context.Context, id string, flags []string, args ...string) (string, error) {
	return g.runImage(ctx, g.image(), id, flags, args...)
}

func (g *guest) runImage(ctx context.Context, image, id string, flags []string, args ...string) (string, error) {
	cmd := append([]string{"run", "--rm", "--snapshotter", g.snapshotter}, flags...)
	return ctr(ctx, append(append(cmd, image, id), args...)...)
}

// container is one that runs.
type container struct{ id string }

// startContainer starts a container that waits. Its names of processes and snapshots are its id.
func (g *guest) startContainer(ctx context.Context, id, image string, flags []string) (container, error) {
	cmd := append([]string{"run", "--detach", "--snapshotter", g.snapshotter}, flags...)
	_, err := ctr(ctx, append(cmd, image, id, "/bin/sleep", "100000")...)
	return container{id: id}, err
}

// root is where the machine, and not only the container, sees the container's root filesystem.
func (c container) root() string {
	return filepath.Join("/run/containerd/io.containerd.runtime.v2.task/default", c.id, "rootfs")
}

// exec runs a command in the container and returns its output.
func (c container) exec(ctx context.Context, args ...string) (string, error) {
	return ctr(ctx, append([]string{"tasks", "exec", "--exec-id", "e", c.id}, args...)...)
}

// compare reads the whole root filesystem and compares it with a tree.
func (c container) compare(want manifest.Tree) error {
	got, err := manifest.Read(c.root())
	if err != nil {
		return err
	}
	return equal(want, got)
}

func equal(want, got manifest.Tree) error {
	diffs := manifest.Differences(want, got)
	if len(diffs) == 0 {
		return nil
	}
	more := ""
	if n := len(diffs) - maxShown; n > 0 {
		more = fmt.Sprintf("; and %d more", n)
	}
	return fmt.Errorf("%d of %d files differ: %s%s", len(diffs), len(want), strings.Join(diffs[:min(len(diffs), maxShown)], "; "), more)
}

// stop ends the container's process and leaves its snapshot.
func (c container) stop(ctx context.Context) error {
	_, err := ctr(ctx, "tasks", "rm", "--force", c.id)
	return err
}

// forget removes the record of a stopped container, and its snapshot.
func (c container) forget(ctx context.Context) error {
	_, err := ctr(ctx, "containers", "rm", c.id)
	return err
}

func (c container) remove(ctx context.Context) error {
	return errors.Join(c.stop(ctx), c.forget(ctx))
}
