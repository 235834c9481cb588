// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package operator

import (
	"context"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/nhybrid/nhybrid/hif"
	"github.com/nhybrid/nhybrid/hif/profile"
	"github.com/nhybrid/nhybrid/snapshotter/control"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
	"github.com/nhybrid/nhybrid/snapshotter/pull"
	"github.com/nhybrid/nhybrid/snapshotter/store"
)

// defaultNamespace is containerd's own default, and ctr's.
const defaultNamespace = "default"

func (s backend) manager() (*hif.Manager, error) {
	if s.hot == nil {
		return nil, fmt.Errorf("this daemon keeps no hot files: %w", errdefs.ErrFailedPrecondition)
	}
	return s.hot, nil
}

// digestOf is the digest of the manifest that ref names, by itself or through
// containerd's image store. A digest that containerd does not know is returned
// as it is: there may be a profile of an image that was removed.
func (s backend) digestOf(ctx context.Context, namespace, ref string) (digest.Digest, error) {
	if namespace == "" {
		namespace = defaultNamespace
	}
	d, noDigest := digest.Parse(ref)
	images, err := s.images()
	if err == nil {
		var img *pull.Image
		if img, err = Unpacked(ctx, s.store, images, namespace, ref); err == nil {
			return img.Manifest, nil
		}
	}
	if noDigest == nil && (errdefs.IsNotFound(err) || errdefs.IsUnavailable(err)) {
		return d, nil
	}
	return "", err
}

// hotImage is the image of the store that ref names.
func (s backend) hotImage(ctx context.Context, namespace, ref string) (*hif.Manager, hif.Image, error) {
	m, err := s.manager()
	if err != nil {
		return nil, hif.Image{}, err
	}
	d, err := s.digestOf(ctx, namespace, ref)
	if err != nil {
		return nil, hif.Image{}, err
	}
	if _, err := digest.Parse(ref); namespace == "" && err != nil {
		namespace = defaultNamespace
	}
	i, err := m.Find(ctx, namespace, d)
	return m, i, err
}

func (s backend) info(ctx context.Context, k hif.Known) *control.ProfileInfo {
	p := k.Profile
	m := &control.ProfileInfo{
		Digest: k.Digest.String(), Repository: p.Repository, Known: string(k.How), Starts: int64(p.Starts), Incomplete: int64(p.Incomplete),
		Files: int64(len(p.Files)), Rules: int64(len(p.Rules)), Updated: timestamppb.New(p.Updated), Inherited: p.Inherited.String(),
	}
	for _, h := range k.Hot {
		m.HotBytes += h.Size
	}
	if k.Image != nil {
		m.Images = s.names(ctx, *k.Image)
	}
	return m
}

// names are the references of an image.
func (s backend) names(_ context.Context, i hif.Image) []string {
	if i.Name == "" {
		return []string{i.Digest.String()}
	}
	return []string{i.Name}
}

// Profiles implements [control.HotBackend].
func (s backend) Profiles(ctx context.Context, r *control.ProfilesRequest, send func(*control.ProfileInfo) error) error {
	m, err := s.manager()
	if err != nil {
		return err
	}
	return m.All(ctx, func(k hif.Known) error {
		if r.Namespace != "" && (k.Image == nil || k.Image.Namespace != r.Namespace) {
			return nil
		}
		return send(s.info(ctx, k))
	})
}

// GetProfile implements [control.HotBackend].
func (s backend) GetProfile(ctx context.Context, r *control.ImageRequest) (*control.ProfileInfo, profile.Profile, error) {
	m, err := s.manager()
	if err != nil {
		return nil, profile.Profile{}, err
	}
	d, err := s.digestOf(ctx, r.Namespace, r.Image)
	if err != nil {
		return nil, profile.Profile{}, err
	}
	k, err := m.Get(ctx, d)
	if err != nil {
		return nil, profile.Profile{}, err
	}
	return s.info(ctx, k), k.Profile, nil
}

// PutProfile implements [control.HotBackend].
func (s backend) PutProfile(ctx context.Context, r *control.ImageRequest, p profile.Profile) (*control.PutResponse, error) {
	ref := r.GetImage()
	if ref == "" {
		ref = p.Image.String()
	}
	m, image, err := s.hotImage(ctx, r.GetNamespace(), ref)
	if err != nil {
		return nil, err
	}
	accepted, err := m.Accept(ctx, image, p)
	if err != nil {
		return nil, err
	}
	return s.accepted(ctx, m, image, accepted)
}

func (s backend) accepted(ctx context.Context, m *hif.Manager, image hif.Image, a hif.Accepted) (*control.PutResponse, error) {
	k, err := m.Get(ctx, image.Digest)
	if err != nil {
		return nil, err
	}
	return &control.PutResponse{Profile: s.info(ctx, k), LeftOut: control.NewLeftOut(a.LeftOut), Digest: a.Artifact.String()}, nil
}

// RemoveProfile implements [control.HotBackend].
func (s backend) RemoveProfile(ctx context.Context, r *control.ImageRequest) error {
	m, err := s.manager()
	if err != nil {
		return err
	}
	d, err := s.digestOf(ctx, r.Namespace, r.Image)
	if err != nil {
		return err
	}
	return m.Remove(d)
}

// SetRule implements [control.HotBackend].
func (s backend) SetRule(ctx context.Context, r *control.SetRuleRequest) (*control.SetRuleResponse, error) {
	rule, err := profile.NewRule(r.Glob, profile.Action(r.Action))
	if err != nil {
		return nil, err
	}
	m, image, err := s.hotImage(ctx, r.Namespace, r.Image)
	if err != nil {
		return nil, err
	}
	rules, matched, err := m.SetRule(ctx, image, rule)
	if err != nil {
		return nil, err
	}
	out := &control.SetRuleResponse{Files: int64(len(matched))}
	for _, e := range matched {
		out.Bytes += e.Size
	}
	for _, r := range rules {
		out.Rules = append(out.Rules, &control.Rule{Glob: r.Glob, Action: string(r.Action)})
	}
	return out, nil
}

// PushProfile implements [control.HotBackend].
func (s backend) PushProfile(ctx context.Context, r *control.RegistryRequest) (*control.PushResponse, error) {
	m, image, err := s.hotImage(ctx, r.Namespace, r.Image)
	if err != nil {
		return nil, err
	}
	d, err := m.Push(ctx, image, r.PlainHttp)
	if err != nil {
		return nil, err
	}
	k, err := m.Get(ctx, image.Digest)
	if err != nil {
		return nil, err
	}
	return &control.PushResponse{Digest: d.String(), Profile: s.info(ctx, k)}, nil
}

// PullProfile implements [control.HotBackend].
func (s backend) PullProfile(ctx context.Context, r *control.RegistryRequest) (*control.PutResponse, error) {
	m, image, err := s.hotImage(ctx, r.Namespace, r.Image)
	if err != nil {
		return nil, err
	}
	accepted, err := m.Fetch(ctx, image, r.PlainHttp)
	if err != nil {
		return nil, err
	}
	return s.accepted(ctx, m, image, accepted)
}

// Ready implements [control.HotBackend].
func (s backend) Ready(ctx context.Context, r *control.ReadyRequest) (*control.ReadyResponse, error) {
	m, err := s.manager()
	if err != nil {
		return nil, err
	}
	namespace := r.Namespace
	if namespace == "" {
		namespace = defaultNamespace
	}
	snapshot := r.Container
	if source, err := s.images(); err == nil {
		if c, err := source.Container(ctx, namespace, r.Container); err == nil {
			snapshot = c.Snapshot
		}
	}
	start, err := m.Ready(ctx, namespace, snapshot)
	if err != nil {
		return nil, err
	}
	return &control.ReadyResponse{Start: s.openStart(start)}, nil
}

func (s backend) openStart(o hif.OpenStart) *control.OpenStart {
	return &control.OpenStart{
		Container: o.Snapshot, Namespace: o.Namespace, Image: o.Image, Files: int64(o.Files), Since: timestamppb.New(o.Began),
	}
}

// Files implements [control.HotBackend].
func (s backend) Files(ctx context.Context, r *control.FilesRequest, send func(*control.ImageFile) error) error {
	m, image, err := s.hotImage(ctx, r.Namespace, r.Image)
	if err != nil {
		return err
	}
	inParts := s.store.PartsBytes(image.View)
	below := path.Join("/", string(r.Path))
	return m.Files(ctx, image, func(f hif.File, hot *profile.Hot) error {
		if below != "/" && f.Path != below && !strings.HasPrefix(f.Path, below+"/") {
			return nil
		}
		out := &control.ImageFile{Path: []byte(strings.TrimPrefix(f.Path, "/")), Size: f.Size, Tier: "hdd"}
		ref, err := pack.ParseRedirect(f.Redirect)
		if err != nil {
			return err
		}
		id := store.LayerID(ref.Layer)
		out.Layer = int32(slices.Index(image.Chain, id.String()))
		if hot != nil {
			out.Hot, out.Pinned, out.Weight, out.Starts = true, hot.Pinned, hot.Weight, int64(hot.Starts)
		}
		onNVM := s.store.OnNVM(ref)
		part, divided := inParts[f.Redirect]
		l, err := s.store.Layer(id)
		if err != nil {
			return err
		}
		switch {
		case onNVM < 0 && divided:
			out.Tier, out.NvmBytes = "parts", part
		case onNVM >= 0 && l.State == store.Home:
			out.Tier, out.NvmBytes = "both", onNVM
		case onNVM >= 0:
			out.Tier, out.NvmBytes = "nvm", onNVM
		}
		return send(out)
	})
}
