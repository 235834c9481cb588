// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package tree

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"testing"
)

// BenchmarkTree runs treebench, a process of its own so that its peak of memory is known.
func BenchmarkTree(b *testing.B) {
	bin := filepath.Join(b.TempDir(), "treebench")
	if out, err := exec.Command("go", "build", "-o", bin, "./treebench").CombinedOutput(); err != nil {
		b.Fatalf("build treebench: %v\n%s", err, out)
	}
	for _, files := range []int{10_000, 100_000, 1_000_000} {
		b.Run(fmt.Sprint(files), func(b *testing.B) {
			dir := b.TempDir()
			var sum, last struct {
				Capture float64 `json:"capture_s"`
				Tree    float64 `json:"tree_s"`
				PerFile float64 `json:"bytes_per_file"`
				Peak    float64 `json:"peak_rss_bytes"`
			}
			for b.Loop() {
				out, err := exec.Command(bin, "-files", fmt.Sprint(files), "-dir", dir, "-keep").Output()
				must(b, err)
				must(b, json.Unmarshal(out, &last))
				sum.Capture += last.Capture
				sum.Tree += last.Tree
				sum.Peak = max(sum.Peak, last.Peak)
			}
			b.ReportMetric(sum.Capture/float64(b.N), "capture-s")
			b.ReportMetric(sum.Tree/float64(b.N), "tree-s")
			b.ReportMetric(last.PerFile, "bytes/file")
			b.ReportMetric(sum.Peak, "peak-bytes")
		})
	}
}
