// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sync/errgroup"

	"github.com/nhybrid/nhybrid/integration/bench/result"
	"github.com/nhybrid/nhybrid/integration/rig"
)

// LinkRate is what a link really let through, in bytes a second, over all connections of a measurement. The zero value
// was not measured.
type LinkRate struct {
	// Nominal is what the link was told to let through.
	Nominal float64 `json:"nominal"`
	// One connection, and three at once, as many as containerd downloads layers over.
	One   float64 `json:"one"`
	Three float64 `json:"three"`
}

// measured is about how long one measurement lasts.
const measured = time.Second

// MeasureLink fetches the beginning of the largest layer of an image over a rig's link: by one connection, then by three.
// The image is in the rig's registry under the name ("repository:tag"). A link without a limit (rate 0) is not measured.
func MeasureLink(ctx context.Context, g *rig.Rig, name string, layers []v1.Descriptor, rate float64) (r LinkRate, err error) {
	if rate <= 0 || len(layers) == 0 {
		return r, nil
	}
	r.Nominal = rate
	largest := layers[0]
	for _, l := range layers[1:] {
		if l.Size > largest.Size {
			largest = l
		}
	}
	url := "http://" + g.BlobPath(name, largest.Digest.String())
	for connections, got := range map[int]*float64{1: &r.One, 3: &r.Three} {
		n := min(largest.Size, int64(rate*measured.Seconds())/int64(connections))
		if *got, err = fetchRate(ctx, url, n, connections); err != nil {
			return LinkRate{}, fmt.Errorf("measure link: %w", err)
		}
	}
	return r, nil
}

// fetchRate fetches the first n bytes of a blob by each of several new connections at once.
func fetchRate(ctx context.Context, url string, n int64, connections int) (bytesPerSecond float64, err error) {
	transport := &http.Transport{DisableKeepAlives: true}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport}
	start := time.Now()
	group, ctx := errgroup.WithContext(ctx)
	for range connections {
		group.Go(func() error {
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
			if err != nil {
				return err
			}
			req.Header.Set("Range", fmt.Sprintf("bytes=0-%d", n-1))
			resp, err := client.Do(req)
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			if resp.StatusCode != http.StatusPartialContent {
				return fmt.Errorf("fetch %q: %s", url, resp.Status)
			}
			if got, err := io.Copy(io.Discard, resp.Body); err != nil || got != n {
				return fmt.Errorf("fetch %q: %d of %d bytes: %w", url, got, n, err)
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return 0, err
	}
	return float64(n) * float64(connections) / time.Since(start).Seconds(), nil
}

// LinkSuffix names a bandwidth (bytes a second) at the end of a figure: "100m" for 100 Mbit/s, "1g" for 1 Gbit/s.
func LinkSuffix(rate float64) string {
	bits := rate * 8
	switch {
	case bits <= 0:
		return "unlimited"
	case bits >= 1e9:
		return strconv.FormatFloat(bits/1e9, 'f', -1, 64) + "g"
	default:
		return strconv.FormatFloat(bits/1e6, 'f', -1, 64) + "m"
	}
}

// LinkFigures sets what fraction of each bandwidth one connection and three really had: medians of its measurements.
func LinkFigures(measurements []LinkRate, set func(string, float64)) {
	one, three := map[float64][]float64{}, map[float64][]float64{}
	for _, m := range measurements {
		if m.Nominal > 0 {
			one[m.Nominal] = append(one[m.Nominal], m.One/m.Nominal)
			three[m.Nominal] = append(three[m.Nominal], m.Three/m.Nominal)
		}
	}
	for rate := range one {
		set("link_rate_"+LinkSuffix(rate), result.Median(one[rate]))
		set("link_rate_three_"+LinkSuffix(rate), result.Median(three[rate]))
	}
}
