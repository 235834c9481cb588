// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package catalog has real images of Docker Hub, rebuilt of Debian packages with their layers, each with what a user
// would start it for and how to see that it is ready.
package catalog

import (
	"archive/tar"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/nhybrid/nhybrid/integration/image"
	"github.com/nhybrid/nhybrid/integration/image/ready"
)

// Image is an image that can be started.
type Image struct {
	Category string
	image.Spec
	// What a user would accept as a sign that the image is up, in one line.
	Sign string
	// Ready is asked in the network of the container. nil: ready is when the program has ended, with status 0 and Output
	// in what it wrote.
	Ready  ready.Check
	Output string
}

// app is what is added on top of the layers of the table.
type app struct {
	// layer that a package's files go to, with libraries that the table leaves out: packages by the index of the layer.
	extract map[int][]string
	// purge is what the original removes of packages in the step that installs them: commands by the index of the layer.
	purge map[int]string
	// run is a command in the image, a layer of its own, before the files of testdata.
	run    string
	files  string // directory in testdata; "": the image's name, "-": none
	config v1.Config
	sign   string
	ready  ready.Check
	output string
}

//go:embed all:testdata
var files embed.FS

// All are the images in the order of the table.
func All() ([]Image, error) {
	table, err := image.Table()
	if err != nil {
		return nil, err
	}
	var images []Image
	for _, t := range table {
		a, ok := apps[t.Name]
		if !ok {
			continue
		}
		img, err := a.on(t)
		if err != nil {
			return nil, fmt.Errorf("image %q of the catalog: %w", t.Name, err)
		}
		images = append(images, img)
	}
	if len(images) != len(apps) {
		return nil, fmt.Errorf("catalog: %d programs, but only %d of them have an image in the table", len(apps), len(images))
	}
	return images, nil
}

func (a app) on(t image.TableImage) (Image, error) {
	spec := t.Spec
	for i, packages := range a.extract {
		if i >= len(spec.Steps) || spec.Steps[i].Extract == nil {
			return Image{}, fmt.Errorf("layer %d is not one of unpacked packages", i)
		}
		spec.Steps[i].Extract = packages
	}
	for i, command := range a.purge {
		if i >= len(spec.Steps) || spec.Steps[i].Packages == nil {
			return Image{}, fmt.Errorf("layer %d is not one of installed packages", i)
		}
		spec.Steps[i].Then = command
	}
	if a.run != "" {
		spec.Steps = append(spec.Steps, image.Step{Run: a.run, History: "RUN " + a.run})
	}
	dir := a.files
	if dir == "" {
		dir = t.Name
	}
	if dir != "-" {
		entries, err := read(dir)
		if err != nil {
			return Image{}, err
		}
		spec.Steps = append(spec.Steps, image.Step{Files: entries, History: "COPY . / # buildkit"})
	}
	spec.Config = a.config
	if !slices.ContainsFunc(spec.Config.Env, func(e string) bool { return strings.HasPrefix(e, "PATH=") }) {
		spec.Config.Env = append(spec.Config.Env, "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	}
	if a.sign == "" || a.ready == nil && a.output == "" {
		return Image{}, errors.New("no sign of readiness")
	}
	return Image{t.Category, spec, a.sign, a.ready, a.output}, nil
}

var epoch = time.Unix(1700000000, 0)

// read makes layer entries of a directory of testdata. Scripts are executable.
func read(dir string) (entries []image.Entry, err error) {
	root := path.Join("testdata", dir)
	err = fs.WalkDir(files, root, func(name string, d fs.DirEntry, err error) error {
		if err != nil || name == root {
			return err
		}
		e := image.Entry{Header: tar.Header{Name: strings.TrimPrefix(name, root+"/"), Mode: 0o755, ModTime: epoch}}
		if d.IsDir() {
			e.Typeflag, e.Name = tar.TypeDir, e.Name+"/"
		} else {
			if e.Data, err = files.ReadFile(name); err != nil {
				return err
			}
			e.Typeflag = tar.TypeReg
			if !strings.HasPrefix(string(e.Data), "#!") {
				e.Mode = 0o644
			}
		}
		entries = append(entries, e)
		return nil
	})
	return entries, err
}
