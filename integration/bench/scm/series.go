// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scm

import (
	"math"
	"math/rand/v2"
	"slices"

	"github.com/nhybrid/nhybrid/integration/bench/result"
)

// series is what one contender took for one workload: nanoseconds an operation, by round and slice. In a slice each contender of the workload has
// its turn; in a round all of them have new processes, containers, regions and files.
type series struct {
	Workload  string `json:"workload"`
	Contender string `json:"contender"`
	Language  string `json:"language"`
	Place     place  `json:"place"`
	// Granularity, Durability and Why are what the mapping or file really gave.
	Granularity string      `json:"granularity"`
	Durability  string      `json:"durability"`
	Why         string      `json:"why"`
	Mount       string      `json:"mount,omitempty"`
	N           int         `json:"n"` // operations in a slice
	NS          [][]float64 `json:"ns"`
}

// all are all values.
func (s *series) all() []float64 { return slices.Concat(s.NS...) }

func (s *series) median() float64 { return result.Median(s.all()) }

type table []*series

func (t table) get(workload, contender string) *series {
	for _, s := range t {
		if s.Workload == workload && s.Contender == contender {
			return s
		}
	}
	return nil
}

// ratio is the median over rounds of the median over slices of a's time against b's in the same slice; NaN where one was not measured.
func (t table) ratio(workload, a, b string) float64 {
	x, y := t.get(workload, a), t.get(workload, b)
	if x == nil || y == nil {
		return math.NaN()
	}
	return result.Median(rounds(x, y))
}

// rounds are the medians of the ratios of each round.
func rounds(x, y *series) (medians []float64) {
	for r := range min(len(x.NS), len(y.NS)) {
		var ratios []float64
		for i := range min(len(x.NS[r]), len(y.NS[r])) {
			ratios = append(ratios, x.NS[r][i]/y.NS[r][i])
		}
		if len(ratios) > 0 {
			medians = append(medians, result.Median(ratios))
		}
	}
	return medians
}

// turns is an order of contenders for one slice: by chance, but of each pair the second comes right before or after the first, as far as the pairs after it
// leave that: what disturbs the machine for a while then touches both.
func turns[T any](all []T, name func(T) string, rnd *rand.Rand, pairs ...[2]string) []T {
	order := slices.Clone(all)
	rnd.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
	at := func(n string) int { return slices.IndexFunc(order, func(c T) bool { return name(c) == n }) }
	for _, p := range pairs {
		if from := at(p[1]); from >= 0 && at(p[0]) >= 0 {
			second := order[from]
			order = slices.Delete(order, from, from+1)
			order = slices.Insert(order, at(p[0])+rnd.IntN(2), second)
		}
	}
	return order
}

// apart is how far a ratio is from 1, in either direction: 1.01 for 1.01 and for 1/1.01.
func apart(ratio float64) float64 { return max(ratio, 1/ratio) }

// least is the smallest number, NaN where there is none or one is missing.
func least(v ...float64) float64 {
	if len(v) == 0 {
		return math.NaN()
	}
	m := v[0]
	for _, x := range v {
		if math.IsNaN(x) {
			return x
		}
		m = min(m, x)
	}
	return m
}
