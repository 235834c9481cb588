// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package result

import (
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestQuantile(t *testing.T) {
	v := []float64{4, 1, 3, 2}
	require.Equal(t, 2.5, Median(v))
	require.Equal(t, []float64{4, 1, 3, 2}, v, "the caller's order stays")
	require.Equal(t, 4.0, Quantile(v, 1))
	require.Equal(t, 1.0, Quantile(v, 0))
	require.InDelta(t, 3.85, Quantile(v, 0.95), 1e-9)
	require.Equal(t, 7.0, Median([]float64{7}))
	require.True(t, math.IsNaN(Median(nil)) && math.IsNaN(Mean(nil)))
	require.Equal(t, 2.5, Mean(v))
}

func TestWhatWasNotMeasuredHasNoKey(t *testing.T) {
	var r Result
	r.Set("none", math.NaN())
	r.Set("endless", math.Inf(1))
	r.Set("zero", 0)
	require.Equal(t, map[string]float64{"zero": 0}, r.Figures)
}

func TestWriteReadRender(t *testing.T) {
	r := &Result{
		Name: "trial", Command: "go run ./integration/bench trial", Figures: map[string]float64{"fast_s": 0.5, "slow_s": 12.345},
		Targets: []Target{
			{Figure: "fast_s", Most: 1, What: "fast"}, {Figure: "slow_s", Most: 12, What: "slow"}, {Figure: "missing_s", Most: 1, What: "missing"},
			{Figure: "slow_s", Least: 12, What: "not fast"},
		},
		Tables: []Table{{Title: "Times", Head: []string{"a", "b"}, Rows: [][]string{{"1", "2"}}}},
	}
	path, err := r.Write(filepath.Join(t.TempDir(), "out"))
	require.NoError(t, err)
	require.Equal(t, "trial.json", filepath.Base(path))
	read, err := Read(path)
	require.NoError(t, err)
	var b strings.Builder
	require.NoError(t, read.Markdown(&b))
	for _, line := range []string{
		"| fast (`fast_s`) | 0.500 | at most 1 | yes |", "| slow (`slow_s`) | 12.35 | at most 12 | no |",
		"| missing (`missing_s`) | not measured | at most 1 |  |", "| not fast (`slow_s`) | 12.35 | at least 12 | yes |",
		"| a | b |\n| --- | --- |\n| 1 | 2 |", "`go run ./integration/bench trial`",
	} {
		require.Contains(t, b.String(), line)
	}

	require.NoError(t, os.WriteFile(path, []byte(`{"figures": {}}`), 0o644))
	_, err = Read(path)
	require.ErrorContains(t, err, "no name")
}

func TestLogGoesOnAfterAnInterruption(t *testing.T) {
	type run struct{ N int }
	path := filepath.Join(t.TempDir(), "out", "raw.jsonl")
	log, runs, err := OpenLog[run](path)
	require.NoError(t, err)
	require.Empty(t, runs)
	require.NoError(t, log.Append(run{1}))
	require.NoError(t, log.Append(run{2}))
	require.NoError(t, log.Close())

	cut, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	require.NoError(t, err)
	_, err = cut.WriteString(`{"N":`)
	require.NoError(t, err)
	require.NoError(t, cut.Close())
	log, runs, err = OpenLog[run](path)
	require.NoError(t, err)
	require.Equal(t, []run{{1}, {2}}, runs)
	require.NoError(t, log.Append(run{3}))
	require.NoError(t, log.Close())
	log, runs, err = OpenLog[run](path)
	require.NoError(t, err)
	require.Equal(t, []run{{1}, {2}, {3}}, runs)
	require.NoError(t, log.Close())

	require.NoError(t, os.WriteFile(path, []byte("{\"N\":1}\nrubbish\n"), 0o644))
	_, _, err = OpenLog[run](path)
	require.ErrorContains(t, err, "line 2")
}

func TestNumber(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 5: "5", 0.12345: "0.123", 12.345: "12.35", 123.45: "123.5", 12345.6: "12346", -1.5: "-1.500"} {
		require.Equal(t, want, Number(v))
	}
}
