// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/nhybrid/nhybrid/integration/image"
)

// recipe is an image to show. Which of its layers is downloaded last is not for it to say; sizes alone make one likely.
type recipe struct {
	about   string
	names   []string // of the layers, bottom first
	build   func(ctx context.Context, cache string) (v1.Image, error)
	command []string // to run in a container
	file    string   // of the image, to ask about
}

// tinyRecipe needs no network and a second.
var tinyRecipe = recipe{
	about: "of generated files over busybox",
	names: []string{"busybox", "small", "small", "big", "small", "app", "conf"},
	build: func(context.Context, string) (v1.Image, error) {
		return image.Tiny(image.TinySpec{Runnable: true, Layers: []int64{200_000, 100_000, 15_000_000, 100_000, 50_000, 0}})
	},
	command: []string{"sh", "-c", "echo $(busybox | head -n 1): $(ls /data | wc -l) entries, shared is of layer $(cat /data/shared)"},
	file:    "/bin/busybox",
}

var packagesRecipe = tinyRecipe
