// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package operator

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/placement/tier"
)

var (
	descStarts    = prometheus.NewDesc("nhybrid_starts_total", "Starts of containers that were recorded in the profile of their image, by whether all events came through.", []string{"complete"}, nil)
	descOpen      = prometheus.NewDesc("nhybrid_starts_open", "Starts of containers that are being watched.", nil, nil)
	descOpens     = prometheus.NewDesc("nhybrid_start_opens_total", "Opens of files of layers by containers during their starts, by the tier that served them. NVM over all is the hit ratio.", []string{"tier"}, nil)
	descOverflows = prometheus.NewDesc("nhybrid_trace_overflows_total", "Overflows of the kernel's queue of events.", nil, nil)
	descLost      = prometheus.NewDesc("nhybrid_trace_lost_total", "Events that were lost otherwise.", nil, nil)
	descMoved     = prometheus.NewDesc("nhybrid_migrated_bytes_total", "Bytes of files that left NVM (down) or came up (up).", []string{"direction"}, nil)
	descMovedN    = prometheus.NewDesc("nhybrid_migrated_files_total", "Files that left NVM (down) or came up (up).", []string{"direction"}, nil)
	descBacklog   = prometheus.NewDesc("nhybrid_migration_backlog_bytes", "Bytes that the present plan has still to move.", []string{"direction"}, nil)
	descMoveFails = prometheus.NewDesc("nhybrid_migration_failures_total", "Moves that failed and were or will be tried again.", nil, nil)
	descPinned    = prometheus.NewDesc("nhybrid_nvm_pinned_bytes", "Bytes that left NVM but are still held by somebody who has the file open.", nil, nil)
	descSpace     = prometheus.NewDesc("nhybrid_tier_bytes", "What takes the space of a tier.", []string{"tier", "kind"}, nil)
)

var hotDescs = []*prometheus.Desc{descStarts, descOpen, descOpens, descOverflows, descLost, descMoved, descMovedN, descBacklog, descMoveFails, descPinned, descSpace}

// collectHot sends the metrics of hot files; without a manager the space alone.
func (m metrics) collectHot(c chan<- prometheus.Metric) {
	send := func(d *prometheus.Desc, t prometheus.ValueType, v float64, labels ...string) {
		c <- prometheus.MustNewConstMetric(d, t, v, labels...)
	}
	space := m.b.space()
	for _, t := range tier.Tiers {
		for _, k := range space[t] {
			send(descSpace, prometheus.GaugeValue, float64(k.Bytes), t.String(), k.Kind)
		}
	}
	if m.b.hot == nil {
		return
	}
	starts, incomplete := m.b.hot.Recorded()
	send(descStarts, prometheus.CounterValue, float64(starts-incomplete), "yes")
	send(descStarts, prometheus.CounterValue, float64(incomplete), "no")
	if st, err := m.b.hot.Stats(); err == nil {
		send(descOpen, prometheus.GaugeValue, float64(st.Open))
		send(descOpens, prometheus.CounterValue, float64(st.Opens[placement.NVM]), "nvm")
		send(descOpens, prometheus.CounterValue, float64(st.Opens[placement.HDD]), "hdd")
		send(descOverflows, prometheus.CounterValue, float64(st.Overflows))
		send(descLost, prometheus.CounterValue, float64(st.Lost))
	}
	engine := m.b.hot.Engine()
	if engine == nil {
		return
	}
	p, st := engine.Progress(), engine.Stats()
	send(descMoved, prometheus.CounterValue, float64(st.Down.Bytes), "down")
	send(descMoved, prometheus.CounterValue, float64(st.Up.Bytes), "up")
	send(descMovedN, prometheus.CounterValue, float64(st.Down.Files), "down")
	send(descMovedN, prometheus.CounterValue, float64(st.Up.Files), "up")
	send(descBacklog, prometheus.GaugeValue, float64(p.Down.Left.Bytes), "down")
	send(descBacklog, prometheus.GaugeValue, float64(p.Up.Left.Bytes), "up")
	send(descMoveFails, prometheus.CounterValue, float64(st.Failures))
	send(descPinned, prometheus.GaugeValue, float64(p.Pinned))
}
