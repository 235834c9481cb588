// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package link

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

const (
	one = "sha256:1111111111111111111111111111111111111111111111111111111111111111"
	two = "sha256:2222222222222222222222222222222222222222222222222222222222222222"
)

// serve puts a link in front of a server that has each blob of the map.
func serve(t *testing.T, o Options, blobs map[string][]byte) (*Link, string) {
	t.Helper()
	upstream := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		data, ok := blobs[r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:]]
		if !ok {
			http.NotFound(w, r)
			return
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data))
	}))
	t.Cleanup(upstream.Close)
	o.Upstream = strings.TrimPrefix(upstream.URL, "http://")
	l, err := New(o)
	require.NoError(t, err)
	front := httptest.NewServer(l)
	t.Cleanup(front.Close)
	t.Cleanup(func() { l.SetDown(true) }) // else Close waits for transfers that a failed test left held
	return l, front.URL
}

func get(t *testing.T, base, digest, byteRange string) ([]byte, error) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, base+"/v2/x/blobs/"+digest, nil)
	require.NoError(t, err)
	if byteRange != "" {
		req.Header.Set("Range", byteRange)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	return io.ReadAll(resp.Body)
}

func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestPassesBlobsAndRangesUnchanged(t *testing.T) {
	data := bytes.Repeat([]byte("0123456789"), 10000)
	l, base := serve(t, Options{}, map[string][]byte{one: data})
	got, err := get(t, base, one, "")
	require.NoError(t, err)
	require.Equal(t, data, got)
	got, err = get(t, base, one, "bytes=99990-")
	require.NoError(t, err)
	require.Equal(t, "0123456789", string(got))

	require.NoError(t, l.Await(within(t), func(rs []Request) bool { return len(rs) == 2 && !rs[1].End.IsZero() }))
	requests := l.Requests()
	require.Equal(t, one, requests[0].Digest)
	require.Equal(t, int64(len(data)), requests[0].Bytes)
	require.Equal(t, http.StatusPartialContent, requests[1].Status)
	require.Equal(t, "bytes=99990-", requests[1].Range)
	require.Equal(t, int64(10), requests[1].Bytes)
}

func TestRateIsALowerBound(t *testing.T) {
	data := make([]byte, 256<<10)
	_, base := serve(t, Options{Rate: 1 << 20}, map[string][]byte{one: data, two: data})
	start := time.Now()
	errs := make(chan error, 2)
	for _, digest := range []string{one, two} {
		go func() { _, err := get(t, base, digest, ""); errs <- err }()
	}
	require.NoError(t, <-errs)
	require.NoError(t, <-errs)
	// Half a mebibyte over a mebibyte a second. The wire may be slower than asked under load, never faster.
	require.GreaterOrEqual(t, time.Since(start), 500*time.Millisecond)
}

func TestHoldDecidesTheOrder(t *testing.T) {
	data := make([]byte, 100<<10)
	l, base := serve(t, Options{}, map[string][]byte{one: data, two: data})
	release := l.Hold(one, 50<<10)
	first := make(chan error, 1)
	go func() { _, err := get(t, base, one, ""); first <- err }()
	require.NoError(t, l.Await(within(t), Reached(one, 50<<10)))

	got, err := get(t, base, two, "")
	require.NoError(t, err)
	require.Len(t, got, len(data))
	require.NoError(t, l.Await(within(t), Done(two)))
	require.Equal(t, int64(50<<10), l.Requests()[0].Bytes, "the held blob stands where it was told to")
	require.False(t, Done(one)(l.Requests()))

	release()
	release()
	require.NoError(t, <-first)
	require.NoError(t, l.Await(within(t), Done(one)))
}

func TestCutBreaksAsOftenAsAskedAndResumes(t *testing.T) {
	data := bytes.Repeat([]byte("abcdefgh"), 10<<10)
	l, base := serve(t, Options{}, map[string][]byte{one: data})
	l.Cut(one, 1000, 2)
	for range 2 {
		got, err := get(t, base, one, "")
		require.ErrorIs(t, err, io.ErrUnexpectedEOF)
		require.Equal(t, data[:1000], got)
	}
	got, err := get(t, base, one, "")
	require.NoError(t, err)
	require.Equal(t, data, got)

	l.Cut(one, 1000, 1)
	got, err = get(t, base, one, "bytes=1001-")
	require.NoError(t, err, "what starts beyond the cut is not cut")
	require.Equal(t, data[1001:], got)
}

func TestDownBreaksRunningTransfersAndRefusesNewOnes(t *testing.T) {
	data := make([]byte, 100<<10)
	l, base := serve(t, Options{}, map[string][]byte{one: data})
	l.Hold(one, 10)
	result := make(chan error, 1)
	go func() { _, err := get(t, base, one, ""); result <- err }()
	require.NoError(t, l.Await(within(t), Reached(one, 10)))
	l.SetDown(true)
	require.Error(t, <-result)
	_, err := get(t, base, one, "")
	require.Error(t, err)

	l.SetDown(false)
	l.Cut(one, 0, 0) // takes the place of the hold
	_, err = get(t, base, one, "")
	require.NoError(t, err)
}

func TestAwaitEndsWithItsContext(t *testing.T) {
	l, _ := serve(t, Options{}, nil)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorIs(t, l.Await(ctx, Done(one)), context.Canceled)
}

func TestNewNeedsAnUpstream(t *testing.T) {
	_, err := New(Options{})
	require.ErrorContains(t, err, "Upstream")
}

func TestUpstreamGone(t *testing.T) {
	l, err := New(Options{Upstream: "127.0.0.1:1"})
	require.NoError(t, err)
	front := httptest.NewServer(l)
	defer front.Close()
	resp, err := http.Get(front.URL + "/v2/")
	require.NoError(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	require.Equal(t, http.StatusBadGateway, resp.StatusCode, string(body))
}
