// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"weak"

	"github.com/containerd/errdefs"

	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// Metas reads the metadata of layers, in their order. They must not be changed. A
// layer whose pack is damaged is marked so: its next step is to be unpacked anew.
func (s *Store) Metas(ctx context.Context, ids []LayerID) (pack.Chain, error) {
	chain, _, err := s.metas(ctx, ids)
	return chain, err
}

// metas does so, and tells the blocks of the packs.
func (s *Store) metas(ctx context.Context, ids []LayerID) (pack.Chain, map[uint64]uint32, error) {
	chain := make(pack.Chain, len(ids))
	blocks := make(map[uint64]uint32, len(ids))
	for i, id := range ids {
		m, n, err := s.meta(ctx, id)
		if err != nil {
			if errdefs.IsDataLoss(err) {
				err = errors.Join(err, s.markDamaged(ctx, id, strings.TrimSuffix(err.Error(), ": "+errdefs.ErrDataLoss.Error())))
			}
			return nil, nil, err
		}
		chain[i], blocks[uint64(id)] = m, n
	}
	return chain, blocks, nil
}

// meta reads the metadata of one layer, unless somebody has them or is reading them.
func (s *Store) meta(ctx context.Context, id LayerID) (*pack.Meta, uint32, error) {
	done, err := s.metaCache.reads(ctx, id)
	if err != nil {
		return nil, 0, err
	}
	defer done()
	if m, n, ok := s.metaCache.get(id); ok {
		return m, n, nil
	}
	p, err := pack.Open(s.PackPath(id))
	if errors.Is(err, os.ErrNotExist) {
		return nil, 0, fmt.Errorf("read pack of layer %s: %w: %w", id, err, errdefs.ErrDataLoss)
	}
	if err != nil {
		return nil, 0, fmt.Errorf("read pack of layer %s: %w", id, err)
	}
	defer p.Close()
	m, err := p.Meta(ctx)
	if err != nil {
		return nil, 0, fmt.Errorf("read metadata of layer %s: %w", id, err)
	}
	s.metaCache.put(id, m, p.Blocks(), p.Identity().Entries)
	return m, p.Blocks(), nil
}

// metaEntries bounds the entries of layers whose metadata stay in memory, some
// 200 bytes each: who builds an image asks for the same layers again and again.
const metaEntries = 50_000

// metaCache keeps metadata that were read lately, and knows those that somebody
// still has: of a layer of a million files they take 250 MB, which must not be
// there twice when its view is made and its hot files are looked for. The zero
// value is ready. It is safe for concurrent use.
type metaCache struct {
	mu      sync.Mutex
	by      map[LayerID]*list.Element
	order   list.List // of *cachedMeta, the latest first
	entries int64
	alive   map[LayerID]aliveMeta
	reading map[LayerID]chan struct{} // closed when nobody reads the layer any more
}

// aliveMeta are metadata as long as somebody has them.
type aliveMeta struct {
	meta   weak.Pointer[pack.Meta]
	blocks uint32
}

// reads waits until nobody else reads the layer. The caller calls done.
func (c *metaCache) reads(ctx context.Context, id LayerID) (done func(), err error) {
	c.mu.Lock()
	for c.reading[id] != nil {
		other := c.reading[id]
		c.mu.Unlock()
		select {
		case <-other:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		c.mu.Lock()
	}
	defer c.mu.Unlock()
	if c.reading == nil {
		c.reading = map[LayerID]chan struct{}{}
	}
	mine := make(chan struct{})
	c.reading[id] = mine
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.reading, id)
		close(mine)
	}, nil
}

type cachedMeta struct {
	id      LayerID
	meta    *pack.Meta
	blocks  uint32
	entries int64
}

func (c *metaCache) get(id LayerID) (*pack.Meta, uint32, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e, ok := c.by[id]
	if !ok {
		a := c.alive[id]
		m := a.meta.Value()
		return m, a.blocks, m != nil
	}
	c.order.MoveToFront(e)
	m := e.Value.(*cachedMeta) //nolint:forcetypeassert // the list has nothing else
	return m.meta, m.blocks, true
}

func (c *metaCache) put(id LayerID, m *pack.Meta, blocks uint32, entries int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.by == nil {
		c.by, c.alive = map[LayerID]*list.Element{}, map[LayerID]aliveMeta{}
	}
	c.alive[id] = aliveMeta{weak.Make(m), blocks}
	if entries > metaEntries/2 || c.by[id] != nil {
		return
	}
	c.by[id] = c.order.PushFront(&cachedMeta{id, m, blocks, entries})
	c.entries += entries
	for c.entries > metaEntries {
		c.remove(c.order.Back())
	}
}

// drop forgets a layer whose pack is another one now, or gone.
func (c *metaCache) drop(id LayerID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.alive, id)
	if e := c.by[id]; e != nil {
		c.remove(e)
	}
}

func (c *metaCache) remove(e *list.Element) {
	m := e.Value.(*cachedMeta) //nolint:forcetypeassert // the list has nothing else
	c.order.Remove(e)
	delete(c.by, m.id)
	c.entries -= m.entries
}
