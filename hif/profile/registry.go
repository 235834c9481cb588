// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package profile

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// MediaType is the artifact type of a profile in a registry, and the media type
// of its one layer.
const MediaType = "application/vnd.nhybrid.profile.v1+json"

const (
	// maxAnswer bounds every answer of a registry that is not a profile:
	// manifests, lists of referrers, errors.
	maxAnswer = 4 << 20
	// maxTries bounds how many referrers of an image are looked at.
	maxTries = 8
)

// Via makes the transport of one push or pull, which knows mirrors, certificates
// and credentials of registries; see package internal/hosts.
type Via func(push, plainHTTP bool) http.RoundTripper

// Registry says how to reach a registry. The zero value takes HTTPS, and the
// credentials of docker's configuration.
type Registry struct {
	PlainHTTP bool
	Via       Via            // nil: [remote.DefaultTransport]
	Keychain  authn.Keychain // without Via; nil: [authn.DefaultKeychain]
}

func (r Registry) options(ctx context.Context, push bool) []remote.Option {
	keychain, base := r.Keychain, remote.DefaultTransport
	if keychain == nil {
		keychain = authn.DefaultKeychain
	}
	if r.Via != nil {
		keychain, base = authn.NewMultiKeychain(), r.Via(push, r.PlainHTTP) // of none
	}
	return []remote.Option{remote.WithContext(ctx), remote.WithAuthFromKeychain(keychain), remote.WithTransport(bounded{base})}
}

// repository is the repository that a reference to an image names; tag and
// digest are left away, the digest is always given beside it.
func (r Registry) repository(ref string) (name.Repository, error) {
	var opts []name.Option
	if r.PlainHTTP {
		opts = append(opts, name.Insecure)
	}
	parsed, err := name.ParseReference(ref, opts...)
	if err != nil {
		return name.Repository{}, fmt.Errorf("parse image reference %.200q: %w: %w", ref, err, errdefs.ErrInvalidArgument)
	}
	return parsed.Context(), nil
}

// Push stores a profile beside its image, as an artifact whose subject is the
// image's manifest; where the registry has no referrers API, under the fallback
// tag of OCI 1.1. The operator's rules stay here. ref names the repository; it
// must hold the image. The digest of the artifact's manifest is returned.
func (r Registry) Push(ctx context.Context, ref string, p Profile) (digest.Digest, error) {
	repo, err := r.repository(ref)
	if err != nil {
		return "", err
	}
	opts := r.options(ctx, true)
	p.Rules = nil
	var data bytes.Buffer
	if err := Encode(&data, p); err != nil {
		return "", err
	}
	subject, err := remote.Head(repo.Digest(p.Image.String()), opts...)
	if err != nil {
		return "", classed(fmt.Errorf("find image %s in %s: %w", p.Image, repo, err))
	}
	config := static.NewLayer([]byte("{}"), MediaType)
	body := static.NewLayer(data.Bytes(), MediaType)
	m := v1.Manifest{
		SchemaVersion: 2,
		MediaType:     types.OCIManifestSchema1,
		// The type stands in both places: registries of before OCI 1.1 list
		// referrers by the type of the config.
		ArtifactType: MediaType,
		Subject:      &v1.Descriptor{MediaType: subject.MediaType, Digest: subject.Digest, Size: subject.Size},
		Annotations:  map[string]string{ocispec.AnnotationCreated: p.Updated.Format(time.RFC3339)},
	}
	for _, l := range []v1.Layer{config, body} {
		d, err := describe(l)
		if err != nil {
			return "", err
		}
		if l == config {
			m.Config = d
		} else {
			m.Layers = []v1.Descriptor{d}
		}
		if err := remote.WriteLayer(repo, l, opts...); err != nil {
			return "", classed(fmt.Errorf("push profile of %s to %s: %w", p.Image, repo, err))
		}
	}
	raw, err := json.Marshal(m)
	if err != nil {
		return "", fmt.Errorf("encode manifest: %w", err)
	}
	dgst := digest.FromBytes(raw)
	if err := remote.Put(repo.Digest(dgst.String()), manifest(raw), opts...); err != nil {
		return "", classed(fmt.Errorf("push profile of %s to %s: %w", p.Image, repo, err))
	}
	return dgst, nil
}

func describe(l v1.Layer) (v1.Descriptor, error) {
	h, err := l.Digest()
	if err != nil {
		return v1.Descriptor{}, fmt.Errorf("digest of blob: %w", err)
	}
	size, err := l.Size()
	if err != nil {
		return v1.Descriptor{}, fmt.Errorf("size of blob: %w", err)
	}
	return v1.Descriptor{MediaType: MediaType, Digest: h, Size: size}, nil
}

// manifest is a manifest as remote.Put takes it.
type manifest []byte

func (m manifest) RawManifest() ([]byte, error)        { return m, nil }
func (m manifest) MediaType() (types.MediaType, error) { return types.OCIManifestSchema1, nil }

// Pull fetches the newest profile of an image that holds good: its manifest
// names the image as its subject, its digest and size are what the manifest
// says, and it decodes as a profile of this image. Where there is none the
// error is [errdefs.ErrNotFound]; where there are only bad ones it says what is
// wrong with each. Rules in it are dropped. The files are still to be held
// against the image, see [Fit]. artifact is the digest of the manifest that it
// came with.
func (r Registry) Pull(ctx context.Context, ref string, image digest.Digest) (p Profile, artifact digest.Digest, err error) {
	repo, err := r.repository(ref)
	if err != nil {
		return Profile{}, "", err
	}
	if err := checkDigest(image); err != nil {
		return Profile{}, "", err
	}
	opts := r.options(ctx, false)
	index, err := remote.Referrers(repo.Digest(image.String()), opts...)
	if err != nil {
		return Profile{}, "", classed(fmt.Errorf("list referrers of %s in %s: %w", image, repo, err))
	}
	list, err := index.IndexManifest()
	if err != nil {
		return Profile{}, "", classed(fmt.Errorf("list referrers of %s in %s: %w", image, repo, err))
	}
	found := slices.DeleteFunc(slices.Clone(list.Manifests), func(d v1.Descriptor) bool { return d.ArtifactType != MediaType })
	if len(found) == 0 {
		return Profile{}, "", fmt.Errorf("no profile of image %s in %s: %w", image, repo, errdefs.ErrNotFound)
	}
	slices.SortStableFunc(found, func(a, b v1.Descriptor) int {
		return cmp.Compare(b.Annotations[ocispec.AnnotationCreated], a.Annotations[ocispec.AnnotationCreated])
	})
	var bad error
	for _, d := range found[:min(len(found), maxTries)] {
		p, err := fetch(repo, d, image, opts)
		if err == nil {
			return p, digest.Digest(d.Digest.String()), nil
		}
		bad = errors.Join(bad, fmt.Errorf("profile %s of image %s in %s: %w", d.Digest, image, repo, err))
		if ctx.Err() != nil {
			break
		}
	}
	return Profile{}, "", classed(bad)
}

func fetch(repo name.Repository, d v1.Descriptor, image digest.Digest, opts []remote.Option) (Profile, error) {
	// Get and Layer hold what comes against the digest.
	got, err := remote.Get(repo.Digest(d.Digest.String()), opts...)
	if err != nil {
		return Profile{}, err
	}
	var m v1.Manifest
	if err := json.Unmarshal(got.Manifest, &m); err != nil {
		return Profile{}, invalid("manifest: %v", err)
	}
	switch {
	case m.Subject == nil || m.Subject.Digest.String() != image.String():
		return Profile{}, invalid("its subject is another image")
	case m.ArtifactType != MediaType && string(m.Config.MediaType) != MediaType:
		return Profile{}, invalid("its type is %.80q", m.ArtifactType)
	case len(m.Layers) != 1 || m.Layers[0].MediaType != MediaType:
		return Profile{}, invalid("it is not one layer of type %s", MediaType)
	case m.Layers[0].Size < 0 || m.Layers[0].Size > MaxBytes:
		return Profile{}, invalid("it says to have %d bytes, more than %d", m.Layers[0].Size, MaxBytes)
	}
	blob, err := remote.Layer(repo.Digest(m.Layers[0].Digest.String()), opts...)
	if err != nil {
		return Profile{}, err
	}
	body, err := blob.Compressed()
	if err != nil {
		return Profile{}, err
	}
	defer body.Close()
	// All is read before any of it is believed: only the end tells the digest.
	data, err := io.ReadAll(io.LimitReader(body, m.Layers[0].Size+1))
	if err != nil {
		return Profile{}, err
	}
	if int64(len(data)) != m.Layers[0].Size {
		return Profile{}, invalid("it has not the %d bytes that its manifest says", m.Layers[0].Size)
	}
	if dgst := digest.FromBytes(data).String(); dgst != m.Layers[0].Digest.String() {
		return Profile{}, invalid("its content is %s, not %s", dgst, m.Layers[0].Digest)
	}
	p, err := Decode(bytes.NewReader(data))
	if err != nil {
		return Profile{}, err
	}
	if p.Image != image {
		return Profile{}, invalid("it is a profile of image %s", p.Image)
	}
	p.Rules = nil
	return p, nil
}

// classed gives an error of the registry its class.
func classed(err error) error {
	const cure = "give credentials of the registry to the daemon: by docker's configuration of its user (DOCKER_CONFIG in its environment), or by a header in hosts.toml"
	var t *transport.Error
	if !errors.As(err, &t) {
		if errdefs.IsUnauthorized(err) { // by package internal/hosts
			return fmt.Errorf("%w: %s", err, cure)
		}
		return err
	}
	switch t.StatusCode {
	case http.StatusNotFound:
		return fmt.Errorf("%w (%w)", err, errdefs.ErrNotFound)
	case http.StatusUnauthorized:
		return fmt.Errorf("%w (%w): %s", err, errdefs.ErrUnauthenticated, cure)
	case http.StatusForbidden:
		return fmt.Errorf("%w (%w)", err, errdefs.ErrPermissionDenied)
	}
	return err
}

// bounded limits what a registry can make us read.
type bounded struct{ http.RoundTripper }

func (b bounded) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := b.RoundTripper.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	limit := int64(maxAnswer)
	if strings.Contains(req.URL.Path, "/blobs/") || req.Response != nil { // or where a blob was redirected to
		limit = MaxBytes
	}
	resp.Body = &boundedBody{resp.Body, limit}
	return resp, nil
}

type boundedBody struct {
	io.ReadCloser
	left int64
}

func (b *boundedBody) Read(p []byte) (int, error) {
	if int64(len(p)) > b.left+1 {
		p = p[:b.left+1]
	}
	n, err := b.ReadCloser.Read(p)
	if b.left -= int64(n); b.left < 0 {
		return 0, invalid("the registry's answer is too large")
	}
	return n, err
}
