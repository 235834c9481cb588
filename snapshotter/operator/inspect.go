// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package operator

import (
	"context"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/control"
	"github.com/nhybrid/nhybrid/snapshotter/pull"
	"github.com/nhybrid/nhybrid/snapshotter/store"
)

// subject is what an operator asked about: a chain of layers, and the image it
// belongs to if it does.
type subject struct {
	img    *pull.Image
	top    *store.Entry  // nil: the image is not unpacked
	layers []store.Entry // bottom first; without ID where the layer is not unpacked
}

// subject finds an image by its name, or a snapshot by key, id or chain id.
func (s backend) subject(ctx context.Context, ref, ns string) (*subject, error) {
	all, err := s.store.Entries(ctx)
	if err != nil {
		return nil, err
	}
	if sn, err := findSnapshot(all, ref, ns); err == nil {
		return &subject{top: sn, layers: layersBelow(all, sn)}, nil
	} else if !errdefs.IsNotFound(err) {
		return nil, err
	}
	source, err := s.images()
	if err != nil {
		return nil, err
	}
	if ns == "" {
		ns = "default"
	}
	named, err := source.Lookup(ctx, ns, ref)
	if err != nil {
		if errdefs.IsNotFound(err) {
			return nil, fmt.Errorf("no image and no snapshot %q in namespace %q; nhybridctl ls shows what there is, and nhybridctl watch what is being pulled: %w", ref, ns, errdefs.ErrNotFound)
		}
		return nil, err
	}
	img, layers := unpackedOf(all, named)
	found := &subject{img: img, layers: make([]store.Entry, len(layers))}
	for i, sn := range layers {
		if sn != nil {
			found.layers[i], found.top = *sn, sn
		}
	}
	return found, nil
}

// unpackedOf chooses among the images that a reference names: the first that is unpacked whole, or else the first. layers has
// a snapshot for each layer of it, bottom first; nil where the layer is not unpacked.
func unpackedOf(all []store.Entry, named []*pull.Image) (img *pull.Image, layers []*store.Entry) {
	byChain := map[[2]string]*store.Entry{} // by namespace and chain id
	for i := range all {
		if all[i].Info.Kind == snapshots.KindCommitted {
			byChain[[2]string{all[i].NS(), store.ClientKey(all[i].Info.Name)}] = &all[i]
		}
	}
	for _, i := range named {
		of := make([]*store.Entry, len(i.Layers))
		for n, l := range i.Layers {
			of[n] = byChain[[2]string{i.Namespace, l.ChainID.String()}]
		}
		whole := !slices.Contains(of, nil)
		if img == nil || whole {
			img, layers = i, of
		}
		if whole {
			break
		}
	}
	return img, layers
}

// Unpacked is the image that ref names, a name of containerd's image store or a digest. Of an index it is the one
// that is unpacked, or the host's.
func Unpacked(ctx context.Context, st *store.Store, source interface {
	Lookup(ctx context.Context, namespace, ref string) ([]*pull.Image, error)
}, ns, ref string) (*pull.Image, error) {
	named, err := source.Lookup(ctx, ns, ref)
	if err != nil {
		return nil, err
	}
	all, err := st.Entries(ctx)
	if err != nil {
		return nil, err
	}
	img, _ := unpackedOf(all, named)
	return img, nil
}

func findSnapshot(all []store.Entry, ref, ns string) (*store.Entry, error) {
	var found []*store.Entry
	for i := range all {
		sn := &all[i]
		if ns != "" && sn.NS() != ns {
			continue
		}
		name := store.ClientKey(sn.Info.Name)
		if sn.Info.Name == ref || sn.ID == ref || name == ref {
			return sn, nil
		}
		// The start of a chain id, with or without its algorithm, as tools show it.
		if len(ref) >= 4 && (strings.HasPrefix(name, ref) || strings.HasPrefix(name, "sha256:"+ref)) {
			found = append(found, sn)
		}
	}
	switch len(found) {
	case 0:
		return nil, fmt.Errorf("snapshot %q: %w", ref, errdefs.ErrNotFound)
	case 1:
		return found[0], nil
	}
	return nil, fmt.Errorf("%q is the start of %d snapshots; give more of it, or the id: %w", ref, len(found), errdefs.ErrInvalidArgument)
}

// layersBelow is the committed layers that sn stands on, itself included if it is one.
func layersBelow(all []store.Entry, sn *store.Entry) (layers []store.Entry) {
	byName := map[string]*store.Entry{}
	for i := range all {
		byName[all[i].Info.Name] = &all[i]
	}
	for ; sn != nil; sn = byName[sn.Info.Parent] {
		if sn.Info.Kind == snapshots.KindCommitted {
			layers = append(layers, *sn)
		}
	}
	slices.Reverse(layers)
	return layers
}

// Inspect implements [control.Backend].
func (s backend) Inspect(ctx context.Context, r *control.InspectRequest) (*control.InspectResponse, error) {
	sub, err := s.subject(ctx, r.Ref, r.Namespace)
	if err != nil {
		return nil, err
	}
	layers, err := s.layers(ctx, sub)
	if err != nil {
		return nil, err
	}
	out := &control.InspectResponse{Layers: layers}
	if sub.img != nil {
		out.Image, out.Digest, out.Namespace = sub.img.Name, sub.img.Manifest.String(), sub.img.Namespace
		if out.Image == "" {
			out.Image = r.Ref
		}
	}
	if sub.top != nil {
		out.Namespace = sub.top.NS()
		c, err := s.count(ctx, *sub.top)
		if err != nil {
			return nil, err
		}
		names, _ := s.imageNames(ctx, []store.Entry{*sub.top})
		out.Snapshot = s.message(*sub.top, c, names)
	}
	return out, nil
}

// layers describes the layers of a subject.
func (s backend) layers(ctx context.Context, sub *subject) (out []*control.Layer, err error) {
	names, _ := s.imageNames(ctx, sub.layers)
	asked := func(sn store.Entry) []string {
		if sub.img != nil && sub.img.Recorded {
			return []string{sub.img.Name}
		}
		return namesOf(sn, names)
	}
	ldl := -1
	var latest *control.Decision
	for i, sn := range sub.layers {
		l := &control.Layer{Index: int32(i)}
		if sub.img != nil {
			l.Digest, l.ChainId, l.Compressed = sub.img.Layers[i].Digest.String(), sub.img.Layers[i].ChainID.String(), sub.img.Layers[i].Size
		}
		if sn.ID != "" {
			l.SnapshotId, l.ChainId = sn.ID, store.ClientKey(sn.Info.Name)
			c, err := s.count(ctx, sn)
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			if err != nil { // the rest can be told all the same
				log.G(ctx).WithError(err).Warn("what a layer takes is not known")
			}
			l.NvmBytes, l.HddBytes, l.Inodes = c.bytes[placement.NVM], c.bytes[placement.HDD], c.inodes
			if sn.Image != nil && l.Digest == "" {
				l.Digest, l.Compressed = sn.Image.Digest, sn.Image.Size
			}
		}
		if of := sn.Of; of != nil {
			l.Tier, l.State, l.Durable = of.Stands(), string(of.State), of.State == store.Durable || of.State == store.Home
			l.Layer = of.ID.String()
			l.Uncompressed, l.Error = of.Data, s.store.Trouble(of.ID, sn.NS(), asked(sn)...)
			if d := decisionOf(of); d != nil {
				l.Decision = d
				if latest == nil || d.Downloading < latest.Downloading {
					latest, ldl = d, int(d.Ldl) // the one that was made last knew most of the downloads
				}
			}
		}
		out = append(out, l)
	}
	if ldl >= 0 && ldl < len(out) {
		out[ldl].Ldl = true
	}
	return out, nil
}

// Why implements [control.Backend].
func (s backend) Why(ctx context.Context, r *control.WhyRequest) (*control.WhyResponse, error) {
	sub, err := s.subject(ctx, r.Image, r.Namespace)
	if err != nil {
		return nil, err
	}
	layers, err := s.layers(ctx, sub)
	if err != nil {
		return nil, err
	}
	out := &control.WhyResponse{Image: r.Image, Total: int32(len(layers)), Layers: layers}
	switch {
	case len(r.Path) > 0:
		file, layer, err := s.whyPath(ctx, sub, string(r.Path))
		if err != nil {
			return nil, err
		}
		out.File = file
		out.Layers = nil
		for i, sn := range sub.layers {
			if sn.Layer.String() == layer {
				file.LayerIndex = int32(i)
				out.Layers = layers[i : i+1]
			}
		}
	case r.Layer != "":
		out.Layers = slices.DeleteFunc(layers, func(l *control.Layer) bool { return !namesLayer(l, r.Layer) })
		switch n := len(out.Layers); {
		case n == 0:
			return nil, fmt.Errorf("image %q has no layer %q, its layers are 0 to %d: %w", r.Image, r.Layer, len(layers)-1, errdefs.ErrNotFound)
		case n > 1:
			return nil, fmt.Errorf("%q is the start of %d layers; give more of it, or the index: %w", r.Layer, n, errdefs.ErrInvalidArgument)
		}
	}
	return out, nil
}

func namesLayer(l *control.Layer, name string) bool {
	if i, err := strconv.Atoi(name); err == nil && len(name) < 4 {
		return int(l.Index) == i
	}
	for _, d := range []string{l.Digest, l.ChainId} {
		if d != "" && (strings.HasPrefix(d, name) || strings.HasPrefix(strings.TrimPrefix(d, "sha256:"), name)) {
			return true
		}
	}
	return false
}

// whyPath finds a file in the merged tree and the tier its data stand on.
func (s backend) whyPath(ctx context.Context, sub *subject, file string) (*control.File, string, error) {
	if sub.top == nil {
		return nil, "", fmt.Errorf("the image is not unpacked with this snapshotter: %w", errdefs.ErrNotFound)
	}
	if !path.IsAbs(file) {
		return nil, "", fmt.Errorf("path %q is not absolute: %w", file, errdefs.ErrInvalidArgument)
	}
	file = path.Clean(file)
	name := sub.top.Info.Name
	if sub.top.Info.Kind != snapshots.KindCommitted {
		name = sub.top.Info.Parent
	}
	layers, err := s.store.Chain(ctx, name)
	if err != nil {
		return nil, "", err
	}
	chain, err := s.store.Metas(ctx, layers)
	if err != nil {
		layers, _ := s.layers(ctx, sub) // for a better word than err
		for i, l := range layers {
			if l.GetError() != "" {
				return nil, "", fmt.Errorf("layer %s, index %d of the image, cannot be used: %s", l.GetLayer(), i, l.GetError())
			}
		}
		return nil, "", err
	}
	for e, err := range chain.Entries(ctx) {
		if err != nil {
			return nil, "", err
		}
		if e.Path != file {
			continue
		}
		f := &control.File{Path: []byte(file), Type: fileType(e.Inode.Mode), Size: e.Inode.Size}
		layer := store.LayerID(e.Layer)
		switch {
		case e.Inode.Mode&unix.S_IFMT == unix.S_IFLNK:
			f.Target = []byte(e.Inode.Inline)
		case e.Inode.Inline != "":
			s.whereInline(f, sub.topID())
		case e.Inode.HasData():
			// The data of a file whose attributes alone were changed stand in a lower layer.
			layer = store.LayerID(e.Inode.Data.Layer)
			s.whereIs(ctx, f, sub, e.Inode.Data)
		}
		return f, layer.String(), nil
	}
	return nil, "", fmt.Errorf("no file %q in the image: %w", file, errdefs.ErrNotFound)
}

// topID is the id of the committed snapshot at the top of the chain.
func (sub *subject) topID() string {
	if n := len(sub.layers); n > 0 {
		return sub.layers[n-1].ID
	}
	return ""
}

func fileType(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return "file"
	case unix.S_IFDIR:
		return "directory"
	case unix.S_IFLNK:
		return "symlink"
	case unix.S_IFIFO:
		return "fifo"
	case unix.S_IFSOCK:
		return "socket"
	}
	return "device"
}

func (s backend) viewBytes(id string) int64 {
	b := s.store.ViewBytes(id)
	return b[0] + b[1]
}
