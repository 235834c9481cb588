// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"
	"iter"
	"time"

	"github.com/nhybrid/nhybrid/hif/migrate"
	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
	"github.com/nhybrid/nhybrid/snapshotter/store"
)

// Busy implements [migrate.Host].
func (s hotStore) Busy() (why string, busy bool) { return s.store.Busy() }

// askPace is how often a wait for the store asks whether it is still wanted.
const askPace = 200 * time.Millisecond

// BringHome implements [migrate.Host]. The store fills at its own pace, for as long as pace lets it.
func (s hotStore) BringHome(ctx context.Context, layer string, pace func(int) error) error {
	id, err := store.ParseLayerID(layer)
	if err != nil {
		return err
	}
	waiting, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- s.store.AwaitHome(waiting, id) }()
	ask := time.NewTicker(askPace)
	defer ask.Stop()
	for home := false; !home; {
		select {
		case err := <-done:
			if err != nil {
				return err
			}
			home = true
		case <-ask.C:
			if err := pace(0); err != nil {
				return err
			}
		}
	}
	// A database restored from its copy must know that the pack is whole: files
	// leave NVM now.
	if err := s.store.FlushDatabase(ctx); err != nil {
		return err
	}
	s.hot.Kick() // only what is at home can be divided into parts
	return nil
}

// OnNVM implements [migrate.Host].
func (s hotStore) OnNVM(layer string) iter.Seq2[migrate.File, error] {
	return func(yield func(migrate.File, error) bool) {
		id, err := store.ParseLayerID(layer)
		if err != nil {
			yield(migrate.File{}, err)
			return
		}
		for e, err := range s.store.Tiers.OnNVM(layer) {
			f := migrate.File{Bytes: e.Bytes}
			if err == nil {
				f.Redirect = pack.Ref{Layer: uint64(id), Number: e.Number}.Redirect()
			}
			if !yield(f, err) || err != nil {
				return
			}
		}
	}
}

// Stands implements [migrate.Host].
func (s hotStore) Stands(redirect string) (bool, error) {
	ref, err := pack.ParseRedirect(redirect)
	return err == nil && s.store.OnNVM(ref) >= 0, err
}

// Promote implements [migrate.Host].
func (s hotStore) Promote(ctx context.Context, redirect string, pace func(int) error) (int64, error) {
	return s.store.Promote(ctx, redirect, pace)
}

// Demote implements [migrate.Host].
func (s hotStore) Demote(redirect string) (freed, held int64, err error) {
	return s.store.Demote(redirect, s.pins)
}

// Held implements [migrate.Host].
func (s hotStore) Held() int64 { return s.pins.Bytes() }

// Free implements [migrate.Host].
func (s hotStore) Free() (int64, error) {
	room, err := s.store.Room(placement.NVM)
	return room.Scarcer(), err
}

// Settled implements [migrate.Host].
func (s hotStore) Settled(ctx context.Context, layer string, nvmBytes int64) error {
	id, err := store.ParseLayerID(layer)
	if err != nil {
		return err
	}
	before, err := s.store.Layer(id)
	if err != nil {
		return err
	}
	err = s.store.Counted(ctx, id, nvmBytes)
	if before.NVM == 0 && nvmBytes > 0 {
		// A plan made while its first files came up took it for a layer without any,
		// and would let none of them leave.
		s.kickHot()
	}
	s.letGo(ctx)
	return err
}

// Gone implements [migrate.Host].
func (s hotStore) Gone(layer string) error { return s.store.Tiers.RemoveData(layer) }
