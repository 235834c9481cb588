// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/log"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/placement/tier"
)

var (
	descFree      = prometheus.NewDesc("nhybrid_tier_free_bytes", "Free space of a tier's filesystem.", []string{"tier"}, nil)
	descTotal     = prometheus.NewDesc("nhybrid_tier_total_bytes", "Size of a tier's filesystem.", []string{"tier"}, nil)
	descBytes     = prometheus.NewDesc("nhybrid_layer_bytes", "Data of committed layers, by tier and by what stands there: only (this tier alone) or copy (on HDD too).", []string{"tier", "state"}, nil)
	descSnapshots = prometheus.NewDesc("nhybrid_snapshots", "Snapshots by kind.", []string{"kind"}, nil)
	descUnsynced  = prometheus.NewDesc("nhybrid_layers_not_durable", "Committed layers that a crash of the machine would cost.", nil, nil)
	descDamaged   = prometheus.NewDesc("nhybrid_layers_damaged", "Layers that have to be rebuilt from the content store.", nil, nil)
	descJobs      = prometheus.NewDesc("nhybrid_background_jobs", "Background work waiting or running.", nil, nil)
	descPulls     = prometheus.NewDesc("nhybrid_pulls", "Pulls that are running.", nil, nil)
)

// Metrics describes the store to Prometheus, read from the database at each scrape.
func (s *Snapshotter) Metrics() prometheus.Collector { return metrics{s} }

type metrics struct{ s *Snapshotter }

func (m metrics) Describe(c chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descFree, descTotal, descBytes, descSnapshots, descUnsynced, descDamaged, descJobs, descPulls} {
		c <- d
	}
	for _, d := range hotDescs {
		c <- d
	}
	m.s.placer.decisions.Describe(c)
	m.s.placer.swings.Describe(c)
}

func (m metrics) Collect(c chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		c <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	for _, t := range tier.Tiers {
		if free, total, err := m.s.tiers.Space(t); err == nil {
			gauge(descFree, float64(free), t.String())
			gauge(descTotal, float64(total), t.String())
		}
	}
	all, err := m.s.db.snapshots(context.Background())
	if err != nil {
		log.L.WithError(err).Error("cannot read the database for metrics")
		return
	}
	kinds := map[snapshots.Kind]int{snapshots.KindActive: 0, snapshots.KindCommitted: 0, snapshots.KindView: 0}
	var only [2]int64
	var copies int64
	unsynced, damaged := 0, 0
	for _, sn := range all {
		kinds[sn.Info.Kind]++
		if sn.Info.Kind != snapshots.KindCommitted {
			continue
		}
		switch {
		case sn.Damaged != "":
			damaged++
		case !sn.Durable:
			unsynced++
		}
		switch {
		case sn.Mixed:
			copies += sn.NVMBytes
			only[placement.HDD] += max(0, sn.Data-sn.NVMBytes)
		case sn.Tier == placement.NVM && sn.Home:
			copies += sn.Data
		default:
			only[sn.Tier] += sn.Data
		}
	}
	for k, n := range kinds {
		gauge(descSnapshots, float64(n), k.String())
	}
	gauge(descBytes, float64(only[placement.HDD]), "hdd", "only")
	gauge(descBytes, float64(only[placement.NVM]), "nvm", "only")
	gauge(descBytes, float64(copies), "nvm", "copy")
	gauge(descUnsynced, float64(unsynced))
	gauge(descDamaged, float64(damaged))
	gauge(descJobs, float64(m.s.jobs.length()))
	m.s.placer.mu.Lock()
	pulls := len(m.s.placer.pulls)
	m.s.placer.mu.Unlock()
	gauge(descPulls, float64(pulls))
	m.collectHot(c)
	m.s.placer.decisions.Collect(c)
	m.s.placer.swings.Collect(c)
}
