// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"fmt"
	"math"
	"strings"

	"github.com/nhybrid/nhybrid/integration/bench/result"
)

// fill derives figures and tables.
func fill(r *result.Result, all rows) {
	r.Runs = all
	all.figures(r.Set)
	images := all.images()
	r.Tables = append(r.Tables, spaceTable(images), categoryTable(images), startTable(images), traceTable(images), staticTable(images))
	r.Tables = append(r.Tables, all.savedTable(), all.firstTable(), all.crowdTable(), all.mixedTable())
}

func mb(n int64) string               { return fmt.Sprintf("%.1f", float64(n)/1e6) }
func percent(v float64) string        { return fmt.Sprintf("%.1f %%", 100*v) }
func seconds(s float64) string        { return fmt.Sprintf("%.2f", s) }
func count[T int | int64](n T) string { return fmt.Sprint(n) }

// ratio is "-" where nothing was measured.
func ratio(v float64) string {
	if math.IsNaN(v) || math.IsInf(v, 0) {
		return "-"
	}
	return fmt.Sprintf("%.2f", v)
}

func spaceTable(images []*imageRow) result.Table {
	t := result.Table{
		Title: "NVM in use, MB, trees and all metadata included",
		Head:  []string{"image", "category", "layers", "files", "everything on NVM", "nhybrid, pulled", "after first start and migration", "saved", "saved with the empty store counted", "down MB", "up MB"},
	}
	for _, r := range images {
		t.Rows = append(t.Rows, []string{
			r.Image, r.Category, count(r.Layers), count(r.Files), mb(r.Space.AllNVM), mb(r.Space.Pulled), mb(r.Space.Migrated), percent(r.Space.saved()),
			percent(r.Space.savedAll()), mb(r.Migration.DownBytes), mb(r.Migration.UpBytes),
		})
	}
	return t
}

func categoryTable(images []*imageRow) result.Table {
	t := result.Table{Title: "NVM saved by category", Head: []string{"category", "images", "mean", "least", "most"}}
	of := func(name string, in []*imageRow) {
		saved := values(in, func(r *imageRow) float64 { return r.Space.saved() })
		t.Rows = append(t.Rows, []string{name, count(len(in)), percent(result.Mean(saved)), percent(least(saved)), percent(most(saved))})
	}
	for _, c := range categories(images) {
		var in []*imageRow
		for _, r := range images {
			if r.Category == c {
				in = append(in, r)
			}
		}
		of(c, in)
	}
	if len(images) > 0 {
		of("all", images)
	}
	return t
}

func startTable(images []*imageRow) result.Table {
	t := result.Table{
		Title: "Cold starts: seconds until ready, medians for the second",
		Head: []string{"image", "ready when", "first: all on NVM", "nhybrid", "all on HDD", "second: all on NVM", "nhybrid", "all on HDD",
			"nhybrid : NVM", "nhybrid : HDD", "reads of the HDD: nhybrid", "all on HDD"},
	}
	for _, r := range images {
		hdd := "-"
		if s := r.Second[overlayHDD]; len(s) > 0 {
			hdd = count(s[0].Reads)
		}
		t.Rows = append(t.Rows, []string{
			r.Image, r.Sign, seconds(r.First[overlayNVM].ReadyS), seconds(r.First[hybrid].ReadyS), seconds(r.First[overlayHDD].ReadyS),
			ratio(r.median(overlayNVM)), ratio(r.median(hybrid)), ratio(r.median(overlayHDD)), ratio(r.against(overlayNVM)), ratio(r.against(overlayHDD)),
			count(r.reads()), hdd,
		})
	}
	return t
}

func traceTable(images []*imageRow) result.Table {
	t := result.Table{
		Title: "Traces: one start as strace and as the daemon saw it, files that are not empty",
		Head:  []string{"image", "strace", "daemon", "missing", "beyond strace", "of strace's, not in the first start", "hot MB", "of MB", "compared MB", "differences"},
	}
	for _, r := range images {
		t.Rows = append(t.Rows, []string{
			r.Image, count(r.Trace.Strace), count(r.Trace.Traced), count(len(r.Trace.Missing)), count(r.Trace.Beyond), count(r.Trace.FirstLacks),
			mb(r.HotBytes), mb(r.Bytes), mb(r.Integrity.Bytes), count(r.Integrity.Errors),
		})
	}
	return t
}

func staticTable(images []*imageRow) result.Table {
	t := result.Table{
		Title: "Static analysis against what a start opened",
		Head:  []string{"image", "by layers: MB", "precision", "recall", "by file: files", "MB", "precision", "recall"},
	}
	for _, r := range images {
		l, f := r.Static.Layers, r.Static.Files
		t.Rows = append(t.Rows, []string{
			r.Image, mb(l.Bytes), fmt.Sprintf("%.3f", l.Precision), fmt.Sprintf("%.3f", l.Recall), count(f.Predicted), mb(f.Bytes),
			fmt.Sprintf("%.3f", f.Precision), fmt.Sprintf("%.3f", f.Recall),
		})
	}
	return t
}

// modeTitles say what was known.
var modeTitles = map[string]string{
	knowsNothing: "nothing", knowsLayers: "layers, as in the paper", knowsFiles: "files", knowsProfile: "profile from the registry",
}

func (rs rows) firstTable() result.Table {
	t := result.Table{
		Title: "First cold starts by what was known of the image, policy lass",
		Head:  []string{"image", "known", "ready s", "all on NVM s", "ratio", "NVM MB", "all on NVM MB", "reads of the HDD", "brought up MB"},
	}
	for _, r := range rs {
		if r.First == nil {
			continue
		}
		for _, mode := range knowledge {
			m := r.First.Modes[mode]
			if m == nil {
				continue
			}
			t.Rows = append(t.Rows, []string{
				r.First.Image, modeTitles[mode], seconds(m.Start.ReadyS), seconds(m.AllNVM.ReadyS), ratio(m.Start.ReadyS / m.AllNVM.ReadyS),
				mb(m.NVMBytes), mb(m.AllNVMBytes), count(m.Start.Reads), mb(m.Prepared.UpBytes),
			})
		}
	}
	return t
}

func (rs rows) crowdTable() result.Table {
	t := result.Table{
		Title: "Many at once: seconds until the last is ready, cold",
		Head:  []string{"containers", "start", "all on NVM", "nhybrid", "all on HDD", "nhybrid's reads of the HDD"},
	}
	for _, r := range rs {
		if r.Crowd == nil {
			continue
		}
		for _, when := range []struct {
			name string
			of   map[string]start
		}{{"first", r.Crowd.First}, {"second", r.Crowd.Second}} {
			t.Rows = append(t.Rows, []string{
				r.Name, when.name, seconds(when.of[overlayNVM].ReadyS), seconds(when.of[hybrid].ReadyS), seconds(when.of[overlayHDD].ReadyS),
				count(when.of[hybrid].Reads),
			})
		}
	}
	return t
}

func (rs rows) mixedTable() result.Table {
	t := result.Table{
		Title: "Profiles of starts at the same time, against strace of each image alone",
		Head:  []string{"containers", "image", "starts", "files", "outside the image", "another image's", "lacking", "beyond strace"},
	}
	for _, r := range rs {
		if r.Crowd == nil {
			continue
		}
		seen := map[string]bool{}
		for _, name := range r.Crowd.Images {
			m := r.Crowd.Profiles[name]
			if seen[name] {
				continue
			}
			seen[name] = true
			t.Rows = append(t.Rows, []string{
				r.Name, name, count(m.Starts), count(m.Files), count(m.Outside), count(m.Foreign), count(m.Lacking), count(m.Beyond),
			})
		}
	}
	return t
}

// summary is one line for who waits.
func (r row) summary() string {
	switch {
	case r.Image != nil:
		i := r.Image
		return fmt.Sprintf("saved %s, second start %s s (NVM %s, HDD %s), %d reads, %d files missing, %d differences, took %.0f s", percent(i.Space.saved()),
			ratio(i.median(hybrid)), ratio(i.median(overlayNVM)), ratio(i.median(overlayHDD)), i.reads(), len(i.Trace.Missing), i.Integrity.Errors, i.Seconds)
	case r.Saved != nil:
		return fmt.Sprintf("saved %s by a start right after the pull, %s with the kernel's read-ahead", percent(r.Saved.Space[savedWarm].saved()),
			percent(r.Saved.Space[savedReadAhead].saved()))
	case r.First != nil:
		var parts []string
		for _, mode := range knowledge {
			m := r.First.Modes[mode]
			parts = append(parts, fmt.Sprintf("%s %.2f s (NVM %.2f)", mode, m.Start.ReadyS, m.AllNVM.ReadyS))
		}
		return strings.Join(parts, ", ")
	case r.Crowd != nil:
		return fmt.Sprintf("last ready: first start %.2f s (NVM %.2f, HDD %.2f), second %.2f s (NVM %.2f)", r.Crowd.First[hybrid].ReadyS,
			r.Crowd.First[overlayNVM].ReadyS, r.Crowd.First[overlayHDD].ReadyS, r.Crowd.Second[hybrid].ReadyS, r.Crowd.Second[overlayNVM].ReadyS)
	case r.Costs != nil:
		return fmt.Sprintf("opens/s watched %.0f, unwatched %.0f, overlayfs %.0f", result.Median(r.Costs.Watched), result.Median(r.Costs.Unwatched), result.Median(r.Costs.Overlay))
	case r.Curve != nil:
		return fmt.Sprintf("%d samples", len(r.Curve.Hybrid.Samples)+len(r.Curve.AllNVM.Samples))
	}
	return "nothing"
}
