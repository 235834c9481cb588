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

// The variant that a daemon runs which was told nothing: its policy, containerd's sequential unpacking.
const defaultVariant = lass

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
func (rs runs) worst(variant, base string, of func(run) float64) (worst float64, where key) {
	worst = math.NaN()
	for _, c := range rs.cells() {
		if m := result.Median(rs.ratios(variant, base, c, of)); math.IsNaN(worst) || m > worst {
			worst, where = m, c
		}
	}
	return worst, where
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

// figures of the pulls.
func (rs runs) figures(set func(string, float64)) {
	for _, v := range []struct{ variant, key string }{{defaultVariant, ""}, {drain, "drain_"}, {lassParallel, "parallel_"}, {drainParallel, "drain_parallel_"}, {allNVM, "all_nvm_"}, {allHDD, "all_hdd_"}} {
		spec, _ := variantByName(v.variant)
		for _, m := range []struct {
			name string
			of   func(run) float64
		}{{"durable", durable}, {"synced", synced}, {"returns", returned}} {
			set(m.name+"_"+v.key+"vs_nvm", result.Median(rs.ratios(v.variant, spec.Baseline, key{}, m.of)))
			set(m.name+"_"+v.key+"vs_hdd", result.Median(rs.ratios(v.variant, overlayHDD, key{}, m.of)))
		}
		worst, _ := rs.worst(v.variant, spec.Baseline, durable)
		set("durable_"+v.key+"vs_nvm_worst", worst)
		for _, c := range rs.cells() {
			set(fmt.Sprintf("durable_%svs_nvm.%s.%s", v.key, c.Image, c.Bandwidth), result.Median(rs.ratios(v.variant, spec.Baseline, c, durable)))
		}
		short := map[string]string{lass: "sequential", drain: "drain", lassParallel: "parallel", drainParallel: "drain_parallel", allNVM: "all_nvm", allHDD: "all_hdd"}[v.variant]
		set("nvm_saved_"+short, rs.savedMean(v.variant))
		set("nvm_saved_used_"+short, rs.usedSaved(v.variant, spec.Baseline))
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
