// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package region

import (
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// books adds up what is promised. s.mu is held.
func (s *Store) books() (Books, error) {
	b := Books{Limit: s.o.Limit, Headroom: s.o.Headroom, Reserve: s.o.Reserve, Namespaces: map[string]Usage{}}
	var fs unix.Statfs_t
	if err := unix.Statfs(s.root, &fs); err != nil {
		return b, fmt.Errorf("ask for room below %q: %w", s.root, err)
	}
	b.Free = int64(fs.Bavail) * fs.Bsize
	s.promises(&b)
	return b, nil
}

// promises adds up what regions have. s.mu is held.
func (s *Store) promises(b *Books) {
	for _, r := range s.regs {
		u := b.Namespaces[r.Owner()]
		b.Namespaces[r.Owner()] = Usage{u.Bytes + r.charge(), u.Regions + 1}
		b.Promised += r.charge()
	}
	for ns, m := range s.making {
		u := b.Namespaces[ns]
		b.Namespaces[ns] = Usage{u.Bytes + m.Bytes, u.Regions + m.Regions}
		b.Making += m.Bytes
	}
	for size, dirs := range s.pool {
		b.Pool += size * int64(len(dirs))
	}
}

// Held is what others have to leave free for regions: what of the reserve none has yet, or what those in the making will take.
func (s *Store) Held() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := Books{Reserve: s.o.Reserve, Namespaces: map[string]Usage{}}
	s.promises(&b)
	return max(b.Making, b.unclaimed()+b.Making)
}

// Books tells what is promised and what there is.
func (s *Store) Books() (Books, error) {
	others := s.others()
	s.mu.Lock()
	defer s.mu.Unlock()
	b, err := s.books()
	b.Others = others
	return b, err
}

// Accounts tells what each namespace has and may have, if it has regions or a quota of its own.
func (s *Store) Accounts() map[string]Account {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := Books{Namespaces: map[string]Usage{}}
	s.promises(&b)
	all := map[string]Account{}
	for ns := range s.o.Quotas {
		all[ns] = Account{Quota: s.quota(ns)}
	}
	for ns, u := range b.Namespaces {
		all[ns] = Account{u, s.quota(ns)}
	}
	return all
}

// others must not be called with s.mu held: see Options.
func (s *Store) others() int64 {
	if s.o.Others == nil {
		return 0
	}
	return s.o.Others()
}

// want is what is asked of the books.
type want struct {
	namespace string // "": nobody's quota
	size      int64
	regions   int
	have      int64 // bytes that were taken from the pool for it
	pool      bool  // it is for the pool, which does not give up anything for itself
}

// quota of a namespace, none for "".
func (s *Store) quota(namespace string) Quota {
	if q, own := s.o.Quotas[namespace]; own {
		return q
	}
	if namespace == "" {
		return Quota{}
	}
	return s.o.Quota
}

// promise is bytes in the making. It ends once: by kept or by release.
type promise struct {
	s    *Store
	w    want
	once sync.Once
}

// kept ends a promise where the bytes get into the books by other means, by enter, under the lock: nobody sees them twice or not at all.
func (p *promise) kept(enter func()) {
	p.s.mu.Lock()
	defer p.s.mu.Unlock()
	p.once.Do(func() { p.s.enter(p.w, -1) })
	enter()
}

// release ends a promise, if it was not kept.
func (p *promise) release() { p.kept(func() {}) }

// reserve promises bytes. The pool gives up what is missing.
//
// Others look at what is held before they promise anything, with a lock that s.o.Others takes too. So what is asked for goes into the books first, and theirs are
// looked at then: of two who ask at the same time at least one sees the other.
func (s *Store) reserve(w want) (*promise, error) {
	s.admission.Lock()
	defer s.admission.Unlock()
	s.mu.Lock()
	_, err := s.admits(w, 0)
	if err == nil {
		s.enter(w, 1)
	}
	s.mu.Unlock()
	if err != nil {
		return nil, err
	}
	others := s.others()
	s.mu.Lock()
	s.enter(w, -1)
	full, err := s.admits(w, others)
	if err != nil {
		s.mu.Unlock()
		return nil, err
	}
	var given []string
	if full {
		given = s.drainPool()
	}
	s.enter(w, 1)
	s.mu.Unlock()
	s.giveUp(given) // a removal may take long, and layers are admitted by the same books
	return &promise{s: s, w: w}, nil
}

// admits decides on what is asked, with so much promised to others, and tells whether the pool is in the way. s.mu is held.
func (s *Store) admits(w want, others int64) (full bool, err error) {
	b, err := s.books()
	if err != nil {
		return false, err
	}
	b.Free, b.Others = b.Free+w.have, others
	give, q := b.Pool, s.quota(w.namespace)
	if w.pool {
		give = 0
	}
	if err := admit(b, q, w.namespace, w.size, w.regions, give); err != nil {
		return false, err
	}
	return admit(b, q, w.namespace, w.size, w.regions, 0) != nil, nil
}

// enter enters what is wanted into what is in the making, or with -1 takes it out. s.mu is held.
func (s *Store) enter(w want, sign int) {
	m := s.making[w.namespace]
	if m = (Usage{m.Bytes + int64(sign)*w.size, m.Regions + sign*w.regions}); m == (Usage{}) {
		delete(s.making, w.namespace)
	} else {
		s.making[w.namespace] = m
	}
}
