// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/integration/bench/lab"
	"github.com/nhybrid/nhybrid/integration/bench/result"
)

func pulled(round int, image, variant string, returned, synced, reported float64) run {
	r := run{key: key{round, image, "1Gbit", variant}, ReturnS: returned, SyncedS: synced, ReportedS: reported, DataBytes: 1000}
	switch variant {
	case overlayNVM, overlayNVMParallel:
		r.NVMDataBytes, r.NVMUsedBytes = 1000, 2000
	case lass:
		r.NVMDataBytes, r.TreeBytes, r.NVMUsedBytes = 300, 100, 1000
	}
	return r
}

func figuresOf(rs runs) map[string]float64 {
	var r result.Result
	rs.figures("lass", r.Set)
	return r.Figures
}

func TestFiguresArePairedByRound(t *testing.T) {
	// The machine is twice as slow in the second round; the ratios of pairs do not notice.
	f := figuresOf(runs{
		pulled(1, top, overlayNVM, 10, 10, 0), pulled(1, top, lass, 10, 10.1, 10.2), pulled(1, top, overlayHDD, 12, 20.4, 0),
		pulled(2, top, lass, 20, 20.4, 20.2), pulled(2, top, overlayNVM, 20, 20, 0), pulled(2, top, overlayHDD, 24, 40.8, 0),
		pulled(3, top, overlayNVM, 40, 40, 0), // interrupted before its pair
	})
	require.InDelta(t, 1.02, f["durable_vs_nvm"], 1e-9, "the later of synced and reported counts")
	require.InDelta(t, 0.5, f["durable_vs_hdd"], 1e-9)
	require.InDelta(t, 1.0, f["returns_vs_nvm"], 1e-9)
	require.InDelta(t, 0.6, f["nvm_saved_sequential"], 1e-9, "the tree counts as NVM")
	require.InDelta(t, 0.5, f["nvm_saved_used_sequential"], 1e-9)
	require.InDelta(t, 20, f["durable_s.overlayfs-nvm.top.1Gbit"], 1e-9)
	require.NotContains(t, f, "nvm_saved_parallel", "not measured")
	require.NotContains(t, f, "daemon_idle_rss_mb", "not measured")
}

func TestWorstCellIsShown(t *testing.T) {
	f := figuresOf(runs{
		pulled(1, top, overlayNVM, 10, 10, 0), pulled(1, top, lass, 10, 10, 10),
		pulled(1, middle, overlayNVM, 10, 10, 0), pulled(1, middle, lass, 10, 12, 11),
		pulled(1, bottom, overlayNVM, 10, 10, 0), pulled(1, bottom, lass, 10, 10, 10),
	})
	require.InDelta(t, 1.0, f["durable_vs_nvm"], 1e-9)
	require.InDelta(t, 1.2, f["durable_vs_nvm_worst"], 1e-9)
	require.InDelta(t, 1.2, f["durable_vs_nvm.middle.1Gbit"], 1e-9)
}

func TestParallelHasItsOwnBaseline(t *testing.T) {
	f := figuresOf(runs{
		pulled(1, top, overlayNVM, 10, 10, 0), pulled(1, top, overlayNVMParallel, 5, 5, 0), pulled(1, top, lassParallel, 6, 6, 6),
	})
	require.InDelta(t, 1.2, f["durable_parallel_vs_nvm"], 1e-9)
}

func TestFiguresWithoutANameAreOfTheDefaultPolicy(t *testing.T) {
	rs := runs{pulled(1, top, overlayNVM, 10, 10, 0), pulled(1, top, lass, 12, 12, 12), pulled(1, top, drain, 10, 11, 10)}
	var r result.Result
	rs.figures("drain", r.Set)
	require.InDelta(t, 1.1, r.Figures["durable_vs_nvm"], 1e-9)
	require.InDelta(t, 1.1, r.Figures["durable_drain_vs_nvm"], 1e-9)
	require.InDelta(t, 1.2, r.Figures["durable_lass_vs_nvm"], 1e-9)
}

func TestMemoryIsTheWorstSeen(t *testing.T) {
	a, b := pulled(1, top, lass, 1, 1, 1), pulled(1, middle, lass, 1, 1, 1)
	a.DaemonAfter, a.DaemonIdle = &lab.Memory{RSS: 30e6, Peak: 40e6}, &lab.Memory{RSS: 20e6}
	b.DaemonAfter, b.DaemonIdle = &lab.Memory{RSS: 35e6, Peak: 50e6}, &lab.Memory{RSS: 25e6}
	b.WriteBack = &writeBack{Bytes: 100e6, Seconds: 4}
	f := figuresOf(runs{a, b})
	require.Equal(t, 25.0, f["daemon_idle_rss_mb"])
	require.Equal(t, 50.0, f["daemon_peak_rss_mb"])
	require.Equal(t, 25.0, f["write_back_mb_per_s"])
}

func TestPlanRotatesVariants(t *testing.T) {
	keys := plan(2, []string{top}, []string{"1Gbit"}, []string{overlayNVM, lass, drain})
	var order []string
	for _, k := range keys {
		order = append(order, k.Variant)
	}
	require.Equal(t, []string{overlayNVM, lass, drain, lass, drain, overlayNVM}, order)
	require.Equal(t, 2, keys[5].Round)
}

func TestEveryBaselineIsAVariant(t *testing.T) {
	for _, v := range variants {
		if v.Policy != "" {
			base, ok := variantByName(v.Baseline)
			require.True(t, ok, v.Name)
			require.Equal(t, v.Unpacks, base.Unpacks, v.Name)
			require.True(t, base.NVM, v.Name)
		}
	}
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
		"--capture-files=0": "at least 1",
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

func TestMetadataKeys(t *testing.T) {
	var r result.Result
	metadataFigures([]metadata{{Files: 10_000, CaptureS: 1}, {Files: 100_000, CaptureS: 2, BytesPerFile: 130}, {Files: 1_000_000, PeakRSSBytes: 5e8}, {Files: 1234, CaptureS: 4}}, r.Set)
	require.Equal(t, 1.0, r.Figures["capture_s_10k"])
	require.Equal(t, 2.0, r.Figures["capture_s_100k"])
	require.Equal(t, 130.0, r.Figures["tree_bytes_per_file"])
	require.Equal(t, 500.0, r.Figures["peak_rss_mb_1m"])
	require.Equal(t, 4.0, r.Figures["capture_s_1234"])
}
