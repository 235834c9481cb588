// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"fmt"
	"slices"
	"strconv"

	"github.com/nhybrid/nhybrid/integration/bench/result"
	"github.com/nhybrid/nhybrid/placement"
)

// targets of the figures.
var targets = []result.Target{
	{Figure: "link_rate_100m", Least: 0.97, What: "what one connection had of 100 Mbit/s"},
	{Figure: "link_rate_1g", Least: 0.97, What: "what one connection had of 1 Gbit/s"},
	{Figure: "durable_vs_link_100m", Most: 1.25, What: "durable, against the download by the link's rate"},
	{Figure: "durable_vs_nvm_100m", Most: 0.80, What: "durable, against overlayfs on NVM"},
	{Figure: "durable_vs_nvm_1g", Most: 0.65, What: "durable, against overlayfs on NVM"},
	{Figure: "durable_vs_best_100m", Most: 0.90, What: "durable, against overlayfs on NVM at its best"},
	{Figure: "durable_vs_best_1g", Most: 0.75, What: "durable, against overlayfs on NVM at its best"},
	{Figure: "durable_vs_hdd_100m", Most: 0.55, What: "durable, against overlayfs on HDD"},
	{Figure: "durable_vs_hdd_1g", Most: 0.40, What: "durable, against overlayfs on HDD"},
	{Figure: "nvm_saved_100m", Least: 0.97, What: "NVM saved when durable, nothing known of the image"},
	{Figure: "nvm_saved_1g", Least: 0.60, What: "NVM saved when durable, nothing known of the image"},
	{Figure: "hot_in_place", Least: 0.99, What: "bytes of a known profile on NVM when the pull returns"},
	{Figure: "cpu_vs_overlayfs", Most: 1.1, What: "CPU seconds until durable, against overlayfs on NVM"},
	{Figure: "daemon_peak_mb", Most: 150, What: "the daemon's peak memory in a pull"},
	{Figure: "write_amplification_hdd", Most: 1.1, What: "bytes written to the HDD for each byte of the image, compressed and not"},
	{Figure: "prepare_overhead_ms", Most: 2, What: "a container's Prepare and Mounts, above overlayfs"},
	{Figure: "capture_1m_s", Most: 6, What: "a layer of 1 000 000 files, from its last byte to durable"},
	{Figure: "capture_1m_peak_mb", Most: 400, What: "the daemon's peak memory with it"},
	{Figure: "remove_100k_s", Most: 0.3, What: "removal of 100 000 files from a cold HDD"},
	{Figure: "first_start_after_pull_vs_nvm", Most: 1.05, What: "first start right after a pull with a known profile, against overlayfs on NVM"},
	{Figure: "daemon_idle_rss_mb", Most: 40, What: "the daemon idle"},
}

// times is a table of one time of all pulls: the median and the range over the rounds.
func (rs runs) times(title string, of func(run) float64) result.Table {
	names := slices.DeleteFunc(variantNames(), func(v string) bool { return len(rs.pick(v, key{})) == 0 })
	t := result.Table{Title: title, Head: append([]string{"image", "link"}, names...)}
	for _, c := range rs.cells() {
		row := []string{c.Image, c.Link}
		for _, v := range names {
			values := rs.pick(v, c).values(of)
			if len(values) == 0 {
				row = append(row, "-")
				continue
			}
			text := fmt.Sprintf("%.2f", result.Median(values))
			if len(values) > 1 {
				text += fmt.Sprintf(" (%.2f–%.2f)", slices.Min(values), slices.Max(values))
			}
			row = append(row, text)
		}
		t.Rows = append(t.Rows, row)
	}
	return t
}

// costs shows what the pulls took beside time: medians over the rounds.
func (rs runs) costs() result.Table {
	t := result.Table{
		Title: "What it took until all was durable",
		Head: []string{
			"image", "link", "variant", "times the link's time", "CPU s", "NVM used MB", "of MB", "HDD written MB", "for each byte", "HDD busy s", "HDD seeks", "HDD flushes", "daemon's peak MB",
		},
	}
	for _, c := range rs.cells() {
		for _, v := range variantNames() {
			picked := rs.pick(v, c)
			if len(picked) == 0 {
				continue
			}
			median := func(format string, of func(run) float64) string {
				return fmt.Sprintf(format, result.Median(picked.values(of)))
			}
			peak := "-"
			if picked[0].DaemonSettled != nil {
				peak = median("%.0f", func(r run) float64 { return float64(r.DaemonSettled.Peak) / 1e6 })
			}
			t.Rows = append(t.Rows, []string{
				c.Image, c.Link, v, median("%.2f", vsLink), median("%.1f", cpu), median("%.1f", func(r run) float64 { return float64(r.NVMUsedBytes) / 1e6 }),
				median("%.1f", func(r run) float64 { return float64(r.DataBytes) / 1e6 }),
				median("%.1f", func(r run) float64 { return float64(r.HDDToDurable.WrittenBytes) / 1e6 }), median("%.2f", amplification),
				median("%.1f", func(r run) float64 { return float64(r.HDDToDurable.BusyMS) / 1e3 }),
				median("%.0f", func(r run) float64 { return float64(r.HDDSeeks) }),
				median("%.0f", func(r run) float64 { return float64(r.HDDToDurable.Flushes) }), peak,
			})
		}
	}
	return t
}

// savedData compares files alone, as the simulator does: what of them stood on NVM, and the tree, with all of them.
func savedData(r run) float64 {
	return 1 - float64(r.NVMDataBytes+r.ViewBytes)/float64(r.DataBytes)
}

// placed shows what stood where, by image, link and variant of nhybrid.
func (rs runs) placed() result.Table {
	t := result.Table{
		Title: "What stood on NVM when the pull returned",
		Head:  []string{"image", "link", "variant", "tiers (bottom first; N NVM, H HDD) of round 1", "LDL by round", "NVM MB", "of MB", "saved", "HDD busy s of the pull"},
	}
	for _, c := range rs.cells() {
		for _, v := range variants {
			picked := rs.pick(v.Name, c)
			if !v.Hybrid || len(picked) == 0 {
				continue
			}
			tiers, ldl := "", ""
			for _, l := range picked[0].Layers {
				switch l.Tier {
				case "nvm":
					tiers += "N"
				case "hdd":
					tiers += "H"
				default:
					tiers += "?"
				}
			}
			for _, r := range picked {
				ldl += fmt.Sprintf("%d ", r.LDL)
			}
			mb := func(of func(run) int64) string {
				return fmt.Sprintf("%.1f", result.Median(picked.values(func(r run) float64 { return float64(of(r)) / 1e6 })))
			}
			t.Rows = append(t.Rows, []string{
				c.Image, c.Link, v.Name, tiers, ldl, mb(func(r run) int64 { return r.NVMDataBytes + r.ViewBytes }),
				mb(func(r run) int64 { return r.DataBytes }), fmt.Sprintf("%.2f", result.Median(picked.values(savedData))),
				fmt.Sprintf("%.1f of %.1f", result.Median(picked.values(func(r run) float64 { return float64(r.HDDToReturn.BusyMS) / 1e3 })), result.Median(picked.values(returned))),
			})
		}
	}
	return t
}

// copied shows how layers on NVM came to HDD later.
func (rs runs) copied() result.Table {
	t := result.Table{Title: "Copying from NVM to HDD afterwards", Head: []string{"image", "link", "variant", "round", "MB", "seconds"}}
	for _, r := range rs {
		if w := r.WriteBack; w != nil {
			t.Rows = append(t.Rows, []string{r.Image, r.Link, r.Variant, strconv.Itoa(r.Round), fmt.Sprintf("%.1f", float64(w.Bytes)/1e6), fmt.Sprintf("%.1f", w.Seconds)})
		}
	}
	return t
}

// simulated sets beside the measured runs what the simulator says of the same images. Its disk writes as fast as the
// emulated one did in the runs with everything on HDD, metadata and seeks included.
func (rs runs) simulated(defaultPolicy string) (result.Table, error) {
	t := result.Table{
		Title: "Measured and simulated",
		Head:  []string{"image", "link", "variant", "NVM saved", "simulated", "durable s", "simulated"},
	}
	o := placement.DefaultOptions()
	if rate := result.Median(rs.pick(overlayHDD, key{}).values(diskRate)); rate > 0 {
		o.HDDWrite = rate
	}
	strategies := []struct{ variant, key string }{{overlayHDD, "hdd"}, {overlayNVM, "nvm"}, {lass, "sequential"}}
	if defaultPolicy == "drain" {
		strategies = append(strategies, struct{ variant, key string }{hybrid, "drain"})
	}
	for _, c := range rs.cells() {
		rate, err := linkRate(c.Link)
		if err != nil {
			return t, err
		}
		if o.Bandwidth = rate; rate <= 0 {
			continue
		}
		img := rs.image(c)
		if len(img.Layers) == 0 {
			continue
		}
		report, err := placement.Simulate([]placement.Image{img}, o)
		if err != nil {
			return t, err
		}
		sim := report.Images[0]
		for _, v := range strategies {
			picked := rs.pick(v.variant, c)
			if len(picked) == 0 {
				continue
			}
			t.Rows = append(t.Rows, []string{
				c.Image, c.Link, v.variant, fmt.Sprintf("%.2f", result.Median(picked.values(savedData))),
				fmt.Sprintf("%.2f", sim.NVMSavedStored[v.key]),
				fmt.Sprintf("%.2f", result.Median(picked.values(durable))), fmt.Sprintf("%.2f", sim.TTotal[v.key]),
			})
		}
	}
	t.Title += fmt.Sprintf(" (HDD %s, NVM %s, unpacking %s)", placement.FormatRate(o.HDDWrite), placement.FormatRate(o.NVMWrite), placement.FormatRate(o.Unpack))
	return t, nil
}

// diskRate is at what rate a disk took what it was given, all in all.
func diskRate(r run) float64 {
	return float64(r.HDDToDurable.WrittenBytes) / (float64(r.HDDToDurable.BusyMS) / 1e3)
}

// image is a row of the simulator's table.
func (rs runs) image(c key) placement.Image {
	img := placement.Image{Name: c.Image}
	for _, r := range rs {
		if r.cell() == c && len(r.Layers) > 0 {
			for _, l := range r.Layers {
				img.Layers = append(img.Layers, placement.ImageLayer{Digest: l.Digest, Compressed: l.Compressed, Uncompressed: l.Data})
			}
			break
		}
	}
	return img
}
