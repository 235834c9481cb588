// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/nhybrid/nhybrid/snapshotter/control"
	"github.com/nhybrid/nhybrid/snapshotter/operator"
)

// counters are what only grows.
type counters struct {
	placed *prometheus.CounterVec // bytes of files, by place
	layers *prometheus.CounterVec // by tier
}

func newCounters() counters {
	return counters{
		placed: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "nhybrid_placed_bytes_total", Help: "Bytes of files by the place that was chosen while they arrived: pack, nvm (a hole in the pack) or both.",
		}, []string{"place"}),
		layers: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "nhybrid_layers_placed_total", Help: "Layers stored from their blobs, by the tier that they need until their pack is whole.",
		}, []string{"tier"}),
	}
}

// Metrics describes the store to Prometheus.
func (s *Snapshotter) Metrics() prometheus.Collector {
	return operator.Metrics(s.operator(), s.metrics.placed, s.metrics.layers)
}

// Control answers what stands where, and why.
func (s *Snapshotter) Control() control.Backend { return operator.New(s.operator()) }

func (s *Snapshotter) operator() operator.Config {
	c := operator.Config{Store: s.store, Policy: s.config.Policy, Pulls: s.pulls, Hot: s.hot, HotConfig: s.config.Hot}
	if source, ok := s.config.Downloads.(operator.Source); ok {
		c.Source = source
	}
	return c
}
