// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package placement

import (
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// Image is an image of a layer table, for the simulator.
type Image struct {
	Category string
	Name     string
	Tag      string
	Platform string
	Layers   []ImageLayer // bottom first, at least one
}

// ImageLayer is one row of a layer table.
type ImageLayer struct {
	Digest       string // of the blob; "" if the table has none
	Compressed   int64  // bytes
	Uncompressed int64  // bytes; measured, else the table's estimate, else EstimateUncompressed
}

const (
	// The largest layers seen in registries have some 100 GB; a petabyte keeps every sum of sizes below 2^63.
	maxLayerBytes = 1e15
	// overlayfs and containerd go no further than some hundred layers.
	maxLayers = 4096
)

// ReadLayers reads a table of layers with a header line. The columns image, layer_index and compressed_bytes are needed; category, tag,
// platform, digest, uncompressed_bytes and uncompressed_est_bytes are used where they are there; others are passed over. The rows
// of an image stand together, its layer_index counts up from 0, the bottom. Errors are errdefs.ErrInvalidArgument and name the line and
// the column.
func ReadLayers(r io.Reader) ([]Image, error) {
	c := csv.NewReader(r)
	c.ReuseRecord = true
	header, err := c.Read()
	if errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("layer table is empty: its first line must name the columns, image, layer_index and compressed_bytes at least: %w", errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return nil, fmt.Errorf("layer table: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	column := map[string]int{}
	for i, h := range header {
		h = strings.TrimSpace(strings.TrimPrefix(h, "\ufeff")) // spreadsheets put a byte order mark first
		if _, twice := column[h]; twice && h != "" {
			return nil, fmt.Errorf("layer table, line 1: column %q is there twice: %w", h, errdefs.ErrInvalidArgument)
		}
		column[h] = i
	}
	for _, need := range []string{"image", "layer_index", "compressed_bytes"} {
		if _, ok := column[need]; !ok {
			return nil, fmt.Errorf("layer table, line 1: column %q is missing (found: %s): %w", need, strings.Join(header, ", "), errdefs.ErrInvalidArgument)
		}
	}
	t := table{column: column, done: map[string]int{}}
	for {
		record, err := c.Read()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil { // names the line itself
			return nil, fmt.Errorf("layer table: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		line, _ := c.FieldPos(0)
		if err := t.add(record, line); err != nil {
			return nil, fmt.Errorf("layer table, line %d: %w: %w", line, err, errdefs.ErrInvalidArgument)
		}
	}
	if len(t.images) == 0 {
		return nil, fmt.Errorf("layer table has no rows: %w", errdefs.ErrInvalidArgument)
	}
	return t.images, nil
}

type table struct {
	column map[string]int
	images []Image
	done   map[string]int // image key to the line it began at
}

func (t *table) field(record []string, name string) string {
	if i, ok := t.column[name]; ok && i < len(record) {
		return strings.Clone(strings.TrimSpace(record[i]))
	}
	return ""
}

// size reads a number of bytes; an empty field is -1.
func (t *table) size(record []string, name string) (int64, error) {
	s := t.field(record, name)
	if s == "" {
		return -1, nil
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 || n > maxLayerBytes {
		return 0, fmt.Errorf("column %q: %q is no number of bytes", name, s)
	}
	return n, nil
}

func (t *table) add(record []string, line int) error {
	img := Image{Category: t.field(record, "category"), Name: t.field(record, "image"), Tag: t.field(record, "tag"), Platform: t.field(record, "platform")}
	if img.Name == "" {
		return errors.New(`column "image" is empty`)
	}
	at := t.field(record, "layer_index")
	index, err := strconv.ParseUint(at, 10, 31)
	if err != nil {
		return fmt.Errorf("column %q: %q is no layer index", "layer_index", at)
	}
	l := ImageLayer{Digest: t.field(record, "digest")}
	if l.Compressed, err = t.size(record, "compressed_bytes"); err != nil {
		return err
	}
	if l.Compressed < 0 {
		return errors.New(`column "compressed_bytes" is empty`)
	}
	l.Uncompressed = -1
	for _, name := range []string{"uncompressed_bytes", "uncompressed_est_bytes"} {
		n, err := t.size(record, name)
		if err != nil {
			return err
		}
		if l.Uncompressed < 0 {
			l.Uncompressed = n
		}
	}
	if l.Uncompressed < 0 {
		l.Uncompressed = EstimateUncompressed(l.Compressed)
	}

	key := strings.Join([]string{img.Name, img.Tag, img.Platform}, "\x00")
	began, known := t.done[key]
	if !known {
		t.done[key] = line
		t.images = append(t.images, img)
	}
	cur := &t.images[len(t.images)-1]
	switch {
	case known && (cur.Name != img.Name || cur.Tag != img.Tag || cur.Platform != img.Platform):
		return fmt.Errorf("column %q: the rows of %q must stand together; it began in line %d", "image", img.Name, began)
	case cur.Category != img.Category:
		return fmt.Errorf("column %q: %q, but %q in line %d of the same image", "category", img.Category, cur.Category, t.done[key])
	case len(cur.Layers) >= maxLayers:
		return fmt.Errorf("column %q: %q has more than %d layers", "layer_index", img.Name, maxLayers)
	case index != uint64(len(cur.Layers)):
		return fmt.Errorf("column %q: %d, where layer %d of %q should come", "layer_index", index, len(cur.Layers), img.Name)
	}
	cur.Layers = append(cur.Layers, l)
	return nil
}
