// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package hif keeps the hot image files of a store on NVM and sends the cold
// ones to HDD (docs/hif.md).
//
// Its Manager has every start of a container traced, keeps a book of what
// starts have needed, learns of new images from the registry, from earlier
// versions or by analysis, and hands the engine of package migrate a plan
// whenever something has changed. What it needs of the image store it takes
// through the interface Store.
package hif

import (
	"context"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/nhybrid/nhybrid/hif/plan"
	"github.com/nhybrid/nhybrid/hif/profile"
)

// Image is an image of which all layers are committed and captured.
type Image struct {
	profile.Image
	Namespace string
	Name      string   // reference, "" if containerd has none
	Chain     []string // snapshot ids of the layers, bottom first, as many as Image.Layers
}

// Top is the id of the topmost layer.
func (i Image) Top() string { return i.Chain[len(i.Chain)-1] }

// layer is the place of a layer in the image by its id.
func (i Image) layer(id string) (int, bool) {
	n := slices.Index(i.Chain, id)
	return n, n >= 0
}

// redirect is where the data of a file of the image stand below a data root.
func (i Image) redirect(layer int, p profile.Path) string {
	return "/" + i.Chain[layer] + "/" + string(p)
}

// File is a regular file of an image that is not empty.
type File struct {
	Path     string // as a container sees it, "/" first
	Redirect string // "/<layer id>/<path in layer>"
	Size     int64  // bytes
}

// Store is the image store as the manager sees it. Its methods are called from
// several goroutines.
type Store interface {
	// Images lists the images of all namespaces that are whole. One that two
	// namespaces have is there twice, with different chains.
	Images(ctx context.Context) ([]Image, error)
	// Config is what an image says of itself.
	Config(ctx context.Context, image Image) (ocispec.Image, error)
	// Layers describes every committed layer.
	Layers(ctx context.Context) ([]plan.Layer, error)
	// Files calls yield for each file of an image, in path order, until it returns false.
	Files(ctx context.Context, image Image, yield func(File) bool) error
	// View calls fn with a directory in which the image can be read.
	View(ctx context.Context, image Image, fn func(dir string) error) error
	// ImageOf is the image that the container with the given snapshot was made
	// from; ErrNotFound without such a container.
	ImageOf(ctx context.Context, namespace, snapshot string) (image digest.Digest, name string, err error)
	// PartsPath is where the parts of large files of a chain stand (package
	// parts), by the id of its top; "" where they cannot be mounted.
	PartsPath(top string) string
	// PartsChanged tells that the file there is another one, or gone: who mounts
	// the chain next shall see that.
	PartsChanged(ctx context.Context, top string) error
	// LetGo has running containers forget what they have cached of files that are
	// not open: what has left NVM takes its space for as long.
	LetGo(ctx context.Context)
	// Space tells how much room NVM has.
	Space() (plan.Space, error)
}

// Listing is the files of one image. It implements [profile.Listing]: a file is
// known by its path in the layer that holds it, which is how traces name it;
// for all but hard links and files of renamed directories that is its path in
// the image, too.
type Listing struct {
	entries []profile.Entry
	byPath  map[profile.Path]int
	// others are visible paths that differ from the path in the layer.
	others map[string]int
}

// list reads the files of an image.
func list(ctx context.Context, s Store, image Image) (*Listing, error) {
	l := &Listing{byPath: map[profile.Path]int{}, others: map[string]int{}}
	err := s.Files(ctx, image, func(f File) bool {
		id, inLayer, ok := strings.Cut(strings.TrimPrefix(f.Redirect, "/"), "/")
		layer, known := image.layer(id)
		p := profile.Path(inLayer)
		if !ok || !known || f.Size <= 0 || p.Check() != nil {
			return true
		}
		i, seen := l.byPath[p]
		if !seen || l.entries[i].Layer != layer {
			i = len(l.entries)
			l.entries = append(l.entries, profile.Entry{Path: p, Layer: layer, Size: f.Size})
			if !seen {
				l.byPath[p] = i
			}
		}
		if f.Path != "/"+inLayer {
			l.others[f.Path] = i
		}
		return true
	})
	if err != nil {
		return nil, fmt.Errorf("list files of image %s: %w", image.Digest, err)
	}
	return l, nil
}

// Lookup implements [profile.Listing].
func (l *Listing) Lookup(p profile.Path) (profile.Entry, bool) {
	i, ok := l.byPath[p]
	if !ok {
		return profile.Entry{}, false
	}
	return l.entries[i], true
}

// All implements [profile.Listing].
func (l *Listing) All(yield func(profile.Entry) bool) {
	for _, e := range l.entries {
		if !yield(e) {
			return
		}
	}
}

// visible finds a file by its path in the image, absolute or relative to the root.
func (l *Listing) visible(name string) (profile.Entry, bool) {
	name = path.Join("/", name)
	if i, ok := l.others[name]; ok {
		return l.entries[i], true
	}
	return l.Lookup(profile.Path(name[1:]))
}

// lazyListing reads the files of an image when they are first asked for: most
// starts are recorded without.
type lazyListing struct {
	*Listing
	read func() (*Listing, error)
	err  error
}

func (l *lazyListing) get() *Listing {
	if l.Listing == nil && l.err == nil {
		l.Listing, l.err = l.read()
	}
	if l.Listing == nil {
		return &Listing{}
	}
	return l.Listing
}

func (l *lazyListing) Lookup(p profile.Path) (profile.Entry, bool) { return l.get().Lookup(p) }

func (l *lazyListing) All(yield func(profile.Entry) bool) { l.get().All(yield) }

func (m *Manager) listing(ctx context.Context, image Image) *lazyListing {
	return &lazyListing{read: func() (*Listing, error) { return list(ctx, m.store, image) }}
}

// Find returns an image of the store by its digest; with namespace "" of any.
// The error is ErrNotFound if it is not there, or not unpacked.
func (m *Manager) Find(ctx context.Context, namespace string, image digest.Digest) (Image, error) {
	images, err := m.store.Images(ctx)
	if err != nil {
		return Image{}, err
	}
	for _, i := range images {
		if (namespace == "" || i.Namespace == namespace) && i.Digest == image {
			return i, nil
		}
	}
	return Image{}, fmt.Errorf("image %s is not unpacked in this store (namespace %q): %w", image, namespace, errdefs.ErrNotFound)
}
