// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"
	"time"

	"github.com/nhybrid/nhybrid/cmd/internal/config"
	"github.com/nhybrid/nhybrid/hif"
	"github.com/nhybrid/nhybrid/hif/migrate"
	"github.com/nhybrid/nhybrid/hif/plan"
	"github.com/nhybrid/nhybrid/hif/profile"
)

// hot is the configuration of hot files as the manager takes it. hdd is a path on the HDD tier.
func hot(c config.Hot, hdd string, via profile.Via) *hif.Config {
	h := &hif.Config{
		Trace: c.Trace, Quiet: time.Duration(c.Quiet), Window: time.Duration(c.Window),
		Predict: hif.Prediction(c.Predict), Fetch: c.FetchProfiles,
		Migrate:   c.Migrate,
		Limits:    plan.Limits{High: float64(c.HighWatermark) / 100, Low: float64(c.LowWatermark) / 100},
		Engine:    migrate.Config{Rate: int64(c.Rate), Operations: c.Operations, HDD: hdd},
		PartsFrom: c.Parts.Bytes, Via: via,
	}
	for host := range strings.SplitSeq(c.PlainHTTP, ",") {
		if host = strings.TrimSpace(host); host != "" {
			h.PlainHTTP = append(h.PlainHTTP, host)
		}
	}
	return h
}
