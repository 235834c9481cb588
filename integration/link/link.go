// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package link is a network link to a registry: an HTTP reverse proxy whose bandwidth and latency are set, and on
// which single blobs can be held back or cut off, so that a test decides the order in which layers arrive.
package link

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httputil"
	"net/url"
	"regexp"
	"sync"
	"time"
)

// chunk is how much of a body passes at a time. Small enough that connections interleave on a 100 Mbit/s link
// (1.3 ms each), large enough not to cost CPU on a fast one.
const chunk = 16 << 10

// errCut ends a body in mid-transfer; the client sees a connection that broke.
var errCut = errors.New("cut by the test")

var digestInPath = regexp.MustCompile(`/(?:blobs|manifests)/(sha256:[0-9a-f]{64})$`)

// Options of a link. The zero value of each means: no limit, no delay.
type Options struct {
	// Upstream is the registry, "host:port".
	Upstream string
	// Rate is the bandwidth of all bodies from the registry together, in bytes a second. 100 Mbit/s is 12.5e6.
	Rate float64
	// Latency passes before each response.
	Latency time.Duration
}

// Request is what the link has seen of one request.
type Request struct {
	Method string
	Path   string
	// Digest is that of the blob or manifest asked for, "" for anything else.
	Digest string
	// Range is the header of that name: clients that resume send one.
	Range  string
	Status int
	// Bytes of the body passed on so far.
	Bytes int64
	Start time.Time
	// End is zero while the transfer runs.
	End time.Time
}

// Link is an http.Handler. All methods may be called at any time, from any goroutine.
type Link struct {
	proxy *httputil.ReverseProxy
	wire  wire

	mu       sync.Mutex
	latency  time.Duration
	down     bool
	epoch    chan struct{} // closed by SetDown(true): ends every running transfer
	rules    map[string]*rule
	requests []*Request
	changed  chan struct{} // closed and replaced when a request starts, proceeds or ends
}

// rule is what is to happen to a blob beyond some byte.
type rule struct {
	offset int64
	gate   chan struct{} // not nil: wait until closed
	cuts   int           // transfers still to be cut at offset
}

// New makes a link to the registry.
func New(o Options) (*Link, error) {
	if o.Upstream == "" {
		return nil, errors.New("link: Options.Upstream is empty; it must be the registry's host:port")
	}
	l := &Link{
		wire:    wire{rate: o.Rate},
		latency: o.Latency,
		epoch:   make(chan struct{}),
		rules:   map[string]*rule{},
		changed: make(chan struct{}),
	}
	upstream := &url.URL{Scheme: "http", Host: o.Upstream}
	l.proxy = &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(upstream) },
		// Each chunk goes out when it has been paid for, not when a buffer is full.
		FlushInterval:  -1,
		ModifyResponse: l.wrap,
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) {
			http.Error(w, fmt.Sprintf("link: %v", err), http.StatusBadGateway)
		},
		// An aborted transfer is what tests ask for; they read it from Requests.
		ErrorLog: log.New(io.Discard, "", 0),
	}
	return l, nil
}

// SetRate changes the bandwidth (bytes a second, 0: no limit) for chunks that are not yet on the wire.
func (l *Link) SetRate(bytesPerSecond float64) { l.wire.setRate(bytesPerSecond) }

// SetLatency changes what passes before each response.
func (l *Link) SetLatency(d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.latency = d
}

// SetDown breaks every running transfer and refuses new ones (true), or serves again (false).
func (l *Link) SetDown(down bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if down && !l.down {
		close(l.epoch)
		l.epoch = make(chan struct{})
	}
	l.down = down
}

// Hold lets transfers of the blob pass up to byte offset and no further until release is called. Calling release
// again does nothing. A later Hold or Cut of the same blob takes the place of this one and releases it.
func (l *Link) Hold(digest string, offset int64) (release func()) {
	r := &rule{offset: offset, gate: make(chan struct{})}
	l.setRule(digest, r)
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.rules[digest] == r {
			delete(l.rules, digest)
			close(r.gate)
		}
	}
}

// Cut breaks the connection of the next times transfers of the blob at byte offset of the blob. A resumed transfer
// that starts beyond offset passes.
func (l *Link) Cut(digest string, offset int64, times int) {
	l.setRule(digest, &rule{offset: offset, cuts: times})
}

func (l *Link) setRule(digest string, r *rule) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if old := l.rules[digest]; old != nil && old.gate != nil {
		close(old.gate)
	}
	l.rules[digest] = r
}

// Requests returns a copy of all requests so far, in the order of their start.
func (l *Link) Requests() []Request {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.copyRequests()
}

func (l *Link) copyRequests() []Request {
	out := make([]Request, len(l.requests))
	for i, r := range l.requests {
		out[i] = *r
	}
	return out
}

// Await waits until the requests satisfy the condition, which it calls with a copy after each change.
func (l *Link) Await(ctx context.Context, condition func([]Request) bool) error {
	for {
		l.mu.Lock()
		seen, changed := l.copyRequests(), l.changed
		l.mu.Unlock()
		if condition(seen) {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("await requests on the link: %w", ctx.Err())
		}
	}
}

// Done is a condition for Await: the blob has been passed on whole.
func Done(digest string) func([]Request) bool {
	return func(requests []Request) bool {
		for _, r := range requests {
			if r.Digest == digest && r.Method == http.MethodGet && !r.End.IsZero() && r.Status < 300 {
				return true
			}
		}
		return false
	}
}

// Reached is a condition for Await: at least n bytes of the blob have been passed on in one transfer.
func Reached(digest string, n int64) func([]Request) bool {
	return func(requests []Request) bool {
		for _, r := range requests {
			if r.Digest == digest && r.Method == http.MethodGet && r.Status != 0 && r.Bytes >= n {
				return true
			}
		}
		return false
	}
}

// update changes a request's record and wakes those who wait for one.
func (l *Link) update(change func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	change()
	close(l.changed)
	l.changed = make(chan struct{})
}

type recordKey struct{}

// ServeHTTP passes the request on.
func (l *Link) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	record := &Request{
		Method: req.Method, Path: req.URL.Path, Range: req.Header.Get("Range"), Start: time.Now(),
	}
	if m := digestInPath.FindStringSubmatch(req.URL.Path); m != nil {
		record.Digest = m[1]
	}
	var down bool
	var latency time.Duration
	var epoch chan struct{}
	l.update(func() {
		l.requests = append(l.requests, record)
		down, latency, epoch = l.down, l.latency, l.epoch
	})
	defer l.update(func() { record.End = time.Now() })
	if down {
		panic(http.ErrAbortHandler)
	}

	ctx, cancel := context.WithCancelCause(req.Context())
	defer cancel(nil)
	go func() {
		select {
		case <-epoch:
			cancel(errCut)
		case <-ctx.Done():
		}
	}()
	if sleepUntil(ctx, record.Start.Add(latency)) != nil {
		panic(http.ErrAbortHandler)
	}
	l.proxy.ServeHTTP(w, req.WithContext(context.WithValue(ctx, recordKey{}, record)))
}

// wrap puts the meter into the body of a response.
func (l *Link) wrap(resp *http.Response) error {
	record, ok := resp.Request.Context().Value(recordKey{}).(*Request)
	if !ok {
		return errors.New("response to a request that did not come through the link")
	}
	l.update(func() { record.Status = resp.StatusCode })
	resp.Body = &body{
		ReadCloser: resp.Body, link: l, record: record, ctx: resp.Request.Context(), at: rangeStart(resp), flow: flow{wire: &l.wire},
	}
	return nil
}

// rangeStart is the first byte of the blob that a response carries.
func rangeStart(resp *http.Response) int64 {
	var first int64
	if _, err := fmt.Sscanf(resp.Header.Get("Content-Range"), "bytes %d-", &first); err != nil {
		return 0
	}
	return first
}

// body is a response body that waits for the wire and obeys the rule of its blob.
type body struct {
	io.ReadCloser
	link   *Link
	record *Request
	ctx    context.Context
	at     int64 // offset in the blob of the next byte
	flow   flow
}

func (b *body) Read(p []byte) (int, error) {
	limit, err := b.allowed()
	if err != nil {
		return 0, err
	}
	p = p[:min(int64(len(p)), limit, chunk)]
	n, err := b.ReadCloser.Read(p)
	if n > 0 {
		if waitErr := sleepUntil(b.ctx, b.flow.send(time.Now(), n)); waitErr != nil {
			return 0, fmt.Errorf("send chunk: %w", waitErr)
		}
		b.at += int64(n)
		b.link.update(func() { b.record.Bytes += int64(n) })
	}
	return n, err
}

// allowed says how many bytes may pass before the rule of the blob has to be looked at again. It waits at a gate.
func (b *body) allowed() (int64, error) {
	for {
		b.link.mu.Lock()
		r := b.link.rules[b.record.Digest]
		if r == nil || b.record.Digest == "" || b.at > r.offset || (r.gate == nil && r.cuts == 0) {
			b.link.mu.Unlock()
			return chunk, nil
		}
		if b.at < r.offset {
			b.link.mu.Unlock()
			return r.offset - b.at, nil
		}
		if r.gate == nil {
			r.cuts--
			b.link.mu.Unlock()
			return 0, errCut
		}
		gate := r.gate
		b.link.mu.Unlock()
		select {
		case <-gate:
		case <-b.ctx.Done():
			return 0, b.ctx.Err()
		}
	}
}
