// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package operator

import (
	"context"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/log"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/placement/tier"
	"github.com/nhybrid/nhybrid/snapshotter/store"
)

var (
	descFree      = prometheus.NewDesc("nhybrid_tier_free_bytes", "Free space of a tier's filesystem.", []string{"tier"}, nil)
	descTotal     = prometheus.NewDesc("nhybrid_tier_total_bytes", "Size of a tier's filesystem.", []string{"tier"}, nil)
	descInodes    = prometheus.NewDesc("nhybrid_tier_free_inodes", "Free inodes of a tier's filesystem; no sample where it has no limit.", []string{"tier"}, nil)
	descAllInodes = prometheus.NewDesc("nhybrid_tier_total_inodes", "Inodes of a tier's filesystem; no sample where it has no limit.", []string{"tier"}, nil)
	descBytes     = prometheus.NewDesc("nhybrid_layer_bytes", "Data of committed layers, by tier and by what stands there: only (this tier alone) or copy (on HDD too).", []string{"tier", "state"}, nil)
	descSnapshots = prometheus.NewDesc("nhybrid_snapshots", "Snapshots by kind.", []string{"kind"}, nil)
	descUnsynced  = prometheus.NewDesc("nhybrid_layers_not_durable", "Committed layers that a crash of the machine would cost.", nil, nil)
	descDamaged   = prometheus.NewDesc("nhybrid_layers_damaged", "Layers that have to be rebuilt from the content store.", nil, nil)
	descJobs      = prometheus.NewDesc("nhybrid_background_jobs", "Background work waiting or running.", nil, nil)
	descPulls     = prometheus.NewDesc("nhybrid_pulls", "Pulls that are running.", nil, nil)
)

// Metrics describes the store to Prometheus, read anew at each scrape, and hands on others' counters.
func Metrics(c Config, counters ...prometheus.Collector) prometheus.Collector {
	return metrics{newBackend(c), counters}
}

type metrics struct {
	b        backend
	counters []prometheus.Collector
}

func (m metrics) Describe(c chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descFree, descTotal, descInodes, descAllInodes, descBytes, descSnapshots, descUnsynced, descDamaged, descJobs, descPulls} {
		c <- d
	}
	for _, d := range hotDescs {
		c <- d
	}
	for _, n := range m.counters {
		n.Describe(c)
	}
}

func (m metrics) Collect(c chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		c <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	for _, t := range tier.Tiers {
		room, err := m.b.store.Room(t)
		if err != nil {
			continue
		}
		gauge(descFree, float64(room.Free), t.String())
		gauge(descTotal, float64(room.Total), t.String())
		if room.Inodes > 0 {
			gauge(descInodes, float64(room.InodesFree), t.String())
			gauge(descAllInodes, float64(room.Inodes), t.String())
		}
	}
	all, err := m.b.store.Entries(context.Background())
	if err != nil {
		log.L.WithError(err).Error("cannot read the database for metrics")
		return
	}
	kinds := map[snapshots.Kind]int{snapshots.KindActive: 0, snapshots.KindCommitted: 0, snapshots.KindView: 0}
	for _, sn := range all {
		kinds[sn.Info.Kind]++
	}
	var only [2]int64
	var copies int64
	unsynced, damaged := 0, 0
	for _, l := range m.b.store.Layers() {
		switch {
		case l.Damaged != "":
			damaged++
		case l.State == store.Staged || l.State == store.Stored:
			unsynced++
		}
		b := l.Bytes()
		only[placement.HDD] += b[placement.HDD]
		if l.State == store.Home {
			copies += b[placement.NVM]
		} else {
			only[placement.NVM] += b[placement.NVM]
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
	gauge(descJobs, float64(m.b.store.Work().Background))
	gauge(descPulls, float64(m.b.pulls.Count()))
	m.collectHot(c)
	for _, n := range m.counters {
		n.Collect(c)
	}
}
