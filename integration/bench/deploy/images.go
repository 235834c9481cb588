// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/nhybrid/nhybrid/integration/image"
)

// The images are named for where their largest layer is, which as a rule is the last to be downloaded (LDL).
const (
	bottom = "bottom"
	middle = "middle"
	top    = "top"
)

var imageNames = []string{bottom, middle, top}

const large = "openjdk-17-jre-headless"

// Images are what the benchmark measures by default, for tests of what else is to be right of them.
func Images() []image.Spec { return fullImages() }

// fullImages are of 7 layers and about 150 MB each. Packages bring what they depend on, and dpkg's database anew.
func fullImages() []image.Spec {
	base := []string{"ca-certificates"}
	packages := func(p ...string) image.Step { return image.Step{Packages: p} }
	return []image.Spec{
		{Name: bottom, Steps: []image.Step{
			{Base: append([]string{large}, base...)}, packages("nginx-light"), packages("python3"), packages("redis-server"),
			packages("file"), packages("sqlite3"), config(),
		}},
		{Name: middle, Steps: []image.Step{
			{Base: base}, packages("nginx-light"), packages("python3"), packages(large), packages("redis-server"),
			packages("file"), config(),
		}},
		{Name: top, Steps: []image.Step{
			{Base: base}, packages("nginx-light"), packages("python3"), packages("redis-server"), packages("file"),
			packages(large), config(),
		}},
	}
}

// config is what most images end with: a small file of their own.
func config() image.Step {
	return image.Step{
		History: "COPY app.conf /etc/app.conf",
		Files: []image.Entry{{
			Header: tar.Header{Typeflag: tar.TypeReg, Name: "etc/app.conf", Mode: 0o644, ModTime: time.Unix(1700000000, 0)},
			Data:   bytes.Repeat([]byte("key = value\n"), 100),
		}},
	}
}

// smallImages are made in no time, to try the benchmark itself.
func smallImages() map[string]image.TinySpec {
	const mib = 1 << 20
	return map[string]image.TinySpec{
		bottom: {Runnable: true, Layers: []int64{3 * mib, mib, mib / 2, 1000}, Files: 50},
		middle: {Runnable: true, Layers: []int64{mib, mib / 2, 3 * mib, mib / 2, 1000}, Files: 50},
		top:    {Runnable: true, Layers: []int64{mib, mib / 2, mib / 2, 3 * mib}, Files: 50},
	}
}

// makeImages makes the chosen images, or takes them from the cache.
func (b *bench) makeImages(ctx context.Context, names []string) error {
	b.images, b.layers, b.data = map[string]v1.Image{}, map[string][]v1.Descriptor{}, map[string][]int64{}
	build, err := b.builder(ctx)
	if err != nil {
		return err
	}
	for _, name := range names {
		img, err := build(name)
		if err != nil {
			return fmt.Errorf("make image %q: %w", name, err)
		}
		m, err := img.Manifest()
		if err != nil {
			return fmt.Errorf("make image %q: %w", name, err)
		}
		b.images[name], b.layers[name] = img, m.Layers
		if b.data[name], err = fileBytes(img); err != nil {
			return fmt.Errorf("measure image %q: %w", name, err)
		}
	}
	return nil
}

// fileBytes adds up the sizes of the regular files of each layer.
func fileBytes(img v1.Image) (sums []int64, err error) {
	layers, err := img.Layers()
	if err != nil {
		return nil, err
	}
	for _, l := range layers {
		sum, err := layerBytes(l)
		if err != nil {
			return nil, err
		}
		sums = append(sums, sum)
	}
	return sums, nil
}

func layerBytes(l v1.Layer) (sum int64, err error) {
	content, err := l.Uncompressed()
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, content.Close()) }()
	for tr := tar.NewReader(content); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return sum, nil
		}
		if err != nil {
			return 0, err
		}
		if h.Typeflag == tar.TypeReg {
			sum += h.Size
		}
	}
}

func (b *bench) builder(ctx context.Context) (func(name string) (v1.Image, error), error) {
	if b.options.size == small {
		b.registryDir = filepath.Join(b.dir, "registry")
		specs := smallImages()
		return func(name string) (v1.Image, error) { return image.Tiny(specs[name]) }, nil
	}
	builder, err := image.NewBuilder(b.options.cache)
	if err != nil {
		return nil, err
	}
	builder.Log = b.say
	b.registryDir = filepath.Join(b.dir, "registry")
	return func(name string) (v1.Image, error) {
		for _, s := range fullImages() {
			if s.Name == name {
				return builder.Build(ctx, s)
			}
		}
		return nil, fmt.Errorf("no image %q", name)
	}, nil
}
