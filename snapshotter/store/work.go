// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import "github.com/nhybrid/nhybrid/placement"

// Work counts what is under way or waits.
type Work struct {
	Background int   // layers and other pieces of work
	Unpacking  int   // layers
	Unsynced   int   // layers that a power cut would cost
	Holes      int   // layers whose packs have holes that are to be filled
	Database   int64 // changes that the copy on HDD lacks
	Failing    int   // layers of snapshots whose latest step failed
	LastError  string
}

// Work tells what is under way.
func (s *Store) Work() Work {
	w := Work{Background: s.exec.length() + s.jobs.length(), Database: s.mirror.waiting()}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.layers {
		if l.unpack != nil {
			w.Unpacking++
		}
		switch {
		case l.rec.Damaged != "":
		case l.rec.State == Stored || l.rec.State == Staged:
			w.Unsynced++
		case l.rec.State == Durable && (s.config.WriteBack || l.wanted > 0):
			w.Holes++
		}
		if l.last != nil && l.unpack == nil && l.rec.Users > 0 { // who pulls is told
			w.Failing++
			w.LastError = l.last.Error()
		}
	}
	return w
}

// Failures tells how the latest step of layers has failed that can be used, or are to be packed.
func (s *Store) Failures() map[LayerID]error {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := map[LayerID]error{}
	for id, l := range s.layers {
		if l.last != nil && l.unpack == nil && l.rec.Damaged == "" {
			out[id] = l.last
		}
	}
	return out
}

// Enforced reports whether a tier enforces quotas.
func (q *quotas) Enforced(t placement.Tier) bool { return q.enforced[t] }

// WritesBack reports whether the holes of packs are filled without being asked for.
func (s *Store) WritesBack() bool { return s.config.WriteBack }
