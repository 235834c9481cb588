// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scm

import (
	"math"
	"strings"

	"github.com/nhybrid/nhybrid/integration/bench/result"
)

var targets = []result.Target{
	{Figure: "container_vs_host_worst", Most: 1.01, What: "region in a container against region of the host, figures 4 to 7, the workload that is most apart"},
	{Figure: "persist_vs_asm", Most: 1.1, What: "persist of one line from Go against the bare instructions"},
	{Figure: "tx10_fences", Most: 3, What: "fences of a transaction of 10 updates"},
	{Figure: "tx10_vs_pmdk", Least: 2, What: "such transactions, times libpmemobj's rate"},
	{Figure: "tx10_vs_volume", Least: 10, What: "times the rate of a file on a volume"},
	{Figure: "tx10_vs_storage", Least: 100, What: "times the rate of a file in the container's storage"},
	{Figure: "btree_tx_vs_pmdk", Least: 1, What: "B-tree insert transactions, times libpmemobj's rate"},
	{Figure: "btree_tx_vs_bbolt", Least: 10, What: "times bbolt's rate"},
	{Figure: "redis_vs_dram", Least: 0.95, What: "Redis with its heap in a region, share of its rate on DRAM, the request that fares worst"},
	{Figure: "redis_vs_volume", Least: 2, What: "times its rate with the heap in a volume or storage file, the lesser"},
	{Figure: "states_failed", Most: 0, What: "persisted states that do not recover"},
	{Figure: "mutants_survived", Most: 0, What: "mutants that no test finds"},
	{Figure: "attach_ms", Most: 5, What: "start of a container with a region of 256 MB, above the same without"},
}

// fill makes figures and tables of what was measured.
func (b *bench) fill(r *result.Result) {
	m, q := b.micros, b.redis
	worst, where := math.NaN(), ""
	consider := func(name string, ratio float64) {
		if a := apart(ratio); !math.IsNaN(a) && (math.IsNaN(worst) || a > worst) {
			worst, where = a, name
		}
	}
	for _, op := range plainOps {
		for _, language := range []string{"C", "Go"} {
			ratio := m.ratio(op, language+" container", language+" host")
			r.Set("container_vs_host."+op+"."+strings.ToLower(language), ratio)
			consider(op+" in "+language, ratio)
		}
	}
	for _, test := range redisTests {
		ratio := q.ratio(test, "container", "host")
		r.Set("container_vs_host.redis_"+test, ratio)
		consider("Redis "+test, ratio)
	}
	r.Set("container_vs_host_worst", worst)
	if where != "" {
		r.Notes = append(r.Notes, "container_vs_host_worst is that of "+where)
	}
	r.Set("persist_vs_asm", m.ratio("persist", "Go host", "assembly"))
	b.transactions(r)
	b.redisFigures(r)
	for _, key := range checkKeys {
		if n, ok := b.checks.sum(key); ok {
			r.Set(key, float64(n))
		}
	}
	if total, ok := b.checks.sum("mutants_total"); ok {
		killed, _ := b.checks.sum("mutants_killed")
		r.Set("mutants_survived", float64(total-killed))
	}
	if a := b.attach; a != nil {
		r.Set("attach_ms", result.Median(a.differences(a.With)))
		r.Set("attach_hook_ms", result.Median(a.differences(a.Hook)))
		r.Set("create_ms.with", result.Median(a.With))
		r.Set("create_ms.hook", result.Median(a.Hook))
		r.Set("create_ms.without", result.Median(a.Without))
	}
	b.tables(r)
	r.Runs = map[string]any{"workloads": m, "redis": q, "attach": b.attach, "crash": b.checks}
}

// transactions sets how many times faster ours are in a container. Of several rivals of a kind the fastest counts; of our two languages that of the figure is Go's
// where only Go has the structure, and the slower one where both have it.
func (b *bench) transactions(r *result.Result) {
	m := b.micros
	ours := func(op, rival string) float64 {
		return least(m.ratio(op, rival, "C container"), m.ratio(op, rival, "Go container"))
	}
	r.Set("tx10_vs_pmdk", ours("tx10", "PMDK"))
	r.Set("tx10_vs_volume", least(ours("tx10", "C volume"), ours("tx10", "Go volume"), ours("tx10", "file volume")))
	r.Set("tx10_vs_storage", least(ours("tx10", "C storage"), ours("tx10", "Go storage"), ours("tx10", "file storage")))
	r.Set("btree_tx_vs_pmdk", least(ours("btree-tx", "PMDK"), ours("btree-tx", "PMDK wide")))
	r.Set("btree_tx_vs_bbolt", least(ours("btree-tx", "bbolt "+string(onMemory)), ours("btree-tx", "bbolt "+string(onFiles))))
	for _, op := range []string{"tx10", "btree-tx"} {
		key := strings.ReplaceAll(op, "-", "_")
		for _, s := range m {
			if s.Workload != op {
				continue
			}
			for _, language := range []string{"C", "Go"} {
				if s.Contender != language+" container" {
					name := strings.ToLower(strings.ReplaceAll(s.Contender, " ", "_"))
					r.Set(key+"_times."+name+"."+strings.ToLower(language), m.ratio(op, s.Contender, language+" container"))
				}
			}
		}
	}
}

func (b *bench) redisFigures(r *result.Result) {
	q := b.redis
	all := func(tests []string, rivals ...string) float64 {
		var v []float64
		for _, test := range tests {
			for _, rival := range rivals {
				v = append(v, q.ratio(test, rival, "container"))
			}
		}
		return least(v...)
	}
	r.Set("redis_vs_dram", all(redisTests, "dram"))
	r.Set("redis_vs_dram_same_allocator", all(redisTests, "dram preload"))
	r.Set("redis_vs_volume", all(redisTests, "volume", "storage"))
	r.Set("redis_vs_log", all([]string{"set", "lpush"}, "log on volume", "log in storage")) // get writes no log
	for _, test := range redisTests {
		for _, s := range q {
			if s.Workload == test {
				r.Set("redis_per_s."+test+"."+strings.ReplaceAll(s.Contender, " ", "_"), 1e9/s.median())
			}
		}
	}
}
