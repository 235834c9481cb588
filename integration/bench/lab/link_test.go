// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bytes"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/integration/bench/result"
)

func TestFetchRateTakesTheSameBytesOverEachConnection(t *testing.T) {
	var mu sync.Mutex
	clients, ranges := map[string]bool{}, map[string]int{}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		clients[r.RemoteAddr], ranges[r.Header.Get("Range")] = true, ranges[r.Header.Get("Range")]+1
		mu.Unlock()
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(make([]byte, 1000)))
	}))
	defer server.Close()
	rate, err := fetchRate(t.Context(), server.URL, 300, 3)
	require.NoError(t, err)
	require.Positive(t, rate)
	require.Len(t, clients, 3)
	require.Equal(t, map[string]int{"bytes=0-299": 3}, ranges)

	_, err = fetchRate(t.Context(), server.URL, 2000, 1)
	require.ErrorContains(t, err, "1000 of 2000 bytes")
}

func TestFetchRateRefusesWhatIsNotTheRange(t *testing.T) {
	server := httptest.NewServer(http.NotFoundHandler())
	defer server.Close()
	_, err := fetchRate(t.Context(), server.URL, 10, 1)
	require.ErrorContains(t, err, "404")
}

func TestLinkFigures(t *testing.T) {
	for rate, suffix := range map[float64]string{12.5e6: "100m", 25e6: "200m", 125e6: "1g", 312.5e6: "2.5g", 1.25e6: "10m", 0: "unlimited"} {
		require.Equal(t, suffix, LinkSuffix(rate))
	}
	var r result.Result
	LinkFigures([]LinkRate{
		{Nominal: 12.5e6, One: 12.5e6, Three: 10e6}, {}, {Nominal: 12.5e6, One: 10e6, Three: 11.25e6},
		{Nominal: 12.5e6, One: 11.25e6, Three: 12.5e6}, {Nominal: 125e6, One: 100e6, Three: 125e6},
	}, r.Set)
	require.InDelta(t, 0.9, r.Figures["link_rate_100m"], 1e-9)
	require.InDelta(t, 0.9, r.Figures["link_rate_three_100m"], 1e-9)
	require.InDelta(t, 0.8, r.Figures["link_rate_1g"], 1e-9)
	require.Len(t, r.Figures, 4, "an unlimited link has no figure")
}
