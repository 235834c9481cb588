// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/nhybrid/nhybrid/integration/bench/result"
)

// runs are those of one benchmark, all of one setting.
type runs []run

// pick are the runs of a variant, of one image and bandwidth unless cell is zero.
func (rs runs) pick(variant string, cell key) (picked runs) {
	for _, r := range rs {
		if r.Variant == variant && (cell == key{} || r.cell() == cell) {
			picked = append(picked, r)
		}
	}
	return picked
}

// cells are the images and bandwidths that were measured, in the order of the first run of each.
func (rs runs) cells() (cells []key) {
	for _, r := range rs {
		if !slices.Contains(cells, r.cell()) {
			cells = append(cells, r.cell())
		}
	}
	return cells
}

func (rs runs) values(of func(run) float64) (values []float64) {
	for _, r := range rs {
		values = append(values, of(r))
	}
	return values
}

// ratios are those of paired runs: the same image and bandwidth in the same round.
func (rs runs) ratios(variant, base string, cell key, of func(run) float64) (ratios []float64) {
	for _, r := range rs.pick(variant, cell) {
		for _, b := range rs.pick(base, r.cell()) {
			if b.Round == r.Round {
				ratios = append(ratios, of(r)/of(b))
			}
		}
	}
	return ratios
}

// worst is the highest median of a cell, NaN where there is none.
func (rs runs) worst(variant, base string, of func(run) float64) float64 {
	worst := math.NaN()
	for _, c := range rs.cells() {
		if m := result.Median(rs.ratios(variant, base, c, of)); math.IsNaN(worst) || m > worst {
			worst = m
		}
	}
	return worst
}

func returned(r run) float64 { return r.ReturnS }
func durable(r run) float64  { return r.durable() }
func synced(r run) float64   { return r.SyncedS }

// saved is how much less NVM the data of the layers and the tree take than all data would.
func saved(r run) float64 {
	if r.DataBytes == 0 {
		return math.NaN()
	}
	return 1 - float64(r.NVMDataBytes+r.TreeBytes)/float64(r.DataBytes)
}

// savedMean is the mean over images and bandwidths of the median over rounds: which layer comes last differs from pull
// to pull, and an image that happened to be measured oftener must not count for more.
func (rs runs) savedMean(variant string) float64 {
	var medians []float64
	for _, c := range rs.cells() {
		if v := rs.pick(variant, c).values(saved); len(v) > 0 {
			medians = append(medians, result.Median(v))
		}
	}
	return result.Mean(medians)
}

// usedSaved compares what filesystems say: blocks, directories, databases and trees included.
func (rs runs) usedSaved(variant, base string) float64 {
	var medians []float64
	for _, c := range rs.cells() {
		if v := rs.ratios(variant, base, c, func(r run) float64 { return float64(r.NVMUsedBytes) }); len(v) > 0 {
			medians = append(medians, 1-result.Median(v))
		}
	}
	return result.Mean(medians)
}

// figures of the pulls. The figures without a variant in their names are those of the default policy and of containerd's
// default, sequential unpacking.
func (rs runs) figures(defaultPolicy string, set func(string, float64)) {
	rs.against(defaultPolicy, "", set)
	for _, v := range []struct{ variant, key, saved string }{
		{lass, "lass_", "sequential"}, {drain, "drain_", "drain"}, {lassParallel, "parallel_", "parallel"},
		{drainParallel, "drain_parallel_", "drain_parallel"}, {allNVM, "all_nvm_", "all_nvm"}, {allHDD, "all_hdd_", "all_hdd"},
	} {
		rs.against(v.variant, v.key, set)
		spec, _ := variantByName(v.variant)
		set("nvm_saved_"+v.saved, rs.savedMean(v.variant))
		set("nvm_saved_used_"+v.saved, rs.usedSaved(v.variant, spec.Baseline))
	}
	for _, c := range rs.cells() {
		for _, v := range variantNames() {
			at := strings.Join([]string{v, c.Image, c.Bandwidth}, ".")
			set("returned_s."+at, result.Median(rs.pick(v, c).values(returned)))
			set("durable_s."+at, result.Median(rs.pick(v, c).values(durable)))
		}
	}
	rs.afterFigures(set)
}

// against compares a variant of nhybrid with its baselines.
func (rs runs) against(variant, infix string, set func(string, float64)) {
	spec, ok := variantByName(variant)
	if !ok {
		return
	}
	for _, m := range []struct {
		name string
		of   func(run) float64
	}{{"durable", durable}, {"synced", synced}, {"returns", returned}} {
		set(m.name+"_"+infix+"vs_nvm", result.Median(rs.ratios(variant, spec.Baseline, key{}, m.of)))
		set(m.name+"_"+infix+"vs_hdd", result.Median(rs.ratios(variant, overlayHDD, key{}, m.of)))
	}
	set("durable_"+infix+"vs_nvm_worst", rs.worst(variant, spec.Baseline, durable))
	for _, c := range rs.cells() {
		set(fmt.Sprintf("durable_%svs_nvm.%s.%s", infix, c.Image, c.Bandwidth), result.Median(rs.ratios(variant, spec.Baseline, c, durable)))
	}
}

// afterFigures are of what the daemon keeps and does when the pull is over.
func (rs runs) afterFigures(set func(string, float64)) {
	var idle, after, peak, copied, settledAfter []float64
	for _, r := range rs {
		if r.DaemonIdle != nil {
			idle = append(idle, float64(r.DaemonIdle.RSS)/1e6)
			after, peak = append(after, float64(r.DaemonAfter.RSS)/1e6), append(peak, float64(r.DaemonAfter.Peak)/1e6)
		}
		if r.WriteBack != nil && r.WriteBack.Seconds > 0 {
			copied = append(copied, float64(r.WriteBack.Bytes)/r.WriteBack.Seconds/1e6)
		}
		if r.SettledS > 0 {
			settledAfter = append(settledAfter, max(0, r.SettledS-r.ReturnS))
		}
	}
	set("daemon_idle_rss_mb", result.Quantile(idle, 1))
	set("daemon_after_pull_rss_mb", result.Quantile(after, 1))
	set("daemon_peak_rss_mb", result.Quantile(peak, 1))
	set("write_back_mb_per_s", result.Median(copied))
	set("settled_after_return_s", result.Median(settledAfter))
}
