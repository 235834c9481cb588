// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scm

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/nhybrid/nhybrid/integration/bench/result"
)

// figureOf are the workloads by the figure of the paper that they are, with the bytes that one operation moves where that is a measure.
var figureOf = []struct {
	workload, title string
	bytes           func(o *options) float64
}{
	{"update", "Figure 4: single updates of an array of integers, not synced", nil},
	{"update-sync", "Single updates of that array, each synced", nil},
	{"copy", "Figure 5: STREAM copy, not synced", func(o *options) float64 { return 16 * float64(o.stream) }},
	{"scale", "STREAM scale, not synced", func(o *options) float64 { return 16 * float64(o.stream) }},
	{"add", "STREAM add, not synced", func(o *options) float64 { return 24 * float64(o.stream) }},
	{"triad", "STREAM triad, not synced", func(o *options) float64 { return 24 * float64(o.stream) }},
	{"btree", "Figure 6: single inserts into a B-tree, not synced (Go: a thousand a transaction)", nil},
	{"tx10", "Figure 8: transactions of ten updates, all named in one call where the library can", nil},
	{"tx10-single", "Transactions of ten updates, each named by itself", nil},
	{"btree-tx", "Figure 9: B-tree insert transactions", nil},
	{"persist", "Persist of one cache line after another", nil},
}

// tables are one for each figure of the paper, with the durability of every row.
func (b *bench) tables(r *result.Result) {
	for _, f := range figureOf {
		t := result.Table{Title: f.title, Head: []string{"language", "where", "rate", "ns", "against host mapping", "granularity", "survives", "why"}}
		for _, s := range b.micros {
			if s.Workload != f.workload {
				continue
			}
			rate := perSecond(1e9 / s.median())
			if f.bytes != nil {
				rate = fmt.Sprintf("%.1f GB/s", f.bytes(b.options)/s.median())
			}
			base := s.Language + " host"
			if b.micros.get(f.workload, base) == nil {
				base = "Go host"
			}
			t.Rows = append(t.Rows, []string{
				s.Language, s.Contender, rate, result.Number(s.median()), result.Number(1 / b.micros.ratio(f.workload, s.Contender, base)), s.Granularity, s.Durability, s.Why,
			})
		}
		slices.SortStableFunc(t.Rows, func(a, b []string) int { return strings.Compare(a[0]+a[1], b[0]+b[1]) })
		r.Tables = append(r.Tables, t)
	}
	t := result.Table{Title: "Figure 7: Redis, requests a second", Head: []string{"heap", "set", "get", "lpush", "survives", "why"}}
	for _, s := range servers {
		row := []string{s.name}
		for _, test := range redisTests {
			if q := b.redis.get(test, s.name); q != nil {
				row = append(row, perSecond(1e9/q.median()))
			}
		}
		if len(row) == 1+len(redisTests) {
			t.Rows = append(t.Rows, append(row, b.redis.get(redisTests[0], s.name).Durability, s.why))
		}
	}
	r.Tables = append(r.Tables, t)
	if c := b.checks; c != nil {
		t := result.Table{Title: "Crash tests", Head: append([]string{"package", "passed", "seconds"}, checkKeys...)}
		for _, pkg := range slices.Sorted(maps.Keys(c.Counts)) {
			row := []string{pkg, fmt.Sprint(c.Passed[pkg]), fmt.Sprintf("%.0f", c.Took[pkg])}
			for _, k := range checkKeys {
				n, said := c.Counts[pkg][k]
				if said {
					row = append(row, fmt.Sprint(n))
				} else {
					row = append(row, "-")
				}
			}
			t.Rows = append(t.Rows, row)
		}
		r.Tables = append(r.Tables, t)
	}
}

// perSecond writes a rate with a prefix.
func perSecond(rate float64) string {
	switch {
	case rate >= 1e6:
		return fmt.Sprintf("%.2f M/s", rate/1e6)
	case rate >= 1e3:
		return fmt.Sprintf("%.1f k/s", rate/1e3)
	}
	return fmt.Sprintf("%.0f /s", rate)
}
