// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hddsim

import (
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestNext(t *testing.T) {
	at := func(offs ...int64) (all []*request) {
		for _, off := range offs {
			all = append(all, &request{op: write, off: off, n: 100})
		}
		return all
	}
	flushing := &request{op: flush}
	for name, test := range map[string]struct {
		waiting []*request
		run     int
		want    int
		follows bool
	}{
		"the oldest":                        {at(5000, 9000), 0, 0, false},
		"what continues the stream":         {at(5000, 1000), 0, 1, true},
		"the nearest ahead":                 {at(1200, 1100, 1000), 0, 2, true},
		"not behind":                        {at(5000, 900), 0, 0, false},
		"at the edge of the gap":            {at(5000, 1500), 0, 1, true},
		"beyond the gap":                    {at(5000, 1501), 0, 0, false},
		"a long stream lets the oldest in":  {at(5000, 1000), batch, 0, false},
		"a long stream that is alone":       {at(1000, 5000), batch, 0, true},
		"a flush has no place on the disk":  {[]*request{flushing, at(1000)[0]}, 0, 1, true},
		"a flush is served when it is time": {[]*request{flushing, at(9000)[0]}, 0, 0, false},
	} {
		t.Run(name, func(t *testing.T) {
			got, follows := next(test.waiting, 1000, 500, test.run)
			require.Equal(t, test.want, got)
			require.Equal(t, test.follows, follows)
		})
	}
}

// TestOvertaken has the requests of one stream arrive out of order.
func TestOvertaken(t *testing.T) {
	t0 := time.Unix(1000, 0)
	h := &head{model: Model{WriteSeek: 4 * time.Millisecond, WriteRate: 1e6, Gap: 4000}, busy: t0}
	for _, step := range []struct {
		off, n, seeks int64
		want          time.Duration
	}{
		{0, 1000, 0, 1 * time.Millisecond},
		{2000, 1000, 0, 3 * time.Millisecond}, // has overtaken the next
		{1000, 1000, 0, 3 * time.Millisecond}, // which the head passed over then
		{3000, 1000, 0, 4 * time.Millisecond},
		{1000, 1000, 1, 9 * time.Millisecond}, // written once more: it has to go back
		{4000, 1000, 1, 12 * time.Millisecond},
		{2500, 200, 1, 12 * time.Millisecond}, // a part of what was passed
		{2700, 100, 1, 12 * time.Millisecond}, // and of the rest
		{2500, 200, 2, 16*time.Millisecond + 200*time.Microsecond},
	} {
		require.Equal(t, step.want, h.write(t0, step.off, step.n).Sub(t0), "write at %d", step.off)
		require.Equal(t, step.seeks, h.seekCount(), "write at %d", step.off)
	}
	// What many others have left behind is forgotten.
	h = &head{model: h.model, busy: t0}
	for i := range int64(passedMax + 1) {
		h.write(t0, i*2000+1000, 1000)
	}
	h.write(t0, 0, 1000)
	require.EqualValues(t, 1, h.seekCount())
}

// TestOneStreamDoesNotSeek writes one large file, which the kernel hands over as hundreds of requests on several threads.
func TestOneStreamDoesNotSeek(t *testing.T) {
	d := start(t, Options{Model: &Model{WriteSeek: time.Microsecond, WriteRate: 1e9, Gap: 8 << 20}})
	before, err := d.Counters()
	require.NoError(t, err)
	writeSync(t, filepath.Join(d.Mountpoint(), "f"), make([]byte, 16<<20))
	after, err := d.Counters()
	require.NoError(t, err)
	require.GreaterOrEqual(t, after.Writes-before.Writes, int64(32))
	require.LessOrEqual(t, after.Seeks-before.Seeks, int64(8))
}

func TestQueueServesEverything(t *testing.T) {
	q := &queue{head: head{model: Model{WriteSeek: time.Microsecond, ReadSeek: time.Microsecond, Flush: time.Microsecond}}}
	var all sync.WaitGroup
	for i := range int64(200) {
		all.Go(func() { <-q.submit(operation(i%3), i<<20, unix.PathMax).done })
	}
	all.Wait()
	q.mu.Lock()
	defer q.mu.Unlock()
	require.Empty(t, q.waiting)
}
