// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package operator

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/nhybrid/nhybrid/hif"
	"github.com/nhybrid/nhybrid/snapshotter/control"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
	"github.com/nhybrid/nhybrid/snapshotter/store"
)

// whereInline tells where a small file stands, and why.
func (s backend) whereInline(f *control.File, top string) {
	image, tier := s.store.ViewImage(top)
	f.Tier, f.DataPath = tier.String(), []byte(image)
	f.Reason = fmt.Sprintf("it has no more than %d bytes and stands in the metadata", pack.InlineMax)
}

// whereIs tells where the kernel finds the data of a file, in the order in which it looks, and why they stand there.
func (s backend) whereIs(ctx context.Context, f *control.File, sub *subject, ref pack.Ref) {
	redirect, top := ref.Redirect(), sub.topID()
	e, err := s.store.Extent(ref)
	l, lost := s.store.Layer(store.LayerID(ref.Layer))
	if err = errors.Join(err, lost); err != nil {
		f.Reason = err.Error()
		return
	}
	switch onNVM := s.store.OnNVM(ref) >= 0; {
	case l.Damaged != "":
		f.Reason = "its layer cannot be used"
		return
	case e.Hole && l.State != store.Home && !onNVM:
		f.Reason = "it stood on NVM alone, where it is not any more; the layer is unpacked anew when this is found"
		return
	case onNVM:
		f.Tier, f.DataPath = "nvm", []byte(filepath.Join(s.store.Tiers.DataRoot(), redirect))
	case s.store.PartsBytes(top)[redirect] > 0:
		f.Tier, f.DataPath = "parts", []byte(filepath.Join(s.store.PartsPath(top), redirect))
	default:
		f.Tier, f.DataPath = "hdd", fmt.Appendf(nil, "%s, at byte %d", s.store.PackPath(l.ID), e.Offset())
	}
	f.Reason = facts{
		size: e.Size, stands: f.Tier, hole: e.Hole, home: l.State == store.Home,
		directory: l.Blob == "", repaired: l.Repairs > 0, holes: l.Holes, decision: decisionOf(&l), heat: s.heat(ctx, sub, ref),
	}.reason()
}

// decisionOf is the recorded decision about a layer, nil if there is none.
func decisionOf(l *store.Layer) *control.Decision {
	d := &control.Decision{}
	if l.Decision == nil || protojson.Unmarshal(l.Decision, d) != nil {
		return nil
	}
	return d
}

// heat is what is known of the starts that use a file, nil if this cannot be told.
func (s backend) heat(ctx context.Context, sub *subject, ref pack.Ref) *hif.Heat {
	if s.hot == nil {
		return nil
	}
	var image digest.Digest
	if sub.img != nil {
		image = sub.img.Manifest
	}
	h, err := s.hot.Heat(ctx, image, sub.topID(), ref)
	if err != nil {
		log.G(ctx).WithError(err).WithField("file", ref.Redirect()).Warn("whether a file is hot cannot be told")
		return nil
	}
	return &h
}
