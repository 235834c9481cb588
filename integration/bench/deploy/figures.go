// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"math"
	"slices"
	"strings"

	"github.com/nhybrid/nhybrid/integration/bench/lab"
	"github.com/nhybrid/nhybrid/integration/bench/result"
)

// runs are those of one benchmark; those of one image are all of one setting.
type runs []run

// pick are the runs of a variant, of one image and link where the cell names them.
func (rs runs) pick(variant string, cell key) (picked runs) {
	for _, r := range rs {
		if r.Variant == variant && (cell.Image == "" || r.Image == cell.Image) && (cell.Link == "" || r.Link == cell.Link) {
			picked = append(picked, r)
		}
	}
	return picked
}

// cells are the images and links that were measured, in the order of the first run of each.
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

// ratios are those of paired runs: the same image and link in the same round.
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

// links are those that were measured, in the order of the first run of each.
func (rs runs) links() (links []string) {
	for _, r := range rs {
		if !slices.Contains(links, r.Link) {
			links = append(links, r.Link)
		}
	}
	return links
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

// cpu is the processor time of all programs that stored the image.
func cpu(r run) float64 { return r.ContainerdCPUS + r.DaemonCPUS }

// saved is how much less of NVM was taken when all was durable than the files of the image have bytes.
func saved(r run) float64 { return 1 - float64(r.NVMUsedBytes)/float64(r.DataBytes) }

// vsLink compares with the time in which one connection brings the layers over the link, as fast as it was just before.
// It is not a number for a link without a limit.
func vsLink(r run) float64 {
	if r.LinkRate.One == 0 {
		return math.NaN()
	}
	return r.durable() / (float64(r.CompressedBytes) / r.LinkRate.One)
}

// amplification is how many bytes the HDD was given to write for each byte of the blobs and of the files in them.
func amplification(r run) float64 {
	return float64(r.HDDToDurable.WrittenBytes) / float64(r.CompressedBytes+r.DataBytes)
}

// bases are the variants that others are compared with, by the name in figures.
var bases = []struct{ name, variant string }{
	{"nvm", overlayNVM}, {"best", overlayNVMBest}, {"hdd", overlayHDD}, {"hdd_best", overlayHDDBest},
}

// figures of the pulls: those of the default variant under their plain names, those of another variant with its name behind
// a dot.
func (rs runs) figures(set func(string, float64)) {
	for _, v := range variants {
		of := ""
		if v.Name != hybrid {
			of = "." + v.Name
		}
		rs.variantFigures(v.Name, func(name string, value float64) { set(name+of, value) })
		if v.Hybrid {
			rs.against(v.Name, func(name string, value float64) { set(name+of, value) })
		}
	}
	var links []lab.LinkRate
	for i, r := range rs {
		// One measurement serves all variants of a cell and round.
		if !slices.ContainsFunc(rs[:i], func(o run) bool { return o.cell() == r.cell() && o.Round == r.Round && o.LinkRate == r.LinkRate }) {
			links = append(links, r.LinkRate)
		}
	}
	lab.LinkFigures(links, set)
	for _, c := range rs.cells() {
		for _, v := range variantNames() {
			at := strings.Join([]string{v, c.Image, c.Link}, ".")
			set("returned_s."+at, result.Median(rs.pick(v, c).values(returned)))
			set("durable_s."+at, result.Median(rs.pick(v, c).values(durable)))
		}
	}
	rs.afterFigures(set)
}

// variantFigures are those of a variant by itself.
func (rs runs) variantFigures(variant string, set func(string, float64)) {
	picked := rs.pick(variant, key{})
	for _, link := range rs.links() {
		at := rs.pick(variant, key{Link: link})
		set("durable_vs_link_"+suffix(link), result.Median(at.values(vsLink)))
		set("nvm_saved_"+suffix(link), result.Median(at.values(saved)))
	}
	set("cpu_s", result.Median(picked.values(cpu)))
	set("write_amplification_hdd", result.Median(picked.values(amplification)))
	var peaks []float64
	for _, r := range picked {
		if r.DaemonSettled != nil {
			peaks = append(peaks, float64(r.DaemonSettled.Peak)/1e6)
		}
	}
	set("daemon_peak_mb", result.Quantile(peaks, 1))
}

// against compares a variant with the overlayfs snapshotter.
func (rs runs) against(variant string, set func(string, float64)) {
	for _, m := range []struct {
		name string
		of   func(run) float64
	}{{"durable", durable}, {"synced", synced}, {"returns", returned}} {
		for _, base := range bases {
			name := m.name + "_vs_" + base.name
			set(name, result.Median(rs.ratios(variant, base.variant, key{}, m.of)))
			for _, link := range rs.links() {
				set(name+"_"+suffix(link), result.Median(rs.ratios(variant, base.variant, key{Link: link}, m.of)))
			}
		}
	}
	set("durable_vs_nvm_worst", rs.worst(variant, overlayNVM, durable))
	set("durable_vs_best_worst", rs.worst(variant, overlayNVMBest, durable))
	set("cpu_vs_overlayfs", result.Median(rs.ratios(variant, overlayNVM, key{}, cpu)))
	set("cpu_vs_best", result.Median(rs.ratios(variant, overlayNVMBest, key{}, cpu)))
}

// afterFigures are of what the daemon keeps and does when the pull is over.
func (rs runs) afterFigures(set func(string, float64)) {
	var idle, after, copied, settledAfter []float64
	for _, r := range rs {
		if r.DaemonIdle != nil {
			idle = append(idle, float64(r.DaemonIdle.RSS)/1e6)
		}
		if r.DaemonSettled != nil {
			after = append(after, float64(r.DaemonSettled.RSS)/1e6)
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
	set("write_back_mb_per_s", result.Median(copied))
	set("settled_after_return_s", result.Median(settledAfter))
}
