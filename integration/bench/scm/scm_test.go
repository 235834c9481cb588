// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scm

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/integration/bench/result"
)

func TestRatioIsOfTheSameSlice(t *testing.T) {
	tab := table{
		// The second slice was disturbed for both; the second round is slower for a alone.
		{Workload: "w", Contender: "a", NS: [][]float64{{20, 200, 20}, {30, 30, 30}, {20, 20, 20}}},
		{Workload: "w", Contender: "b", NS: [][]float64{{10, 100, 10}, {10, 10, 10}, {10, 10, 10}}},
	}
	require.Equal(t, 2.0, tab.ratio("w", "a", "b"))
	require.Equal(t, 0.5, tab.ratio("w", "b", "a"))
	require.Equal(t, []float64{2, 3, 2}, rounds(tab[0], tab[1]))
	require.True(t, math.IsNaN(tab.ratio("w", "a", "none")))
	require.True(t, math.IsNaN(tab.ratio("other", "a", "b")))
	// An interrupted round counts as far as both have it.
	require.Equal(t, []float64{2}, rounds(&series{NS: [][]float64{{20, 90}, {1}}}, &series{NS: [][]float64{{10}}}))
}

func TestApart(t *testing.T) {
	require.InDelta(t, 1.25, apart(0.8), 1e-12)
	require.Equal(t, 1.25, apart(1.25))
	require.True(t, math.IsNaN(apart(math.NaN())))
	require.Equal(t, 1.0, least(2, 1, 3))
	require.True(t, math.IsNaN(least(2, math.NaN())), "a rival that is missing must not make the others the least")
	require.True(t, math.IsNaN(least()))
}

func TestTurns(t *testing.T) {
	all := []string{"a", "b", "c", "d", "e"}
	self := func(s string) string { return s }
	seen := map[string]bool{}
	for seed := range uint64(200) {
		order := turns(all, self, rand.New(rand.NewPCG(seed, 0)), [2]string{"b", "d"}, [2]string{"b", "none"})
		require.ElementsMatch(t, all, order)
		b, d := slices.Index(order, "b"), slices.Index(order, "d")
		require.True(t, b-d == 1 || d-b == 1, order)
		seen[strings.Join(order, "")] = true
	}
	require.Greater(t, len(seen), 40, "all 48 orders should come up")
	require.Equal(t, []string{"a", "b", "c", "d", "e"}, all)
}

func TestReadCounts(t *testing.T) {
	out := "    crash_test.go:239: states_enumerated=564914 states_failed=2 (of these 1); epochs 349\n" +
		"    mutation_test.go:96: mutants_total=39 mutants_killed=38\n    states_enumerated=6\n    other=7 xmutants_total=5\n"
	require.Equal(t, map[string]int{"states_enumerated": 564920, "states_failed": 2, "mutants_total": 39, "mutants_killed": 38}, readCounts([]byte(out)))
	require.Empty(t, readCounts([]byte("ok  	pkg	0.1s\n")))

	var none *checkRow
	_, ok := none.sum("mutants_total")
	require.False(t, ok)
	row := &checkRow{Counts: map[string]map[string]int{"a": {"states_failed": 0}, "b": {"states_failed": 3}}}
	n, ok := row.sum("states_failed")
	require.True(t, ok)
	require.Equal(t, 3, n)
	_, ok = row.sum("mutants_total")
	require.False(t, ok, "what no test has said is not 0")
}

func TestRequestRate(t *testing.T) {
	const out = `"test","rps","avg_latency_ms","min_latency_ms"` + "\n" + `"LPUSH","51020.41","0.5","0.1"` + "\n"
	rate, err := requestRate(strings.NewReader(out), "lpush")
	require.NoError(t, err)
	require.Equal(t, 51020.41, rate)
	_, err = requestRate(strings.NewReader(out), "set")
	require.ErrorContains(t, err, `no line for "set"`)
	_, err = requestRate(strings.NewReader(""), "set")
	require.ErrorContains(t, err, "nothing")
	_, err = requestRate(strings.NewReader(`"test","rps"`+"\n"+`"SET","-nan"`+"\n"), "set")
	require.ErrorContains(t, err, "requests a second")
}

func TestLibraries(t *testing.T) {
	const ldd = "\tlinux-vdso.so.1 (0x7ffc)\n\tlibm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x7f1)\n\t/lib64/ld-linux-x86-64.so.2 (0x7f2)\n\tgone.so => not found\n"
	require.Equal(t, []string{"/lib/x86_64-linux-gnu/libm.so.6", "/lib64/ld-linux-x86-64.so.2"}, libraries([]byte(ldd)))
}

func TestOtherCPUs(t *testing.T) {
	require.Equal(t, "0,2,3", otherCPUs(1, 4))
	require.Empty(t, otherCPUs(0, 1))
}

func TestLocated(t *testing.T) {
	require.Equal(t, []string{"--file", "/d/x", "5"}, located([]string{"--file", here + "/x", "5"}, "/d"))
}

func TestFlags(t *testing.T) {
	for args, want := range map[string]string{
		"--skip=redis,rest": `unknown part for --skip "rest"`, "--workloads=nothing": `unknown workload "nothing"`, "--rounds=0": "--rounds 0", "--huge=2m": "value of --huge",
		"--slice=1us": "--slice 1µs", "--cpu=-1": "--cpu -1", "--stream=20000000": "--stream 20000000",
	} {
		c := Command()
		c.SetArgs([]string{args})
		c.SetErr(io.Discard)
		c.SetOut(io.Discard)
		require.ErrorContains(t, c.Execute(), want, args)
	}
}

// full is a measurement in which everything of a container takes 10 ns and everything else 20, but what is said otherwise.
func full(b *bench, other map[string]float64) {
	b.options = &options{stream: 1000}
	b.stand = &stand{}
	ns := func(name string) [][]float64 {
		v, ok := other[name]
		if !ok {
			v = 20
		}
		return [][]float64{{v, v}, {v, v}}
	}
	b.options.cpu = 1
	for _, c := range b.contenders() {
		for _, op := range c.ops {
			b.micros = append(b.micros, &series{Workload: op, Contender: c.name, Language: c.language, Place: c.place, Durability: "process crash", NS: ns(c.name)})
		}
	}
	for _, s := range servers {
		for _, test := range redisTests {
			b.redis = append(b.redis, &series{Workload: test, Contender: s.name, Language: "C", Place: s.place, Durability: "volatile", NS: ns(s.name)})
		}
	}
	b.attach = &attachRow{With: []float64{45, 44, 46}, Hook: []float64{42, 41, 43}, Without: []float64{41, 40, 42}}
	b.checks = &checkRow{Counts: map[string]map[string]int{
		"scmlib":   {"states_enumerated": 10, "states_failed": 0, "mutants_total": 5, "mutants_killed": 5, "tx10_fences": 3},
		"scmlib/c": {"states_enumerated": 20, "states_failed": 0, "mutants_total": 6, "mutants_killed": 5},
	}}
}

func TestFigures(t *testing.T) {
	b := &bench{}
	full(b, map[string]float64{
		"C container": 10, "Go container": 10, "Go host": 10.5, "C host": 10, "assembly": 10, "PMDK": 25, "PMDK wide": 15, "file volume": 120, "C volume": 150, "Go volume": 150,
		"bbolt host memory file": 200, "container": 10, "host": 10, "dram": 9.8, "volume": 11, "storage": 12,
	})
	r := &result.Result{}
	b.fill(r)
	for key, want := range map[string]float64{
		"container_vs_host_worst": 1.05, "persist_vs_asm": 1.05, "tx10_fences": 3, "tx10_vs_pmdk": 2.5, "tx10_vs_volume": 12, "tx10_vs_storage": 2,
		"btree_tx_vs_pmdk": 1.5, "btree_tx_vs_bbolt": 2, "redis_vs_dram": 0.98, "redis_vs_volume": 1.1, "states_enumerated": 30, "states_failed": 0,
		"mutants_total": 11, "mutants_killed": 10, "mutants_survived": 1, "attach_ms": 4, "attach_hook_ms": 1,
	} {
		require.Contains(t, r.Figures, key)
		require.InDelta(t, want, r.Figures[key], 1e-9, key)
	}
	require.Contains(t, strings.Join(r.Notes, "\n"), "in Go")
	for _, g := range targets {
		require.Contains(t, r.Figures, g.Figure)
	}
	for _, tab := range r.Tables {
		require.NotEmpty(t, tab.Rows, tab.Title)
		for _, row := range tab.Rows {
			require.Len(t, row, len(tab.Head), tab.Title)
		}
	}
	// Every row of a workload says what it survives.
	for _, row := range r.Tables[0].Rows {
		require.Equal(t, "process crash", row[6])
	}

	d := xml.NewDecoder(bytes.NewReader(b.picture()))
	var err error
	for err == nil {
		_, err = d.Token()
	}
	require.True(t, errors.Is(err, io.EOF), "the picture is no XML: %v", err)
	require.Contains(t, string(b.picture()), "Figure 9")
}

func TestNothingMeasuredIsNoFigure(t *testing.T) {
	b := &bench{options: &options{}}
	r := &result.Result{}
	b.fill(r)
	require.Empty(t, r.Figures)
}
