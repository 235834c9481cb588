// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build integration

package static_test

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	ispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/hif/static"
	"github.com/nhybrid/nhybrid/integration/image"
)

// outcome compares one method with the trace of one image.
type outcome struct {
	Files     int     `json:"files"`
	Bytes     int64   `json:"bytes"`
	Precision float64 `json:"precision"`
	Recall    float64 `json:"recall"`
}

type evaluation struct {
	Image       string   `json:"image"`
	HeldOut     bool     `json:"held_out"`
	ImageBytes  int64    `json:"image_bytes"`
	Traced      int      `json:"traced_files"`
	TracedBytes int64    `json:"traced_bytes"`
	Layers      outcome  `json:"layers"`
	PerFile     outcome  `json:"files"`
	Missed      []string `json:"missed"`
	Extra       []string `json:"extra"`
}

// TestPrecisionAndRecall starts images under strace and compares both methods with what was opened. The first images
// are those that the rules were written with; of those held out only the result was looked at. $NHYBRID_STATIC_REPORT
// takes the figures as JSON, $NHYBRID_STATIC_IMAGES limits the images to those named, with commas between.
func TestPrecisionAndRecall(t *testing.T) {
	builder, err := image.NewBuilder("")
	require.NoError(t, err)
	builder.Log = t.Logf
	unpacked := &stack{dir: t.TempDir(), done: map[string]string{}}
	only := os.Getenv("NHYBRID_STATIC_IMAGES")
	var all []evaluation
	for _, s := range subjects(t) {
		if only != "" && !slices.Contains(strings.Split(only, ","), s.Name) {
			continue
		}
		t.Run(s.Name, func(t *testing.T) {
			img, err := builder.Build(t.Context(), s.Spec)
			require.NoError(t, err)
			root, layers := unpacked.mount(t, img)
			sizes, owner := regular(t, root, layers)
			dir, err := static.OpenDir(root)
			require.NoError(t, err)
			config := ispec.ImageConfig{Entrypoint: s.Config.Entrypoint, Cmd: s.Config.Cmd, Env: s.Config.Env, WorkingDir: s.Config.WorkingDir}
			files, err := static.Analyze(t.Context(), dir, config, static.Options{})
			require.NoError(t, err)
			require.NoError(t, dir.Close())

			var history []ispec.History
			for _, step := range s.Steps {
				history = append(history, ispec.History{CreatedBy: step.History})
			}
			kinds := static.Layers(history, len(layers))
			var fine, coarse, traced []string
			for _, f := range files {
				require.Contains(t, sizes, f.Path, "predicted files are regular files of the image, named without links")
				fine = append(fine, f.Path)
			}
			for name, layer := range owner {
				if kinds[layer].Hot() {
					coarse = append(coarse, name)
				}
			}
			for name := range opened(t, root, s) {
				traced = append(traced, name)
			}
			require.NotEmpty(t, traced)
			score := func(predicted []string) outcome {
				p, r := static.Score(predicted, traced)
				return outcome{len(predicted), sum(sizes, predicted), p, r}
			}
			e := evaluation{
				Image: s.Name, HeldOut: s.heldOut, Traced: len(traced), TracedBytes: sum(sizes, traced), Layers: score(coarse), PerFile: score(fine),
				Missed: without(traced, fine), Extra: without(fine, traced),
			}
			for _, size := range sizes {
				e.ImageBytes += size
			}
			all = append(all, e)
			t.Logf("traced %d files; layers %v: %+v; files: %+v\nmissed %v\nextra %v", e.Traced, kinds, e.Layers, e.PerFile, e.Missed, e.Extra)
			if !s.heldOut {
				require.GreaterOrEqual(t, e.PerFile.Recall, 0.95)
				require.GreaterOrEqual(t, e.PerFile.Precision, 0.9)
			}
		})
	}
	table(t, all)
	if report := os.Getenv("NHYBRID_STATIC_REPORT"); report != "" {
		data, err := json.MarshalIndent(all, "", "  ")
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(report, append(data, '\n'), 0o644))
	}
}

func table(t *testing.T, all []evaluation) {
	var b strings.Builder
	b.WriteString("\n| image | MB | opened: files, MB | by layers: MB, precision, recall | by file: MB, precision, recall |\n| --- | --- | --- | --- | --- |\n")
	mb := func(n int64) string { return fmt.Sprintf("%.1f", float64(n)/1e6) }
	mean := map[bool][5]float64{}
	for _, e := range all {
		name := e.Image
		if e.HeldOut {
			name += " (held out)"
		}
		fmt.Fprintf(&b, "| %s | %s | %d, %s | %s, %.3f, %.3f | %s, %.3f, %.3f |\n", name, mb(e.ImageBytes), e.Traced, mb(e.TracedBytes),
			mb(e.Layers.Bytes), e.Layers.Precision, e.Layers.Recall, mb(e.PerFile.Bytes), e.PerFile.Precision, e.PerFile.Recall)
		m := mean[e.HeldOut]
		for i, v := range []float64{1, e.Layers.Precision, e.Layers.Recall, e.PerFile.Precision, e.PerFile.Recall} {
			m[i] += v
		}
		mean[e.HeldOut] = m
	}
	for held, m := range mean {
		fmt.Fprintf(&b, "| mean of %.0f, held out: %v | | | %.3f, %.3f | %.3f, %.3f |\n", m[0], held, m[1]/m[0], m[2]/m[0], m[3]/m[0], m[4]/m[0])
	}
	t.Log(b.String())
}

// regular lists the regular files of an image with their sizes, and the layers that they are in.
func regular(t *testing.T, root string, layers []string) (sizes map[string]int64, owner map[string]int) {
	sizes, owner = map[string]int64{}, map[string]int{}
	walk := func(dir string, do func(name string, size int64)) {
		require.NoError(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			info, err := d.Info()
			if err == nil {
				do(strings.TrimPrefix(path, dir+"/"), info.Size())
			}
			return err
		}))
	}
	walk(root, func(name string, size int64) { sizes[name] = size })
	for i, dir := range layers {
		walk(dir, func(name string, _ int64) {
			if _, ok := sizes[name]; ok {
				owner[name] = i
			}
		})
	}
	return sizes, owner
}

func sum(sizes map[string]int64, names []string) (n int64) {
	for _, name := range names {
		n += sizes[name]
	}
	return n
}

func without(a, b []string) (rest []string) {
	for _, name := range a {
		if !slices.Contains(b, name) {
			rest = append(rest, name)
		}
	}
	slices.Sort(rest)
	return rest
}
