// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import "time"

// Hold keeps a layer that no snapshot uses; [Store.Release] lets go of it.
func (s *Store) Hold(id LayerID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l := s.layers[id]; l != nil {
		l.holds++
	}
}

// Release ends [Store.Hold], or what [Store.Begin] has begun to hold. An
// unpacking that nobody wants any more is cancelled.
func (s *Store) Release(id LayerID) { s.release(id, time.Now()) }

// Discard is [Store.Release] for a layer that nobody will want soon: if no
// snapshot uses it, it goes at once.
func (s *Store) Discard(id LayerID) { s.release(id, time.Time{}) }

// Failure is the error of the latest work on a layer, nil if it went well or is under way.
func (s *Store) Failure(id LayerID) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l := s.layers[id]; l != nil && l.unpack == nil {
		return l.last
	}
	return nil
}

func (s *Store) release(id LayerID, since time.Time) {
	s.mu.Lock()
	l := s.layers[id]
	if l == nil {
		s.mu.Unlock()
		return
	}
	l.holds--
	l.since = since
	// What a pull had begun to unpack anew would wait for a blob that may never come.
	// The executor knows other ways.
	if u := l.unpack; u != nil && l.holds <= 0 && (l.rec.Users == 0 || l.rec.Damaged != "" && !u.fetches) {
		u.end()
	}
	s.mu.Unlock()
	s.exec.kick(id)
}
