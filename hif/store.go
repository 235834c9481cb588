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

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/nhybrid/nhybrid/hif/parts"
	"github.com/nhybrid/nhybrid/hif/plan"
	"github.com/nhybrid/nhybrid/hif/profile"
)

// Image is an image of which all layers are committed.
type Image struct {
	profile.Image
	Namespace string
	Name      string // reference, "" if containerd has none
	// View is the id of the snapshot at the top of the chain. It names the chain: its view, its parts, what is read ahead.
	View string
	// Chain is the ids of the layers, decimal, bottom first, as many as
	// Image.Layers. Chains of other namespaces and images may share layers, and a
	// layer may be in a chain twice.
	Chain []string
}

// File is one name of a regular file of an image that is not empty.
type File struct {
	Path string // as a container sees it, "/" first
	// InLayer is the first name of the file in the layer that holds its data, as a
	// path without a "/" at its beginning. Profiles know files by it.
	InLayer  string
	Redirect string // where its data stand, as of pack.Ref
	Size     int64  // bytes
}

// Store is the image store as the manager sees it. Its methods are called from
// several goroutines.
type Store interface {
	// Images lists the images of all namespaces that are whole. One that two
	// namespaces have is there twice, with different views.
	Images(ctx context.Context) ([]Image, error)
	// Config is what an image says of itself.
	Config(ctx context.Context, image Image) (ocispec.Image, error)
	// Layers describes every layer.
	Layers(ctx context.Context) ([]plan.Layer, error)
	// Files calls yield for each name of a file of an image, in path order, until it
	// returns false. Of the image only View and Chain count.
	Files(ctx context.Context, image Image, yield func(File) bool) error
	// View calls fn with a directory in which the image can be read.
	View(ctx context.Context, image Image, fn func(dir string) error) error
	// ImageOf is the image that the container with the given snapshot was made
	// from; ErrNotFound without such a container.
	ImageOf(ctx context.Context, namespace, snapshot string) (image digest.Digest, name string, err error)
	// DataRoot is the directory on NVM below which whole files stand by their redirects.
	DataRoot() string
	// Packs knows where files are in the packs on HDD.
	parts.Packs
	// PartsPath is where the parts of large files of a chain stand (package
	// parts), by its view; "" where they cannot be mounted.
	PartsPath(view string) string
	// PartsChanged tells that the file there is another one, or gone: who mounts
	// the chain next shall see that.
	PartsChanged(ctx context.Context, view string) error
	// StartBegins prepares the view of a chain for a start that is traced, StartsEnded
	// is called when the last one with it is over. Both answer at once.
	StartBegins(ctx context.Context, view string, layers []string)
	StartsEnded(ctx context.Context, view string)
	// LetGo has running containers forget what they have cached of files that are
	// not open: what has left NVM takes its space for as long.
	LetGo(ctx context.Context)
	// Space tells how much room NVM has.
	Space() (plan.Space, error)
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
