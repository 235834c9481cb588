// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package registry brings regions to registries and back, as OCI artifacts of one layer: the stream of package stream, compressed with zstd.
package registry

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/nhybrid/nhybrid/scmlib/region"
)

const (
	// ArtifactType of a region in a registry.
	ArtifactType = "application/vnd.nhybrid.scm.region.v1"
	// LayerType of its one layer.
	LayerType = "application/vnd.nhybrid.scm.region.v1.stream+zstd"

	emptyType = "application/vnd.oci.empty.v1+json"
	// maxManifest bounds what is read of a manifest.
	maxManifest = 4 << 20
	// maxWindow bounds the memory that a stream can make the decoder take.
	maxWindow = 8 << 20
)

// Operations for the server: see Handlers.
const (
	OpPush = "push"
	OpPull = "pull"
)

// Remote says how to reach a registry. The zero value takes HTTPS, and the credentials of docker's configuration of the daemon's user.
type Remote struct {
	PlainHTTP bool
	// Via makes the transport of one push or pull, which knows mirrors, certificates and credentials of registries. nil: [remote.DefaultTransport].
	Via   func(push, plainHTTP bool) http.RoundTripper
	Spool string // directory for streams on their way; "": that for temporary files
}

// Args of the operations.
type Args struct {
	Namespace string `json:"namespace"`
	Region    string `json:"region"` // of push what ParseRef reads, of pull the name of the volume that is made
	Ref       string `json:"ref"`
	PlainHTTP bool   `json:"plain_http"`
}

// Pushed is what Push did.
type Pushed struct {
	Ref  string `json:"ref"` // with digest
	Used int64  `json:"used_bytes"`
	Sent int64  `json:"sent_bytes"`
}

// Handle adds the operations to a server.
func Handle(srv *region.Server, store *region.Store, r Remote) {
	with := func(a Args) Remote {
		r := r
		r.PlainHTTP = r.PlainHTTP || a.PlainHTTP
		return r
	}
	srv.Handle(OpPush, region.Plain(func(ctx context.Context, a Args) (Pushed, error) {
		ref, err := region.ParseRef(a.Namespace, a.Region)
		if err != nil {
			return Pushed{}, err
		}
		return with(a).Push(ctx, store, ref, a.Ref)
	}))
	srv.Handle(OpPull, region.Plain(func(ctx context.Context, a Args) (region.Record, error) {
		return with(a).Pull(ctx, store, a.Ref, a.Namespace, a.Region)
	}))
}

func (r Remote) parse(ref string) (name.Reference, error) {
	var opts []name.Option
	if r.PlainHTTP {
		opts = append(opts, name.Insecure)
	}
	n, err := name.ParseReference(ref, opts...)
	if err != nil {
		return nil, fmt.Errorf("parse reference %.200q: %w: %w", ref, err, errdefs.ErrInvalidArgument)
	}
	return n, nil
}

func (r Remote) options(ctx context.Context, push bool) []remote.Option {
	var keychain authn.Keychain = authn.DefaultKeychain
	base := remote.DefaultTransport
	if r.Via != nil {
		keychain, base = authn.NewMultiKeychain(), r.Via(push, r.PlainHTTP) // of none
	}
	return []remote.Option{remote.WithContext(ctx), remote.WithAuthFromKeychain(keychain), remote.WithTransport(base)}
}

// Push stores a region under a reference.
func (r Remote) Push(ctx context.Context, store *region.Store, from region.Ref, to string) (Pushed, error) {
	fail := func(err error) (Pushed, error) {
		return Pushed{}, classed(fmt.Errorf("push region %s to %s: %w", from, to, err))
	}
	ref, err := r.parse(to)
	if err != nil {
		return Pushed{}, err
	}
	image, err := store.Take(ctx, from, nil)
	if err != nil {
		return Pushed{}, err
	}
	defer image.Close()
	layer, used, err := r.spool(ctx, image)
	if err != nil {
		return fail(err)
	}
	defer layer.f.Close()
	config := static.NewLayer([]byte("{}"), emptyType)
	opts := r.options(ctx, true)
	for _, l := range []v1.Layer{config, layer} {
		if err := remote.WriteLayer(ref.Context(), l, opts...); err != nil {
			return fail(err)
		}
	}
	m := v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1, ArtifactType: ArtifactType,
		Layers: []v1.Descriptor{{MediaType: LayerType, Digest: layer.digest, Size: layer.size}},
		Annotations: map[string]string{
			ocispec.AnnotationCreated: image.Taken.Format(time.RFC3339),
			"io.nhybrid.scm.size":     fmt.Sprint(image.Record.Size), "io.nhybrid.scm.region": image.Record.Ref.String(),
		}}
	h, err := config.Digest()
	if err != nil {
		return fail(err)
	}
	m.Config = v1.Descriptor{MediaType: emptyType, Digest: h, Size: 2}
	raw, err := json.Marshal(m)
	if err != nil {
		return fail(err)
	}
	if err := remote.Put(ref, manifest(raw), opts...); err != nil {
		return fail(err)
	}
	sum := sha256.Sum256(raw)
	return Pushed{Ref: ref.Context().Digest("sha256:" + hex.EncodeToString(sum[:])).String(), Used: used, Sent: layer.size}, nil
}

type manifest []byte

func (m manifest) RawManifest() ([]byte, error)        { return m, nil }
func (m manifest) MediaType() (types.MediaType, error) { return types.OCIManifestSchema1, nil }

// spooled is a layer in a file without a name.
type spooled struct {
	f      *os.File
	digest v1.Hash
	size   int64
}

func (l *spooled) Digest() (v1.Hash, error)            { return l.digest, nil }
func (l *spooled) DiffID() (v1.Hash, error)            { return l.digest, nil }
func (l *spooled) Size() (int64, error)                { return l.size, nil }
func (l *spooled) MediaType() (types.MediaType, error) { return LayerType, nil }
func (l *spooled) Compressed() (io.ReadCloser, error) {
	return io.NopCloser(io.NewSectionReader(l.f, 0, l.size)), nil
}
func (l *spooled) Uncompressed() (io.ReadCloser, error) { return l.Compressed() }

// spool writes the stream to a file: a registry wants to know digest and size first, and may want it twice.
func (r Remote) spool(ctx context.Context, image *region.Image) (_ *spooled, used int64, err error) {
	f, err := os.CreateTemp(r.Spool, "region-")
	if err != nil {
		return nil, 0, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	if err := os.Remove(f.Name()); err != nil {
		return nil, 0, err
	}
	sum := sha256.New()
	z, err := zstd.NewWriter(io.MultiWriter(f, sum), zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(maxWindow/2))
	if err != nil {
		return nil, 0, err
	}
	stats, err := image.Encode(ctx, z)
	if err = errors.Join(err, z.Close()); err != nil {
		return nil, 0, err
	}
	size, err := f.Seek(0, io.SeekEnd)
	return &spooled{f, v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(sum.Sum(nil))}, size}, stats.Used, err
}

// Pull makes a volume from what Push stored. Digests of manifest and layer are compared, and the checksums of the stream; nothing is made
// of what does not hold.
func (r Remote) Pull(ctx context.Context, store *region.Store, from, namespace, volume string) (region.Record, error) {
	fail := func(err error) (region.Record, error) {
		return region.Record{}, classed(fmt.Errorf("pull region from %s: %w", from, err))
	}
	ref, err := r.parse(from)
	if err != nil {
		return region.Record{}, err
	}
	opts := r.options(ctx, false)
	got, err := remote.Get(ref, opts...)
	if err != nil {
		return fail(err)
	}
	layer, err := layerOf(got.Manifest)
	if err != nil {
		return fail(err)
	}
	blob, err := remote.Layer(ref.Context().Digest(layer.Digest.String()), opts...)
	if err != nil {
		return fail(err)
	}
	body, err := blob.Compressed() // compares the digest at its end
	if err != nil {
		return fail(err)
	}
	defer body.Close()
	z, err := zstd.NewReader(body, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
	if err != nil {
		return fail(err)
	}
	defer z.Close()
	record, err := store.Import(ctx, namespace, volume, z)
	if err != nil {
		return fail(err)
	}
	return record, nil
}

func layerOf(raw []byte) (d v1.Descriptor, err error) {
	var m v1.Manifest
	if len(raw) > maxManifest {
		return d, fmt.Errorf("its manifest has %d bytes: %w", len(raw), errdefs.ErrInvalidArgument)
	}
	if err := json.NewDecoder(bytes.NewReader(raw)).Decode(&m); err != nil {
		return d, fmt.Errorf("its manifest: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if m.ArtifactType != ArtifactType || len(m.Layers) != 1 || m.Layers[0].MediaType != LayerType {
		return d, fmt.Errorf("it is no region but %.100q with %d layers: %w", m.ArtifactType, len(m.Layers), errdefs.ErrInvalidArgument)
	}
	return m.Layers[0], nil
}

// classed gives answers of registries the class of what they mean.
func classed(err error) error {
	var t *transport.Error
	if !errors.As(err, &t) {
		return err
	}
	switch t.StatusCode {
	case http.StatusNotFound:
		return fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	case http.StatusUnauthorized, http.StatusForbidden:
		return fmt.Errorf("%w: %w", err, errdefs.ErrPermissionDenied)
	}
	return err
}
