// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/integration/bench/lab"
	"github.com/nhybrid/nhybrid/integration/bench/result"
	"github.com/nhybrid/nhybrid/integration/image"
)

// pulled is a run over a link of 1 Gbit/s that let half of it through, of an image of 1000 bytes, compressed to 500.
func pulled(round int, image, variant string, returned, synced, reported float64) run {
	r := run{
		key: key{round, image, "1Gbit", variant}, ReturnS: returned, SyncedS: synced, ReportedS: reported, CompressedBytes: 500, DataBytes: 1000,
		LinkRate: lab.LinkRate{Nominal: 125e6, One: 62.5e6, Three: 125e6},
	}
	switch variant {
	case overlayNVM, overlayNVMBest:
		r.NVMUsedBytes = 1100
	case hybrid, lass:
		r.NVMUsedBytes = 400
	}
	return r
}

func figuresOf(rs runs) map[string]float64 {
	var r result.Result
	rs.figures(r.Set)
	return r.Figures
}

func TestFiguresArePairedByRound(t *testing.T) {
	// The machine is twice as slow in the second round; the ratios of pairs do not notice.
	f := figuresOf(runs{
		pulled(1, top, overlayNVM, 10, 10, 0), pulled(1, top, hybrid, 10, 10.1, 10.2), pulled(1, top, overlayHDD, 12, 20.4, 0),
		pulled(2, top, hybrid, 20, 20.4, 20.2), pulled(2, top, overlayNVM, 20, 20, 0), pulled(2, top, overlayHDD, 24, 40.8, 0),
		pulled(3, top, overlayNVM, 40, 40, 0), // interrupted before its pair
	})
	require.InDelta(t, 1.02, f["durable_vs_nvm"], 1e-9, "the later of synced and reported counts")
	require.InDelta(t, 1.02, f["durable_vs_nvm_1g"], 1e-9)
	require.InDelta(t, 0.5, f["durable_vs_hdd_1g"], 1e-9)
	require.InDelta(t, 1.0, f["returns_vs_nvm"], 1e-9)
	require.InDelta(t, 0.6, f["nvm_saved_1g"], 1e-9)
	require.InDelta(t, -0.1, f["nvm_saved_1g.nvm"], 1e-9, "directories and blocks cost more than nothing")
	require.InDelta(t, 20, f["durable_s.nvm.top.1Gbit"], 1e-9)
	require.NotContains(t, f, "durable_vs_nvm_100m", "not measured")
	require.NotContains(t, f, "durable_vs_best_1g", "not measured")
	require.NotContains(t, f, "nvm_saved_1g.lass", "not measured")
	require.NotContains(t, f, "daemon_idle_rss_mb", "not measured")
}

func TestWorstCellIsShown(t *testing.T) {
	f := figuresOf(runs{
		pulled(1, top, overlayNVM, 10, 10, 0), pulled(1, top, hybrid, 10, 10, 10),
		pulled(1, bottom, overlayNVM, 10, 10, 0), pulled(1, bottom, hybrid, 13, 13, 13),
		pulled(2, bottom, overlayNVM, 10, 10, 0), pulled(2, bottom, hybrid, 11, 11, 11),
	})
	require.InDelta(t, 1.1, f["durable_vs_nvm"], 1e-9)
	require.InDelta(t, 1.2, f["durable_vs_nvm_worst"], 1e-9)
}

func TestEachLinkHasItsFigures(t *testing.T) {
	slow := func(r run) run {
		r.Link, r.LinkRate = "100Mbit", lab.LinkRate{Nominal: 12.5e6, One: 12.5e6, Three: 10e6}
		return r
	}
	f := figuresOf(runs{
		pulled(1, top, overlayNVMBest, 5, 5, 0), pulled(1, top, hybrid, 6, 6, 6), pulled(1, top, lass, 10, 10, 10),
		slow(pulled(1, top, overlayNVMBest, 10, 10, 0)), slow(pulled(1, top, hybrid, 8, 8, 8)),
	})
	require.InDelta(t, 1.2, f["durable_vs_best_1g"], 1e-9)
	require.InDelta(t, 0.8, f["durable_vs_best_100m"], 1e-9)
	require.InDelta(t, 2, f["durable_vs_best_1g.lass"], 1e-9)
	require.InDelta(t, 0.5, f["link_rate_1g"], 1e-9)
	require.InDelta(t, 1, f["link_rate_100m"], 1e-9)
	require.InDelta(t, 0.8, f["link_rate_three_100m"], 1e-9)
	require.InDelta(t, 8/(500/12.5e6), f["durable_vs_link_100m"], 1e-3)
	require.InDelta(t, 6/(500/62.5e6), f["durable_vs_link_1g"], 1e-3, "what the link let through counts, not what it was told to")
	require.InDelta(t, 5/(500/62.5e6), f["durable_vs_link_1g.nvm-best"], 1e-3)
}

func TestAnUnlimitedLinkIsNoMeasure(t *testing.T) {
	r := pulled(1, top, hybrid, 1, 1, 1)
	r.Link, r.LinkRate = "0", lab.LinkRate{}
	f := figuresOf(runs{r})
	require.NotContains(t, f, "durable_vs_link_unlimited")
	require.NotContains(t, f, "link_rate_unlimited")
	require.InDelta(t, 0.6, f["nvm_saved_unlimited"], 1e-9)
}

func TestCostsOfAPull(t *testing.T) {
	of := func(variant string, containerd, daemon float64, written int64) run {
		r := pulled(1, top, variant, 1, 1, 1)
		r.ContainerdCPUS, r.DaemonCPUS, r.HDDToDurable.WrittenBytes = containerd, daemon, written
		return r
	}
	f := figuresOf(runs{of(overlayNVM, 4, 0, 600), of(hybrid, 3, 2, 1500), of(overlayHDD, 4, 0, 3000)})
	require.InDelta(t, 1.25, f["cpu_vs_overlayfs"], 1e-9)
	require.InDelta(t, 1, f["write_amplification_hdd"], 1e-9)
	require.InDelta(t, 2, f["write_amplification_hdd.hdd"], 1e-9)
}

func TestMemoryIsTheWorstSeen(t *testing.T) {
	a, b := pulled(1, top, hybrid, 1, 1, 1), pulled(1, middle, hybrid, 1, 1, 1)
	a.DaemonSettled, a.DaemonIdle = &lab.Memory{RSS: 30e6, Peak: 40e6}, &lab.Memory{RSS: 20e6}
	b.DaemonSettled, b.DaemonIdle = &lab.Memory{RSS: 35e6, Peak: 50e6}, &lab.Memory{RSS: 25e6}
	b.WriteBack = &writeBack{Bytes: 100e6, Seconds: 4}
	f := figuresOf(runs{a, b})
	require.Equal(t, 25.0, f["daemon_idle_rss_mb"])
	require.Equal(t, 35.0, f["daemon_after_pull_rss_mb"])
	require.Equal(t, 50.0, f["daemon_peak_mb"])
	require.Equal(t, 25.0, f["write_back_mb_per_s"])
}

func TestPlanRotatesVariants(t *testing.T) {
	keys := plan(2, []string{top}, []string{"1Gbit"}, []string{overlayNVM, lass, hybrid})
	var order []string
	for _, k := range keys {
		order = append(order, k.Variant)
	}
	require.Equal(t, []string{overlayNVM, lass, hybrid, lass, hybrid, overlayNVM}, order)
	require.Equal(t, 2, keys[5].Round)
}

func TestEveryBaseIsAVariantOfOverlayfs(t *testing.T) {
	for _, b := range bases {
		v, ok := variantByName(b.variant)
		require.True(t, ok, b.name)
		require.False(t, v.Hybrid, b.name)
	}
}

func TestVariantsThatAreNotAskedFor(t *testing.T) {
	got, err := chosenVariants(nil)
	require.NoError(t, err)
	require.Equal(t, []string{overlayHDD, overlayNVM, overlayHDDBest, overlayNVMBest, hybrid, lass, allHDD, allNVM}, got)
	got, err = chosenVariants([]string{lassBest, overlayNVM})
	require.NoError(t, err)
	require.Equal(t, []string{overlayNVM, lassBest}, got)
}

func TestFileBytesAreThoseOfRegularFiles(t *testing.T) {
	img, err := image.Tiny(image.TinySpec{Layers: []int64{5000, 100}, Files: 3})
	require.NoError(t, err)
	sums, err := fileBytes(img)
	require.NoError(t, err)
	require.Equal(t, []int64{5000 + 2, 100 + 2}, sums, "two bytes are those of data/shared, which is in each layer")
}

func TestChoose(t *testing.T) {
	got, err := lab.Choose("image", []string{top, bottom}, imageNames)
	require.NoError(t, err)
	require.Equal(t, []string{bottom, top}, got)
	_, err = lab.Choose("image", []string{"toop"}, imageNames)
	require.ErrorContains(t, err, `unknown image "toop": choose from bottom, middle, top`)
	require.Equal(t, []string{bottom, middle, top}, imageNames, "the list itself stays")
}

func TestOptionsAreCheckedFirst(t *testing.T) {
	for flag, want := range map[string]string{
		"--size=tiny": "must be full or small", "--rounds=0": "at least 1", "--skip=pulls": `unknown part for --skip "pulls"`,
		"--capture-files=0": "at least 1", "--links=fast": "--links: rate",
	} {
		c := Command()
		c.SetArgs([]string{flag})
		require.ErrorContains(t, c.Execute(), want)
	}
}

func TestPrepareFiguresCompareNeighbours(t *testing.T) {
	var r result.Result
	prepareFigures(map[string]*preparation{
		"nhybrid":   {Prepare: []float64{2, 12, 3}, Mounts: []float64{1, 1, 1}, Remove: []float64{1, 1, 1}},
		"overlayfs": {Prepare: []float64{1, 11, 1}, Mounts: []float64{1, 1, 1}, Remove: []float64{1, 1, 1}},
	}, r.Set)
	require.Equal(t, 1.0, r.Figures["prepare_overhead_ms"])
	require.Equal(t, 3.0, r.Figures["prepare_ms.nhybrid"])
}

func TestCaptureKeys(t *testing.T) {
	var r result.Result
	captureFigures([]capture{{Files: 10_000, CaptureS: 1}, {Files: 100_000, RemoveS: 2, ViewBytes: 13e6}, {Files: 1_000_000, PeakRSSBytes: 5e8}, {Files: 1234, CaptureS: 4}}, r.Set)
	require.Equal(t, 1.0, r.Figures["capture_10k_s"])
	require.Equal(t, 2.0, r.Figures["remove_100k_s"])
	require.Equal(t, 130.0, r.Figures["view_bytes_per_file_100k"])
	require.Equal(t, 500.0, r.Figures["capture_1m_peak_mb"])
	require.Equal(t, 4.0, r.Figures["capture_1234_s"])
}

func TestHotFigures(t *testing.T) {
	var r result.Result
	hotFigures([]hotRun{{HotBytes: 100, InPlaceBytes: 90, StartS: 1, NVMStartS: 2}, {HotBytes: 100, InPlaceBytes: 100, StartS: 3, NVMStartS: 2}, {HotBytes: 100, InPlaceBytes: 100, StartS: 2, NVMStartS: 2}}, r.Set)
	require.Equal(t, 1.0, r.Figures["hot_in_place"])
	require.Equal(t, 1.0, r.Figures["first_start_after_pull_vs_nvm"])
	r = result.Result{}
	hotFigures(nil, r.Set)
	require.Empty(t, r.Figures, "not measured")
}

// modelled is a run of which the model is told everything: 1000 bytes of a layer, 500 compressed, over a link of 100 B/s.
func modelled(variant, link string, durable float64, nvm int64) run {
	r := pulled(1, top, variant, durable, durable, durable)
	r.Link, r.LinkRate = link, lab.LinkRate{Nominal: 100, One: 100, Three: 100}
	r.Layers = []layer{{Digest: "a", Compressed: 500, Data: 1000, ArrivedS: 5}}
	r.DaemonCPUS, r.DaemonWaitS, r.CPUs, r.NVMDataBytes = 1, 3, 2, nvm
	return r
}

func TestPredictionsAreHeldAgainstRuns(t *testing.T) {
	rs := runs{modelled(hybrid, "1Gbit", 10, 0), modelled(allNVM, "1Gbit", 10, 700), modelled(allHDD, "1Gbit", 5.2, 100),
		modelled(overlayNVM, "1Gbit", 10, 1000), pulled(1, top, lass, 1, 1, 1), modelled(allHDD, "100Mbit", 5.2, 250)}
	all, err := rs.predicted("drain")
	require.NoError(t, err)
	require.Len(t, all, 4, "neither overlayfs nor a run without CPU time")
	m, ok := machineOf(all[0].run)
	require.True(t, ok)
	require.Equal(t, machine{Unpack: 250, Cores: 8}, m, "it ran a quarter of the time in which it could have")
	for _, p := range all {
		require.InDelta(t, 5, p.model.Downloaded, 1e-9)
		require.InDelta(t, 5.2, p.model.Durable, 0.01, "and the commits of a blob and a layer")
	}
	require.EqualValues(t, 1000, all[1].model.NVMBytes)
	var r result.Result
	predictionFigures(all, r.Set)
	require.InDelta(t, 0.48, r.Figures["predicted_time_error_1g"], 0.01, "of 10, 10 and 5.2 s")
	require.InDelta(t, 0.1, r.Figures["predicted_nvm_error_1g"], 1e-9, "of 0, 0.3 and 0.1")
	require.InDelta(t, 0, r.Figures["predicted_time_error_100m"], 0.01)
	require.InDelta(t, 0.25, r.Figures["predicted_nvm_error_100m"], 1e-9)
	require.Len(t, predictionTable(all).Rows, 4)

	// The disk is as fast as it was for the pull that gave it most.
	slow := modelled(allHDD, "1Gbit", 150, 0)
	slow.HDDToDurable = lab.Counters{WrittenBytes: 1500, BusyMS: 150_000}
	fast := modelled(allNVM, "1Gbit", 5.2, 1000)
	fast.HDDToDurable = lab.Counters{WrittenBytes: 500, BusyMS: 1}
	all, err = runs{fast, slow}.predicted("drain")
	require.NoError(t, err)
	require.InDelta(t, 10, all[0].disk, 1e-9)
	require.InDelta(t, 10, all[1].disk, 1e-9)
	require.InDelta(t, 150, all[1].model.Durable, 1)
}
