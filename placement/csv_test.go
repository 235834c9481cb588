// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package placement

import (
	"encoding/csv"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const hub = "testdata/hub-2018-layers.csv"

func readHub(t testing.TB) []Image {
	t.Helper()
	f, err := os.Open(hub)
	require.NoError(t, err)
	defer f.Close()
	images, err := ReadLayers(f)
	require.NoError(t, err)
	return images
}

func TestReadLayersHub(t *testing.T) {
	images := readHub(t)
	layers := 0
	for _, i := range images {
		layers += len(i.Layers)
	}
	assert.Equal(t, 142, len(images))
	assert.Equal(t, 1199, layers)
	a := images[0]
	assert.Equal(t, "aerospike latest linux/amd64 database", strings.Join([]string{a.Name, a.Tag, a.Platform, a.Category}, " "))
	assert.Equal(t, int64(42863496), a.Layers[0].Compressed)
	assert.Equal(t, int64(111703508), a.Layers[0].Uncompressed)
	assert.Equal(t, int64(2205), a.Layers[1].Uncompressed, "the estimate, where the size is not known")
}

func TestReadLayers(t *testing.T) {
	images, err := ReadLayers(strings.NewReader("\ufefflayer_index, image ,compressed_bytes,other\n0,a,1000,x\n1,a,5,\n0,b,7,\n"))
	require.NoError(t, err)
	require.Len(t, images, 2)
	assert.Equal(t, EstimateUncompressed(1000), images[0].Layers[0].Uncompressed)

	for text, want := range map[string]string{
		"":                    "empty",
		"image,layer_index\n": `line 1: column "compressed_bytes" is missing (found: image, layer_index)`,
		"image,image,layer_index,compressed_bytes\n":                      `line 1: column "image" is there twice`,
		"image,layer_index,compressed_bytes\n":                            "no rows",
		"image,layer_index,compressed_bytes\na,0,1\na,1,x\n":              `line 3: column "compressed_bytes": "x" is no number of bytes`,
		"image,layer_index,compressed_bytes\na,0,-5\n":                    `line 2: column "compressed_bytes"`,
		"image,layer_index,compressed_bytes\na,0,\n":                      `line 2: column "compressed_bytes" is empty`,
		"image,layer_index,compressed_bytes\na,0,99999999999999999999\n":  `line 2: column "compressed_bytes"`,
		"image,layer_index,compressed_bytes\n,0,1\n":                      `line 2: column "image" is empty`,
		"image,layer_index,compressed_bytes\na,one,1\n":                   `line 2: column "layer_index": "one" is no layer index`,
		"image,layer_index,compressed_bytes\na,1,1\n":                     `line 2: column "layer_index": 1, where layer 0 of "a" should come`,
		"image,layer_index,compressed_bytes\na,0,1\na,2,1\n":              `line 3: column "layer_index": 2, where layer 1 of "a" should come`,
		"image,layer_index,compressed_bytes\na,0,1\nb,0,1\na,1,1\n":       `line 4: column "image": the rows of "a" must stand together; it began in line 2`,
		"image,layer_index,compressed_bytes\na,0\n":                       "wrong number of fields",
		"image,layer_index,compressed_bytes\n\"a,0,1\n":                   "layer table",
		"image,category,layer_index,compressed_bytes\na,x,0,1\na,y,1,1\n": `line 3: column "category": "y", but "x" in line 2`,
	} {
		_, err := ReadLayers(strings.NewReader(text))
		if assert.Error(t, err, text) {
			assert.Contains(t, err.Error(), want)
			assert.True(t, errdefs.IsInvalidArgument(err), text)
		}
	}
}

// TestEstimateIsCautious compares the estimate with all layers of the table whose uncompressed size is known.
func TestEstimateIsCautious(t *testing.T) {
	f, err := os.Open(hub)
	require.NoError(t, err)
	defer f.Close()
	rows, err := csv.NewReader(f).ReadAll()
	require.NoError(t, err)
	at := map[string]int{}
	for i, h := range rows[0] {
		at[h] = i
	}
	known := 0
	for _, r := range rows[1:] {
		if r[at["uncompressed_bytes"]] == "" {
			continue
		}
		known++
		c, err := strconv.ParseInt(r[at["compressed_bytes"]], 10, 64)
		require.NoError(t, err)
		u, err := strconv.ParseInt(r[at["uncompressed_bytes"]], 10, 64)
		require.NoError(t, err)
		assert.GreaterOrEqual(t, EstimateUncompressed(c), u, "layer %s", r[at["digest"]])
	}
	assert.Equal(t, 257, known)
	assert.Zero(t, EstimateUncompressed(0))
	assert.Zero(t, EstimateUncompressed(-5))
	assert.Positive(t, EstimateUncompressed(1<<63-1))
}

func FuzzReadLayers(f *testing.F) {
	f.Add("image,layer_index,compressed_bytes\na,0,1\na,1,2\n")
	f.Add("category,image,tag,platform,layer_index,digest,compressed_bytes,uncompressed_bytes,uncompressed_est_bytes\nx,a,l,p,0,sha256:0,5,,7\n")
	f.Fuzz(func(t *testing.T, s string) {
		images, err := ReadLayers(strings.NewReader(s))
		if err != nil {
			if !errdefs.IsInvalidArgument(err) {
				t.Errorf("unclassed error: %v", err)
			}
			return
		}
		if len(s) > 1024 {
			return
		}
		// Whatever is accepted can be simulated, with either model.
		if _, err := SimulateOnePass(images, Options{}); err != nil {
			t.Errorf("one-pass: %v", err)
		}
		if _, err := Simulate(images, Options{}); err != nil {
			t.Errorf("simulate: %v", err)
		}
	})
}
