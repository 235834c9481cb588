// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/rootfs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/integration/pmem/internal/manifest"
)

// changes are made in a container before it is committed. With metacopy=on the first of them leave files without data in the upper
// directory, and the renames redirects.
const changes = `set -e
chmod 600 /data/mode
chown 7:8 /data/owner
mv /data/owner /data/owner-renamed
mv /data/move /data/moved
echo more >>/data/write
rm /data/changed
rm -r /data/opaque
mkdir /data/opaque
echo over >/data/opaque/over
echo fresh >/data/fresh
ln /data/fresh /data/fresh-too
`

// changed is what the tree is after the changes. The times of what was written are taken from the live container.
func changed(before, live manifest.Tree) manifest.Tree {
	t := before.Clone()
	edit := func(name string, f func(*manifest.File)) {
		file := t[name]
		f(&file)
		t[name] = file
	}
	now := func(name string) { edit(name, func(f *manifest.File) { f.Mtime = live[name].Mtime }) }
	written := func(name, text string, links uint32) {
		t[name] = manifest.File{Mode: unix.S_IFREG | 0o644, Size: int64(len(text)), Digest: manifest.Digest([]byte(text)), Links: links}
		now(name)
	}
	edit("data/mode", func(f *manifest.File) { f.Mode = unix.S_IFREG | 0o600 })
	edit("data/owner", func(f *manifest.File) { f.UID, f.GID = 7, 8 })
	t.Rename("data/owner", "data/owner-renamed")
	t.Rename("data/move", "data/moved")
	// A rename where the kernel can (redirect_dir), else a copy, to whole seconds, by busybox.
	for name := range t {
		if name == "data/moved" || strings.HasPrefix(name, "data/moved/") {
			now(name)
		}
	}
	written("data/write", "written to in a container\nmore\n", 1)
	t.Remove("data/changed")
	t.Remove("data/opaque/new")
	now("data/opaque")
	written("data/opaque/over", "over\n", 1)
	written("data/fresh", "fresh\n", 2)
	written("data/fresh-too", "fresh\n", 2)
	now("data")
	return t
}

// commit changes a container, makes an image of it and shows that a container of that image sees the same. Where applied is true the
// difference is unpacked into a new snapshot, as nerdctl commit does; else the container's own upper directory becomes the layer,
// as in a build.
func (g *guest) commit(ctx context.Context, applied bool) error {
	client, err := containerd.New(socket)
	if err != nil {
		return err
	}
	defer client.Close()
	ctx = namespaces.WithNamespace(ctx, namespaces.Default)

	c, err := g.startContainer(ctx, "source", g.image(), nil)
	if err != nil {
		return err
	}
	if _, err := c.exec(ctx, "/bin/sh", "-c", changes); err != nil {
		return errors.Join(err, c.remove(ctx))
	}
	live, err := manifest.Read(c.root())
	if err != nil {
		return errors.Join(err, c.remove(ctx))
	}
	want := changed(g.expected, live)
	if err := c.compare(want); err != nil {
		return errors.Join(fmt.Errorf("before the commit: %w", err), c.remove(ctx))
	}
	if g.nhybrid() {
		if err := g.hardUpper(c); err != nil {
			return errors.Join(err, c.remove(ctx))
		}
	}
	if err := c.stop(ctx); err != nil {
		return err
	}
	name := "committed:upper"
	if applied {
		name = "committed:applied"
	}
	if err := g.commitImage(ctx, client, c.id, name, applied); err != nil {
		return errors.Join(fmt.Errorf("commit: %w", err), c.forget(ctx))
	}
	if err := c.forget(ctx); err != nil {
		return err
	}
	again, err := g.startContainer(ctx, "again", name, nil)
	if err != nil {
		return err
	}
	out, err := again.exec(ctx, "/bin/cat", "/data/mode", "/data/owner-renamed", "/data/moved/inner", "/data/write")
	if err == nil && out != "its mode changes in a container\nits owner changes in a container\nmoved with its directory\nwritten to in a container\nmore\n" {
		err = fmt.Errorf("the committed image reads %q", out)
	}
	got, readErr := manifest.Read(again.root())
	if applied {
		want, got = want.Seconds(), got.Seconds()
	}
	return errors.Join(err, readErr, equal(want, got), again.remove(ctx))
}

// hardUpper makes sure that the case is the hard one: the upper directory has a file without its data and a renamed lower
// directory.
func (g *guest) hardUpper(c container) error {
	upper, err := upperDir(c.root())
	if err != nil {
		return err
	}
	for name, attr := range map[string]string{
		"data/mode": "trusted.overlay.metacopy", "data/owner-renamed": "trusted.overlay.redirect", "data/moved": "trusted.overlay.redirect",
	} {
		if _, err := unix.Lgetxattr(filepath.Join(upper, name), attr, nil); err != nil {
			return fmt.Errorf("find %s of %s in the upper directory: %w", attr, name, err)
		}
	}
	return nil
}

// upperDir is the upper directory of the overlay that is mounted at a place.
func upperDir(mountPoint string) (string, error) {
	data, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(data)) {
		f := strings.Fields(line)
		if len(f) < 4 || f[1] != mountPoint {
			continue
		}
		for option := range strings.SplitSeq(f[3], ",") {
			if dir, ok := strings.CutPrefix(option, "upperdir="); ok {
				return dir, nil
			}
		}
	}
	return "", fmt.Errorf("find upper directory of %s: %w", mountPoint, errNone)
}

// commitImage makes an image of a stopped container.
func (g *guest) commitImage(ctx context.Context, client *containerd.Client, id, name string, applied bool) error {
	ctx, release, err := client.WithLease(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = release(context.WithoutCancel(ctx)) }()
	store, snapshotter := client.ContentStore(), client.SnapshotService(g.snapshotter)
	base, err := client.GetImage(ctx, g.image())
	if err != nil {
		return err
	}
	manifestOf, err := images.Manifest(ctx, store, base.Target(), base.Platform())
	if err != nil {
		return err
	}
	raw, err := content.ReadBlob(ctx, store, manifestOf.Config)
	if err != nil {
		return err
	}
	var config ocispec.Image
	if err := json.Unmarshal(raw, &config); err != nil {
		return err
	}
	layer, err := rootfs.CreateDiff(ctx, id, snapshotter, client.DiffService(), diff.WithMediaType(ocispec.MediaTypeImageLayer), diff.WithReference(name))
	if err != nil {
		return err
	}
	// The layer is not compressed, so its digest is its diff ID.
	config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, layer.Digest)
	chain := identity.ChainID(config.RootFS.DiffIDs).String()
	if !applied {
		if err := snapshotter.Commit(ctx, chain, id); err != nil {
			return err
		}
	}
	configDesc, err := writeJSON(ctx, store, ocispec.MediaTypeImageConfig, config, map[string]string{
		"containerd.io/gc.ref.snapshot." + g.snapshotter: chain,
	})
	if err != nil {
		return err
	}
	layers := append(manifestOf.Layers, layer)
	refs := map[string]string{"containerd.io/gc.ref.content.config": configDesc.Digest.String()}
	for i, l := range layers {
		refs[fmt.Sprintf("containerd.io/gc.ref.content.l.%d", i)] = l.Digest.String()
	}
	target, err := writeJSON(ctx, store, ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: configDesc, Layers: layers,
	}, refs)
	if err != nil {
		return err
	}
	img, err := client.ImageService().Create(ctx, images.Image{Name: name, Target: target})
	if err != nil {
		return err
	}
	if !applied {
		return nil
	}
	return containerd.NewImage(client, img).Unpack(ctx, g.snapshotter)
}

// writeJSON stores a value as a blob. The labels keep what it names from being collected.
func writeJSON(ctx context.Context, store content.Store, mediaType string, value any, labels map[string]string) (ocispec.Descriptor, error) {
	data, err := json.Marshal(value)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	return desc, content.WriteBlob(ctx, store, desc.Digest.String(), bytes.NewReader(data), desc, content.WithLabels(labels))
}
