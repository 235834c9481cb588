// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"

	"github.com/nhybrid/nhybrid/scmlib"
)

const (
	cells = 32
	// mostWords of a block: up to 16 KiB, so that a good part of the time is spent within transactions.
	mostWords = 2048
)

// content is the root object. All of it follows from Count, so that any half of a transaction shows.
type content struct {
	Count  uint64        // transactions
	Cells  [cells]uint64 // each transaction takes one from a cell and gives it to another
	Block  scmlib.Off    // made anew by each transaction, the old one freed
	Length uint64        // of it, in words
}

type ledger struct {
	region *scmlib.Region
	root   scmlib.Ptr[content]
}

func openLedger(r *scmlib.Region) (*ledger, error) {
	root, err := scmlib.Root[content](r)
	return &ledger{r, root}, err
}

// mix is the finalizer of SplitMix64.
func mix(x uint64) uint64 {
	x ^= x >> 30
	x *= 0xbf58476d1ce4e5b9
	x ^= x >> 27
	x *= 0x94d049bb133111eb
	return x ^ x>>31
}

// plan is what transaction n does: the cells that it takes from and gives to, and the words of its block.
func plan(n uint64) (from, to, words uint64) {
	x := mix(n + 1)
	return x % cells, x >> 16 % cells, 1 + x>>32%mostWords
}

var errThoughtBetter = errors.New("taken back on purpose")

// step makes one transaction and returns how many there are now. Some are first made, and taken back, with nonsense.
func (l *ledger) step() (count uint64, err error) {
	c := l.root.In(l.region)
	if c.Count%8 == 7 {
		if err := l.region.Update(func(tx *scmlib.Tx) error { return l.transaction(tx, c, ^c.Count, errThoughtBetter) }); !errors.Is(err, errThoughtBetter) {
			return 0, fmt.Errorf("take a transaction back: %w", err)
		}
	}
	err = l.region.Update(func(tx *scmlib.Tx) error { return l.transaction(tx, c, c.Count, nil) })
	return c.Count, err
}

func (l *ledger) transaction(tx *scmlib.Tx, c *content, n uint64, end error) error {
	from, to, words := plan(n)
	if err := tx.Add(&c.Count, &c.Cells[from], &c.Cells[to], &c.Block, &c.Length); err != nil {
		return err
	}
	c.Count++
	c.Cells[from]--
	c.Cells[to]++
	if c.Block != 0 {
		if err := tx.Free(c.Block); err != nil {
			return err
		}
	}
	block, err := scmlib.NewSlice[uint64](tx, int(words))
	if err != nil {
		return err
	}
	for i, all := 0, block.Slice(l.region, int(words)); i < len(all); i++ {
		all[i] = n ^ uint64(i)
	}
	c.Block, c.Length = block.Off(), words
	return end
}

// verify compares all of the region with what its count of transactions must have left.
func (l *ledger) verify() (count uint64, err error) {
	err = l.region.View(func() error {
		c := l.root.In(l.region)
		count = c.Count
		want := content{Count: c.Count, Block: c.Block}
		for n := range c.Count {
			from, to, words := plan(n)
			want.Cells[from]--
			want.Cells[to]++
			want.Length = words
		}
		if *c != want {
			return fmt.Errorf("after %d transactions there is %v, want %v", count, *c, want)
		}
		blocks := uint64(0)
		l.region.Blocks(func(scmlib.Block) bool { blocks++; return true })
		if should := 1 + min(count, 1); blocks != should {
			return fmt.Errorf("after %d transactions there are %d blocks, want %d", count, blocks, should)
		}
		if count == 0 {
			return nil
		}
		block, err := scmlib.PtrAt[uint64](c.Block)
		if err != nil {
			return err
		}
		for i, word := range block.Slice(l.region, int(c.Length)) {
			if word != (count-1)^uint64(i) {
				return fmt.Errorf("word %d of the block of transaction %d is %#x", i, count-1, word)
			}
		}
		return nil
	})
	return count, err
}
