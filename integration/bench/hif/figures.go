// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"fmt"
	"math"
	"slices"

	"github.com/nhybrid/nhybrid/integration/bench/lab"
	"github.com/nhybrid/nhybrid/integration/bench/result"
)

// rows are the measurements of one benchmark.
type rows []row

func (rs rows) images() (images []*imageRow) {
	for _, r := range rs {
		if r.Image != nil {
			images = append(images, r.Image)
		}
	}
	return images
}

// values are those of all images that have one.
func values(images []*imageRow, of func(*imageRow) float64) (values []float64) {
	for _, r := range images {
		if v := of(r); !math.IsNaN(v) {
			values = append(values, v)
		}
	}
	return values
}

func most(values []float64) float64  { return result.Quantile(values, 1) }
func least(values []float64) float64 { return result.Quantile(values, 0) }

// against is the median of the ratios of second starts in the same round; NaN where there are none.
func (r *imageRow) against(base string) float64 {
	var ratios []float64
	own, other := r.Second[hybrid], r.Second[base]
	for i := range min(len(own), len(other)) {
		ratios = append(ratios, own[i].ReadyS/other[i].ReadyS)
	}
	return result.Median(ratios)
}

func (r *imageRow) median(variant string) float64 {
	var times []float64
	for _, s := range r.Second[variant] {
		times = append(times, s.ReadyS)
	}
	return result.Median(times)
}

// reads are those of the disk in the second start that had most.
func (r *imageRow) reads() (reads int64) {
	for _, s := range r.Second[hybrid] {
		reads = max(reads, s.Reads)
	}
	return reads
}

// figures sets what the rows say.
func (rs rows) figures(set func(string, float64)) {
	images := rs.images()
	saved := values(images, func(r *imageRow) float64 { return r.Space.saved() })
	set("images", float64(len(images)))
	set("nvm_saved_mean", result.Mean(saved))
	set("nvm_saved_min", least(saved))
	set("nvm_saved_fixed_mean", result.Mean(values(images, func(r *imageRow) float64 { return r.Space.savedAll() })))
	for _, c := range categories(images) {
		in := slices.DeleteFunc(slices.Clone(images), func(r *imageRow) bool { return r.Category != c })
		set("nvm_saved."+c, result.Mean(values(in, func(r *imageRow) float64 { return r.Space.saved() })))
	}
	set("trace_missing_max", most(values(images, func(r *imageRow) float64 { return float64(len(r.Trace.Missing)) })))
	set("second_start_hdd_reads_max", most(values(images, func(r *imageRow) float64 { return float64(r.reads()) })))
	vsNVM := values(images, func(r *imageRow) float64 { return r.against(overlayNVM) })
	set("second_start_vs_nvm", result.Median(vsNVM))
	set("second_start_vs_nvm_worst", most(vsNVM))
	set("second_start_vs_hdd", result.Median(values(images, func(r *imageRow) float64 { return r.against(overlayHDD) })))
	set("integrity_errors", total(values(images, func(r *imageRow) float64 { return float64(r.Integrity.Errors) })))
	for _, m := range []struct {
		name string
		of   func(*imageRow) score
	}{{"static", func(r *imageRow) score { return r.Static.Files }}, {"static_layers", func(r *imageRow) score { return r.Static.Layers }}} {
		set(m.name+"_recall", result.Mean(values(images, func(r *imageRow) float64 { return m.of(r).Recall })))
		set(m.name+"_precision", result.Mean(values(images, func(r *imageRow) float64 { return m.of(r).Precision })))
	}
	rs.savedFigures(set)
	rs.firstFigures(set)
	rs.crowdFigures(set)
	for _, r := range rs {
		if r.Costs != nil {
			r.Costs.figures(set)
		}
	}
}

// total of no values is no figure.
func total(values []float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	return result.Mean(values) * float64(len(values))
}

func categories(images []*imageRow) (names []string) {
	for _, r := range images {
		if !slices.Contains(names, r.Category) {
			names = append(names, r.Category)
		}
	}
	return names
}

// firstFigures are medians over the images.
func (rs rows) firstFigures(set func(string, float64)) {
	var links []lab.LinkRate
	for _, r := range rs {
		if r.First != nil {
			links = append(links, r.First.Link)
		}
	}
	lab.LinkFigures(links, set)
	for _, mode := range knowledge {
		var ratios, space []float64
		for _, r := range rs {
			if r.First == nil || r.First.Modes[mode] == nil {
				continue
			}
			m := r.First.Modes[mode]
			ratios = append(ratios, m.Start.ReadyS/m.AllNVM.ReadyS)
			space = append(space, float64(m.NVMBytes)/float64(m.AllNVMBytes))
		}
		set("first_start_"+mode+"_vs_nvm", result.Median(ratios))
		set("first_start_"+mode+"_nvm_share", result.Mean(space))
	}
}

func (rs rows) crowdFigures(set func(string, float64)) {
	foreign, outside := math.NaN(), math.NaN()
	for _, r := range rs {
		if r.Crowd == nil {
			continue
		}
		n := len(r.Crowd.Images)
		for _, v := range []string{overlayNVM, overlayHDD} {
			name := map[string]string{overlayNVM: "nvm", overlayHDD: "hdd"}[v]
			set(fmt.Sprintf("crowd_%d_vs_%s", n, name), r.Crowd.Second[hybrid].ReadyS/r.Crowd.Second[v].ReadyS)
			set(fmt.Sprintf("crowd_%d_first_vs_%s", n, name), r.Crowd.First[hybrid].ReadyS/r.Crowd.First[v].ReadyS)
		}
		set(fmt.Sprintf("crowd_%d_hdd_reads", n), float64(r.Crowd.Second[hybrid].Reads))
		if math.IsNaN(foreign) {
			foreign, outside = 0, 0
		}
		for _, m := range r.Crowd.Profiles {
			foreign, outside = foreign+float64(m.Foreign), outside+float64(m.Outside)
		}
	}
	set("crowd_foreign_files", foreign)
	set("crowd_files_outside", outside)
}

func (r *costRow) figures(set func(string, float64)) {
	watched, unwatched := result.Median(r.Watched), result.Median(r.Unwatched)
	set("opens_per_s_watched", watched)
	set("opens_per_s_unwatched", unwatched)
	set("opens_per_s_overlayfs", result.Median(r.Overlay))
	set("trace_overhead", 1-watched/unwatched)
	set("trace_us_per_open", 1e6/watched-1e6/unwatched)
	set("daemon_idle_cpu_share", r.IdleCPUS/r.IdleS)
	set("trace_kb_per_1000_files", float64(r.MemoryBytes)/float64(r.MemoryFiles))
}

// targets of the figures.
var targets = []result.Target{
	{Figure: "trace_missing_max", Most: 0, What: "files that strace saw and the trace did not, of the worst image"},
	{Figure: "nvm_saved_mean", Least: 0.8822, What: "NVM saved after the first start, mean of the images"},
	{Figure: "nvm_saved_mean_warm", Least: 0.8822, What: "the same with the first start right after the pull, with warm caches"},
	{Figure: "nvm_saved_mean_default_readahead", Least: 0.8822, What: "the same with the kernel's read-ahead on NVM, 128 KiB"},
	{Figure: "second_start_hdd_reads_max", Most: 0, What: "reads from the HDD in a second cold start, of the worst one"},
	{Figure: "second_start_vs_nvm", Most: 1.02, What: "second cold start, against everything on NVM"},
	{Figure: "integrity_errors", Most: 0, What: "differences between the image before and after migration"},
	{Figure: "crowd_foreign_files", Most: 0, What: "files of other images in profiles of starts at the same time"},
}
