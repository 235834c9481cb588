// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"runtime"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// TestMetasAreSharedWhileSomebodyHasThem: also those that are too many to keep.
func TestMetasAreSharedWhileSomebodyHasThem(t *testing.T) {
	var c metaCache
	m := &pack.Meta{Layer: 7, Root: &pack.Node{}}
	c.put(7, m, 3, metaEntries)
	got, blocks, ok := c.get(7)
	require.True(t, ok)
	require.Same(t, m, got)
	require.EqualValues(t, 3, blocks)
	runtime.KeepAlive(m)
	runtime.KeepAlive(got)
	runtime.GC() // neither is used below
	_, _, ok = c.get(7)
	require.False(t, ok, "nobody has them")
	m = &pack.Meta{Layer: 7, Root: &pack.Node{}}
	c.put(7, m, 3, metaEntries)
	c.drop(7)
	_, _, ok = c.get(7)
	require.False(t, ok, "the pack is another one")
	runtime.KeepAlive(m)
}

// TestMetasAreReadOnce: of those who want the same layer one reads.
func TestMetasAreReadOnce(t *testing.T) {
	var c metaCache
	var have []*pack.Meta
	read := 0
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			done, err := c.reads(context.Background(), 7)
			if err != nil {
				return
			}
			defer done()
			m, _, ok := c.get(7)
			if !ok {
				m = &pack.Meta{Layer: 7}
				c.put(7, m, 1, metaEntries)
			}
			mu.Lock()
			defer mu.Unlock()
			have = append(have, m)
			if !ok {
				read++
			}
		})
	}
	wg.Wait()
	require.Len(t, have, 16)
	require.Equal(t, 1, read)

	done, err := c.reads(t.Context(), 8)
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = c.reads(ctx, 8)
	require.ErrorIs(t, err, context.Canceled)
	done()
	done, err = c.reads(t.Context(), 8)
	require.NoError(t, err)
	done()
}
