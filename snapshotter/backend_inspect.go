// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/nhybrid/nhybrid/placement/tier"
	"github.com/nhybrid/nhybrid/snapshotter/control"
	"github.com/nhybrid/nhybrid/snapshotter/pull"
)

// subject is what an operator asked about: a chain of layers, and the image it
// belongs to if it does.
type subject struct {
	img    *pull.Image
	top    *snapshot  // nil: the image is not unpacked
	layers []snapshot // bottom first; without ID where the layer is not unpacked
}

// subject finds an image by its name, or a snapshot by key, id or chain id.
func (s backend) subject(ctx context.Context, ref, ns string) (*subject, error) {
	all, err := s.db.snapshots(ctx)
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
			return nil, fmt.Errorf("no image and no snapshot %q in namespace %q; nhybridctl ls shows what there is: %w", ref, ns, errdefs.ErrNotFound)
		}
		return nil, err
	}
	img, layers := unpackedOf(all, named)
	found := &subject{img: img, layers: make([]snapshot, len(layers))}
	for i, sn := range layers {
		if sn != nil {
			found.layers[i], found.top = *sn, sn
		}
	}
	return found, nil
}

// unpackedOf chooses among the images that a reference names: the first that is unpacked whole, or else the first. layers has
// a snapshot for each layer of it, bottom first; nil where the layer is not unpacked.
func unpackedOf(all []snapshot, named []*pull.Image) (img *pull.Image, layers []*snapshot) {
	byChain := map[[2]string]*snapshot{} // by namespace and chain id
	for i := range all {
		if all[i].Info.Kind == snapshots.KindCommitted {
			byChain[[2]string{all[i].namespace(), clientKey(all[i].Info.Name)}] = &all[i]
		}
	}
	for _, i := range named {
		of := make([]*snapshot, len(i.Layers))
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

// unpackedImage is the image that ref names, a name of containerd's image store or a digest. Of an index it is the one
// that is unpacked, or the host's.
func (s *Snapshotter) unpackedImage(ctx context.Context, source ImageSource, ns, ref string) (*pull.Image, error) {
	named, err := source.Lookup(ctx, ns, ref)
	if err != nil {
		return nil, err
	}
	all, err := s.db.snapshots(ctx)
	if err != nil {
		return nil, err
	}
	img, _ := unpackedOf(all, named)
	return img, nil
}

func findSnapshot(all []snapshot, ref, ns string) (*snapshot, error) {
	var found []*snapshot
	for i := range all {
		sn := &all[i]
		if ns != "" && sn.namespace() != ns {
			continue
		}
		name := clientKey(sn.Info.Name)
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
func layersBelow(all []snapshot, sn *snapshot) (layers []snapshot) {
	byName := map[string]*snapshot{}
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
	out := &control.InspectResponse{Layers: sub.messages()}
	if sub.img != nil {
		out.Image, out.Digest, out.Namespace = sub.img.Name, sub.img.Manifest.String(), sub.img.Namespace
		if out.Image == "" {
			out.Image = r.Ref
		}
	}
	if sub.top != nil {
		out.Namespace = sub.top.namespace()
		out.Snapshot = s.message(*sub.top, s.imageNames(ctx, []snapshot{*sub.top}))
	}
	return out, nil
}

func (sub *subject) messages() []*control.Layer {
	var out []*control.Layer
	ldl := -1
	for i, sn := range sub.layers {
		l := &control.Layer{Index: int32(i)}
		if sub.img != nil {
			l.Digest, l.ChainId, l.Compressed = sub.img.Layers[i].Digest.String(), sub.img.Layers[i].ChainID.String(), sub.img.Layers[i].Size
		}
		if sn.ID != "" {
			l.SnapshotId, l.ChainId, l.Tier = sn.ID, clientKey(sn.Info.Name), sn.Tier.String()
			l.Captured, l.Durable, l.Inodes, l.Uncompressed, l.Error = sn.Captured, sn.Durable, sn.Usage.Inodes, sn.Data, sn.trouble()
			l.NvmBytes, l.HddBytes = sn.bytes()
			if sn.Image != nil && l.Digest == "" {
				l.Digest, l.Compressed = sn.Image.Digest, sn.Image.Size
			}
		}
		if d := (&control.Decision{}); sn.Decision != nil && protojson.Unmarshal(sn.Decision, d) == nil {
			l.Decision = d
			ldl = int(d.Ldl) // the topmost decision knew most of the downloads
		}
		out = append(out, l)
	}
	if ldl >= 0 && ldl < len(out) {
		out[ldl].Ldl = true
	}
	return out
}

// Why implements [control.Backend].
func (s backend) Why(ctx context.Context, r *control.WhyRequest) (*control.WhyResponse, error) {
	sub, err := s.subject(ctx, r.Image, r.Namespace)
	if err != nil {
		return nil, err
	}
	layers := sub.messages()
	out := &control.WhyResponse{Image: r.Image, Total: int32(len(layers)), Layers: layers}
	switch {
	case r.Path != "":
		file, layer, err := s.whyPath(ctx, sub, r.Path)
		if err != nil {
			return nil, err
		}
		out.File = file
		out.Layers = nil
		for i, sn := range sub.layers {
			if sn.ID == layer {
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
	chain, err := s.captures(ctx, name)
	if err != nil {
		return nil, "", err
	}
	for e, err := range chain.Entries(ctx) {
		if err != nil {
			return nil, "", err
		}
		if e.Path != file {
			continue
		}
		f := &control.File{Path: file, Type: fileType(e.Mode), Size: e.Size, Target: e.Target}
		layer := e.Layer
		if e.Redirect != "" {
			// The data of a file whose attributes alone were changed stand in a lower layer.
			layer, _, _ = strings.Cut(strings.TrimPrefix(e.Redirect, "/"), "/")
			for _, at := range s.lookup(ctx, name) {
				p := filepath.Join(at.dir, e.Redirect)
				if _, err := os.Lstat(p); err == nil {
					f.Tier, f.DataPath = at.tier, p
					break
				}
			}
		}
		return f, layer, nil
	}
	return nil, "", fmt.Errorf("no file %q in the image: %w", file, errdefs.ErrNotFound)
}

// place is a directory in which the kernel looks for data.
type place struct{ tier, dir string }

// lookup is where the kernel looks for the data of a file of the named chain, in that order.
func (s *Snapshotter) lookup(ctx context.Context, name string) []place {
	var all []place
	for _, t := range tier.Tiers {
		all = append(all, place{t.String(), s.tiers.DataRoot(t)})
	}
	if ids, err := s.db.chain(ctx, name); err == nil && len(ids) > 0 {
		if dir := s.divided.mounted(ctx, ids[0]); dir != "" {
			all = slices.Insert(all, 1, place{"parts", dir})
		}
	}
	return all
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

func (s backend) treeBytes(id string) int64 {
	for _, image := range s.treeImages(id) {
		if st, err := os.Stat(image); err == nil {
			return st.Size()
		}
	}
	return 0
}
