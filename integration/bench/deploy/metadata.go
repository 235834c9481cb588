// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
)

// metadata is what treebench prints of one layer: the cost of its capture and of the tree of it alone.
type metadata struct {
	Files        int     `json:"files"`
	CaptureS     float64 `json:"capture_s"`
	TreeS        float64 `json:"tree_s"`
	CaptureBytes int64   `json:"capture_bytes"`
	TreeBytes    int64   `json:"tree_bytes"`
	BytesPerFile float64 `json:"bytes_per_file"`
	PeakRSSBytes int64   `json:"peak_rss_bytes"`
}

const treebench = "github.com/nhybrid/nhybrid/snapshotter/tree/treebench"

// measureMetadata runs treebench, as a process of its own for the sake of its peak memory, on the machine's own
// filesystem: a layer with a million files does not fit the emulated devices.
func (b *bench) measureMetadata(ctx context.Context) (all []metadata, err error) {
	dir := filepath.Join(b.dir, "m")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	program := filepath.Join(dir, "treebench")
	if out, err := exec.CommandContext(ctx, "go", "build", "-o", program, treebench).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build treebench: %w: %s", err, out)
	}
	for _, files := range b.options.captureFiles {
		cmd := exec.CommandContext(ctx, program, "-files", strconv.Itoa(files), "-dir", dir)
		var out, said bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &said
		if err := cmd.Run(); err != nil {
			return nil, fmt.Errorf("treebench with %d files: %w: %s", files, err, said.String())
		}
		var m metadata
		if err := json.Unmarshal(out.Bytes(), &m); err != nil {
			return nil, fmt.Errorf("treebench with %d files: %w", files, err)
		}
		b.say("%d files: captured in %.2f s, tree in %.2f s, %.0f bytes a file, peak %.0f MB", m.Files, m.CaptureS, m.TreeS,
			m.BytesPerFile, float64(m.PeakRSSBytes)/1e6)
		all = append(all, m)
	}
	return all, nil
}

// metadataFigures are keyed by the number of files, as "100k".
func metadataFigures(all []metadata, set func(string, float64)) {
	for _, m := range all {
		at := strconv.Itoa(m.Files)
		switch {
		case m.Files%1_000_000 == 0:
			at = strconv.Itoa(m.Files/1_000_000) + "m"
		case m.Files%1000 == 0:
			at = strconv.Itoa(m.Files/1000) + "k"
		}
		set("capture_s_"+at, m.CaptureS)
		set("tree_s_"+at, m.TreeS)
		set("capture_and_tree_s_"+at, m.CaptureS+m.TreeS)
		set("peak_rss_mb_"+at, float64(m.PeakRSSBytes)/1e6)
		set("tree_bytes_per_file_"+at, m.BytesPerFile)
		if at == "100k" {
			set("tree_bytes_per_file", m.BytesPerFile)
		}
	}
}
