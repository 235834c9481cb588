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

	"github.com/nhybrid/nhybrid/integration/rig"
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

// bytesPerFile is the size of the device for each file: ext4 has an inode for every 16 KiB, and directories need some too.
const bytesPerFile = 20 << 10

// measureMetadata runs treebench, as a process of its own for the sake of its peak memory, on an emulated NVM of its own.
func (b *bench) measureMetadata(ctx context.Context) (all []metadata, err error) {
	dir := filepath.Join(b.dir, "m")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	program := filepath.Join(dir, "treebench")
	if out, err := exec.CommandContext(ctx, "go", "build", "-o", program, treebench).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build treebench: %w: %s", err, out)
	}
	for _, files := range b.options.captureFiles {
		m, err := runTreebench(ctx, program, filepath.Join(dir, strconv.Itoa(files)), files)
		if err != nil {
			return nil, fmt.Errorf("treebench with %d files: %w", files, err)
		}
		b.say("%d files: captured in %.2f s, tree in %.2f s, %.0f bytes a file, peak %.0f MB", m.Files, m.CaptureS, m.TreeS,
			m.BytesPerFile, float64(m.PeakRSSBytes)/1e6)
		all = append(all, m)
	}
	return all, nil
}

func runTreebench(ctx context.Context, program, dir string, files int) (m metadata, err error) {
	nvm, err := rig.NewNVM(ctx, dir, max(256<<20, int64(files)*bytesPerFile))
	if err != nil {
		return m, err
	}
	defer func() { err = errors.Join(err, nvm.Close()) }()
	// Kept: the files go with the device, which is quicker.
	cmd := exec.CommandContext(ctx, program, "-files", strconv.Itoa(files), "-dir", nvm.Mountpoint(), "-keep")
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := cmd.Run(); err != nil {
		return m, fmt.Errorf("%w: %s", err, said.String())
	}
	return m, json.Unmarshal(out.Bytes(), &m)
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
