// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package image

import (
	"bytes"
	_ "embed"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// TableImage is an image of a table of layers.
type TableImage struct {
	Category string
	Spec
}

// What the column of packages says beside names.
const (
	fileLayer = "(file layer)"
	minBase   = "(minbase"
	alone     = "(alone, no deps)"
)

//go:embed testdata/rebuild-layers.csv
var rebuildLayers []byte

// Table are 32 images of Docker Hub in all its categories, with their layers as Debian packages rebuild them.
func Table() ([]TableImage, error) { return FromTable(bytes.NewReader(rebuildLayers)) }

// FromTable reads a table of real images' layers with the Debian packages that rebuild them, as testdata/
// rebuild-layers.csv: columns category, image, layer_index (0 = bottom), real_compressed_bytes,
// real_uncompressed_est_bytes, debian12_packages ("(file layer)", "(minbase…)", "NAME… (alone, no deps)" or names) and
// created_by. Layers of files become one generated file of the given sizes; packages above something that is no
// Debian are unpacked without what they depend on.
func FromTable(r io.Reader) ([]TableImage, error) {
	reader := csv.NewReader(r)
	header, err := reader.Read()
	if err != nil {
		return nil, fmt.Errorf("read table of layers: %w", err)
	}
	column := map[string]int{}
	for _, name := range []string{
		"category", "image", "layer_index", "real_compressed_bytes", "real_uncompressed_est_bytes", "debian12_packages", "created_by",
	} {
		i := slices.Index(header, name)
		if i < 0 {
			return nil, fmt.Errorf("read table of layers: no column %q; the first line has %q", name, header)
		}
		column[name] = i
	}
	var images []TableImage
	for {
		record, err := reader.Read()
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, fmt.Errorf("read table of layers: %w", err)
		}
		get := func(name string) string { return record[column[name]] }
		line, _ := reader.FieldPos(0)
		if len(images) == 0 || images[len(images)-1].Name != get("image") {
			images = append(images, TableImage{get("category"), Spec{
				Name: get("image"), Config: v1.Config{Cmd: []string{"/bin/sh"}},
			}})
		}
		img := &images[len(images)-1]
		if get("layer_index") != strconv.Itoa(len(img.Steps)) {
			return nil, fmt.Errorf("table of layers, line %d: image %q has layer %q where %d is next",
				line, img.Name, get("layer_index"), len(img.Steps))
		}
		step, err := tableStep(len(img.Steps), get)
		if step.Packages != nil && img.Steps != nil && img.Steps[0].Base == nil {
			// Nothing below could install them, so their files alone make the layer.
			step.Packages, step.Extract = nil, step.Packages
		}
		if err != nil {
			return nil, fmt.Errorf("table of layers, line %d: %w", line, err)
		}
		img.Steps = append(img.Steps, step)
	}
	for _, img := range images {
		if err := img.check(); err != nil {
			return nil, fmt.Errorf("table of layers: %w", err)
		}
	}
	return images, nil
}

func tableStep(index int, get func(string) string) (Step, error) {
	step := Step{History: get("created_by")}
	switch packages := get("debian12_packages"); {
	case packages == fileLayer:
		var sizes [2]int64
		for i, name := range []string{"real_compressed_bytes", "real_uncompressed_est_bytes"} {
			n, err := strconv.ParseInt(get(name), 10, 64)
			if err != nil || n < 0 {
				return step, fmt.Errorf("%s %q is not a size", name, get(name))
			}
			sizes[i] = n
		}
		step.Synthetic = &Synthetic{fmt.Sprintf("/opt/layer-%d", index), sizes[0], sizes[1]}
	case strings.HasPrefix(packages, minBase):
		step.Base = []string{}
	case strings.HasSuffix(packages, alone):
		step.Extract = strings.Fields(strings.TrimSuffix(packages, alone))
	default:
		step.Packages = strings.Fields(packages)
	}
	if step.Synthetic == nil && step.Base == nil && len(step.Extract)+len(step.Packages) == 0 {
		return step, errors.New("debian12_packages is empty")
	}
	return step, nil
}
