// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package ctrd

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/rootfs"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/nhybrid/nhybrid/scmlib/region"
	"github.com/nhybrid/nhybrid/scmlib/region/api"
)

// OpCommit is the operation of Handler.
const OpCommit = "commit"

// CommitArgs of OpCommit.
type CommitArgs struct {
	Namespace string `json:"namespace"`
	Container string `json:"container"`
	Ref       string `json:"ref"`         // name of the image
	OnlyScm   bool   `json:"only_region"` // leave out what the container has changed of its root filesystem
}

// Committed is what Commit made.
type Committed struct {
	Image  string        `json:"image"`
	Digest digest.Digest `json:"digest"`
	Size   int64         `json:"region_size"`
	Used   int64         `json:"region_used"`
	Stood  time.Duration `json:"stood_ns"` // for how long the container stood still
}

// AnnotationSize is set on the layer that carries a region.
const AnnotationSize = "io.nhybrid.scm.size"

// Handler serves Commit to the operator's tool.
func Handler(connect func() (*client.Client, error), store *region.Store) region.Handler {
	return region.Plain(func(ctx context.Context, a CommitArgs) (Committed, error) {
		c, err := connect()
		if err != nil {
			return Committed{}, err
		}
		return Commit(ctx, c, store, a)
	})
}

// Commit makes an image of a container: the layers it was started from, what it has changed of them, and its region, both as they were at one instant. A
// container that is started from that image with a region finds this one.
func Commit(ctx context.Context, c *client.Client, store *region.Store, a CommitArgs) (_ Committed, err error) {
	done := Committed{Image: a.Ref}
	fail := func(err error) (Committed, error) {
		return done, fmt.Errorf("commit container %s to %s: %w", a.Container, a.Ref, err)
	}
	if a.Ref == "" {
		return fail(fmt.Errorf("the image needs a name: %w", errdefs.ErrInvalidArgument))
	}
	ctx = namespaces.WithNamespace(ctx, a.Namespace)
	info, err := Find(ctx, c, a.Container)
	if err != nil {
		return fail(err)
	}
	ref, err := store.RegionOf(a.Namespace, info.ID)
	if err != nil {
		return fail(err)
	}
	manifest, config, err := baseOf(ctx, c, info)
	if err != nil {
		return fail(err)
	}
	// What is written must not be collected before the image refers to it.
	ctx, release, err := c.WithLease(ctx, leases.WithRandomID(), leases.WithExpiration(time.Hour))
	if err != nil {
		return fail(err)
	}
	defer func() { err = errors.Join(err, release(context.WithoutCancel(ctx))) }()

	var changes ocispec.Descriptor
	image, err := store.Take(ctx, ref, func(ctx context.Context) error {
		if a.OnlyScm {
			return nil
		}
		var err error
		changes, err = rootfs.CreateDiff(ctx, info.SnapshotKey, c.SnapshotService(info.Snapshotter), c.DiffService())
		return err
	})
	if err != nil {
		return fail(err)
	}
	defer image.Close()
	if changes.Digest != "" {
		id, err := images.GetDiffID(ctx, c.ContentStore(), changes)
		if err != nil {
			return fail(err)
		}
		grow(&manifest, &config, changes, id, "nhybridctl scm commit: changes of the root filesystem")
	}
	layer, id, used, err := writeLayer(ctx, c.ContentStore(), image)
	if err != nil {
		return fail(err)
	}
	grow(&manifest, &config, layer, id, "nhybridctl scm commit: region of "+region.FormatSize(image.Record.Size))
	target, err := writeImage(ctx, c.ContentStore(), manifest, config)
	if err != nil {
		return fail(err)
	}
	if err := nameImage(ctx, c.ImageService(), images.Image{Name: a.Ref, Target: target, UpdatedAt: time.Now()}); err != nil {
		return fail(err)
	}
	named, err := c.GetImage(ctx, a.Ref)
	if err == nil {
		err = named.Unpack(ctx, info.Snapshotter)
	}
	if err != nil {
		return fail(err)
	}
	done.Digest, done.Size, done.Used, done.Stood = target.Digest, image.Record.Size, used, image.Stood
	return done, nil
}

// Find looks for a container by its id, or by the name that nerdctl gave it. The namespace is that of ctx.
func Find(ctx context.Context, c *client.Client, name string) (containers.Container, error) {
	info, err := c.ContainerService().Get(ctx, name)
	if err == nil || !errdefs.IsNotFound(err) {
		return info, err
	}
	named, lerr := c.ContainerService().List(ctx, fmt.Sprintf("labels.%q==%q", "nerdctl/name", name))
	if lerr == nil && len(named) == 1 {
		return named[0], nil
	}
	return info, errors.Join(err, lerr)
}

// imageConfig is the configuration of an image, with all that other tools have put there.
type imageConfig struct {
	ocispec.Image
	all map[string]json.RawMessage
}

func readConfig(ctx context.Context, cs content.Store, d ocispec.Descriptor) (config imageConfig, err error) {
	b, err := content.ReadBlob(ctx, cs, d)
	if err == nil {
		err = errors.Join(json.Unmarshal(b, &config.Image), json.Unmarshal(b, &config.all))
	}
	if err != nil {
		return config, fmt.Errorf("configuration of its image: %w", err)
	}
	return config, nil
}

// MarshalJSON writes what was read with what is new.
func (c imageConfig) MarshalJSON() ([]byte, error) {
	all := maps.Clone(c.all)
	for key, v := range map[string]any{"created": c.Created, "rootfs": c.RootFS, "history": c.History} {
		b, err := json.Marshal(v)
		if err != nil {
			return nil, err
		}
		all[key] = b
	}
	return json.Marshal(all)
}

func grow(m *ocispec.Manifest, config *imageConfig, layer ocispec.Descriptor, id digest.Digest, how string) {
	now := time.Now().UTC()
	m.Layers = append(slices.Clone(m.Layers), layer)
	config.RootFS.DiffIDs = append(slices.Clone(config.RootFS.DiffIDs), id)
	config.History = append(slices.Clone(config.History), ocispec.History{Created: &now, CreatedBy: how})
	config.Created = &now
}

// writeLayer writes the layer that carries the region. It is compressed at the region's rate of reading.
func writeLayer(ctx context.Context, cs content.Store, image *region.Image) (d ocispec.Descriptor, id digest.Digest, used int64, err error) {
	// Once to know the size, which stands before the content in a tar archive. The image does not change, so it comes out the same.
	stats, err := image.Measure()
	if err != nil {
		return d, "", 0, err
	}
	ref := "scm-" + image.Record.ID + "-" + image.Taken.Format("20060102150405.000000000")
	w, err := content.OpenWriter(ctx, cs, content.WithRef(ref))
	if err != nil {
		return d, "", 0, fmt.Errorf("write layer: %w", err)
	}
	defer w.Close()
	plain := digest.Canonical.Digester()
	var written counter
	z, err := gzip.NewWriterLevel(io.MultiWriter(w, &written), gzip.BestSpeed)
	if err != nil {
		return d, "", 0, err
	}
	if err := writeTar(ctx, io.MultiWriter(z, plain.Hash()), image, stats.Stream); err != nil {
		return d, "", 0, fmt.Errorf("write layer: %w", err)
	}
	if err := z.Close(); err != nil {
		return d, "", 0, fmt.Errorf("write layer: %w", err)
	}
	id = plain.Digest()
	labels := content.WithLabels(map[string]string{"containerd.io/uncompressed": id.String()})
	dgst := w.Digest()
	if err := w.Commit(ctx, int64(written), dgst, labels); err != nil && !errdefs.IsAlreadyExists(err) {
		return d, "", 0, fmt.Errorf("write layer: %w", err)
	}
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: dgst, Size: int64(written),
		Annotations: map[string]string{AnnotationSize: fmt.Sprint(image.Record.Size)}}, id, stats.Used, nil
}

type counter int64

func (c *counter) Write(b []byte) (int, error) { *c += counter(len(b)); return len(b), nil }

func writeTar(ctx context.Context, w io.Writer, image *region.Image, size int64) error {
	t := tar.NewWriter(w)
	// Whole seconds, as in all layers: a time with a fraction would let a later comparison take a changed file of the same size for the same.
	when := image.Taken.Truncate(time.Second)
	if err := t.WriteHeader(&tar.Header{Name: path.Dir(api.Image) + "/", Typeflag: tar.TypeDir, Mode: 0o755, ModTime: when}); err != nil {
		return err
	}
	if err := t.WriteHeader(&tar.Header{Name: api.Image, Typeflag: tar.TypeReg, Mode: 0o600, Size: size, ModTime: when}); err != nil {
		return err
	}
	if _, err := image.Encode(ctx, t); err != nil {
		return err
	}
	return t.Close()
}

func writeImage(ctx context.Context, cs content.Store, m ocispec.Manifest, config imageConfig) (d ocispec.Descriptor, err error) {
	m.Versioned, m.MediaType = specs.Versioned{SchemaVersion: 2}, ocispec.MediaTypeImageManifest
	for i := range m.Layers {
		m.Layers[i].MediaType = ociType(m.Layers[i].MediaType)
	}
	if m.Config, err = writeJSON(ctx, cs, ocispec.MediaTypeImageConfig, config, nil); err != nil {
		return d, err
	}
	// By these labels containerd's collector finds what belongs to an image.
	labels := map[string]string{"containerd.io/gc.ref.content.config": m.Config.Digest.String()}
	for i, l := range m.Layers {
		labels[fmt.Sprintf("containerd.io/gc.ref.content.l.%d", i)] = l.Digest.String()
	}
	d, err = writeJSON(ctx, cs, ocispec.MediaTypeImageManifest, m, labels)
	d.Platform = &ocispec.Platform{Architecture: config.Architecture, OS: config.OS, Variant: config.Variant}
	return d, err
}

// ociType is the OCI name for a type of layer that Docker names otherwise: an OCI manifest should not mix the two.
func ociType(t string) string {
	switch t {
	case images.MediaTypeDockerSchema2Layer:
		return ocispec.MediaTypeImageLayer
	case images.MediaTypeDockerSchema2LayerGzip:
		return ocispec.MediaTypeImageLayerGzip
	case images.MediaTypeDockerSchema2LayerZstd:
		return ocispec.MediaTypeImageLayerZstd
	}
	return t
}

func writeJSON(ctx context.Context, cs content.Store, mediaType string, v any, labels map[string]string) (ocispec.Descriptor, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	var opts []content.Opt
	if labels != nil {
		opts = append(opts, content.WithLabels(labels))
	}
	if err := content.WriteBlob(ctx, cs, "scm-"+d.Digest.String(), bytes.NewReader(b), d, opts...); err != nil {
		return d, fmt.Errorf("write %s: %w", mediaType, err)
	}
	return d, nil
}

func nameImage(ctx context.Context, is images.Store, image images.Image) error {
	_, err := is.Create(ctx, image)
	if errdefs.IsAlreadyExists(err) {
		_, err = is.Update(ctx, image)
	}
	return err
}
