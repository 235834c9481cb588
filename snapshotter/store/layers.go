// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	bolt "go.etcd.io/bbolt"

	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/placement/tier"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// layer is what the store keeps of a layer in memory.
type layer struct {
	run sync.Mutex // held by whoever works on the layer

	// The rest is guarded by Store.mu.
	rec     Layer         // as the database has it
	changed chan struct{} // closed when rec or unpacking changes
	since   time.Time     // when it came, or was last held
	stored  time.Time     // when its record came to be so
	holds   int           // pulls and callers that keep it
	wanted  int           // callers that wait for it
	homes   int           // callers that wait for its pack to be whole
	dying   bool          // it is being removed: nobody may find it
	last    error         // of the latest step; nil after one that went well
	pause   time.Duration // before a step that failed is tried again
	unpack  *unpacking    // under way
	refetch refetch
	refused bool      // a worker wanted to look at it while somebody else had run
	awaits  bool      // it is waited for the layers below it
	spaces  []string  // namespaces of containerd whose pulls have asked for its blob
	pack    *openPack // written and not synced yet
	// nvmFailures is Store.nvmFailures when the writing of the layer began.
	nvmFailures int
}

func (s *Store) layer(id LayerID) (*layer, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l := s.layers[id]; l != nil {
		return l, nil
	}
	return nil, fmt.Errorf("layer %s: %w", id, errdefs.ErrNotFound)
}

// Layer returns the record of a layer; ErrNotFound if it is gone.
func (s *Store) Layer(id LayerID) (Layer, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l := s.layers[id]; l != nil {
		return l.rec, nil
	}
	return Layer{}, fmt.Errorf("layer %s: %w", id, errdefs.ErrNotFound)
}

// Layers returns the records of all layers, in no order.
func (s *Store) Layers() []Layer {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]Layer, 0, len(s.layers))
	for _, l := range s.layers {
		all = append(all, l.rec)
	}
	return all
}

// remember takes a record that the database has into memory. Called with mu held.
func (s *Store) remember(rec Layer) *layer {
	l := s.layers[rec.ID]
	if l == nil {
		l = &layer{changed: make(chan struct{}), since: time.Now(), nvmFailures: s.nvmFailures}
		s.layers[rec.ID] = l
	}
	if rec.State == Stored && (l.rec.State != Stored || l.rec.Damaged != "") {
		l.stored = time.Now()
	}
	l.rec = rec
	if rec.Blob != "" {
		s.byBlob[rec.Blob.String()] = rec.ID
	}
	s.signal(l)
	return l
}

// signal wakes who waits for a change of the layer. Called with mu held.
func (s *Store) signal(l *layer) {
	close(l.changed)
	l.changed = make(chan struct{})
}

// newLayer gives out the next number, in the transaction.
func newLayer(tx *bolt.Tx, l Layer) (Layer, error) {
	n, err := own(tx, bucketLayers).NextSequence()
	if err != nil {
		return l, err
	}
	l.ID, l.Created = LayerID(n), time.Now()
	return l, putLayer(tx, l)
}

// updateLayer changes the record of a layer, in the database first. A layer that
// is gone is ErrNotFound.
func (s *Store) updateLayer(ctx context.Context, id LayerID, change func(*Layer)) error {
	err := s.writeLayer(ctx, id, change)
	if err == nil {
		s.changed(id)
	}
	return err
}

// writeLayer changes the record of a layer in the database, and nowhere else.
func (s *Store) writeLayer(ctx context.Context, id LayerID, change func(*Layer)) error {
	return s.db.update(ctx, func(_ context.Context, tx *bolt.Tx) error {
		rec, err := getLayer(tx, id)
		if err != nil {
			return err
		}
		change(&rec)
		return putLayer(tx, rec)
	})
}

// changed takes into memory what the database has of layers after a transaction,
// and tells of it.
func (s *Store) changed(ids ...LayerID) {
	for _, rec := range s.refresh(ids...) {
		if s.onEvent != nil {
			s.onEvent(rec.ID, rec)
		}
		s.exec.kick(rec.ID)
	}
}

// refresh takes into memory what the database has of layers after a transaction.
// It reads with mu held: of two transactions the later one may be told of first.
func (s *Store) refresh(ids ...LayerID) (recs []Layer) {
	s.mu.Lock()
	err := s.db.view(context.Background(), func(_ context.Context, tx *bolt.Tx) error {
		for _, id := range ids {
			rec, err := getLayer(tx, id)
			if errdefs.IsNotFound(err) {
				continue // removed
			}
			if err != nil {
				return err
			}
			s.remember(rec)
			recs = append(recs, rec)
		}
		return nil
	})
	s.mu.Unlock()
	if err != nil {
		log.L.WithError(err).Error("cannot read the records of layers")
	}
	s.mirror.changed()
	return recs
}

// Bind refers a snapshot to a layer, in the caller's write transaction, and
// returns what [Store.Bound] is to be told when it has been committed.
// A snapshot that was bound to another layer leaves that one.
func (s *Store) Bind(tx *bolt.Tx, snapshot string, id LayerID) (changed []LayerID, err error) {
	sn, err := GetSnapshot(tx, snapshot)
	if err != nil {
		return nil, err
	}
	if sn.Layer == id {
		return nil, nil
	}
	if sn.Layer != 0 {
		if changed, err = unbind(tx, changed, sn.Layer); err != nil {
			return nil, err
		}
	}
	l, err := getLayer(tx, id)
	if err != nil {
		return nil, err
	}
	l.Users++
	l.Used = true
	sn.Layer = id
	return append(changed, id), errors.Join(putLayer(tx, l), PutSnapshot(tx, snapshot, sn))
}

func unbind(tx *bolt.Tx, changed []LayerID, id LayerID) ([]LayerID, error) {
	l, err := getLayer(tx, id)
	if errdefs.IsNotFound(err) {
		return changed, nil
	}
	if err != nil {
		return nil, err
	}
	l.Users = max(0, l.Users-1)
	return append(changed, id), putLayer(tx, l)
}

// Bound takes in what a transaction has changed, after its commit.
func (s *Store) Bound(changed []LayerID) { s.changed(changed...) }

// CommitPath makes a layer of the staging directory of a snapshot, in the
// caller's transaction, and binds the snapshot to it. It is packed in the background.
func (s *Store) CommitPath(tx *bolt.Tx, snapshot string, parents []LayerID) (changed []LayerID, err error) {
	sn, err := GetSnapshot(tx, snapshot)
	if err != nil {
		return nil, err
	}
	l, err := newLayer(tx, Layer{
		State: Staged, Snapshot: snapshot, Tier: sn.Tier, Namespace: sn.Namespace, Parents: parents, Boot: s.config.BootID,
	})
	if err != nil {
		return nil, err
	}
	return s.Bind(tx, snapshot, l.ID)
}

// RemoveSnapshot forgets a snapshot, in the caller's transaction, and remembers
// that its files are to go.
func (s *Store) RemoveSnapshot(tx *bolt.Tx, id string) (changed []LayerID, err error) {
	sn, err := GetSnapshot(tx, id)
	switch {
	case errdefs.IsNotFound(err):
	case err != nil:
		return nil, err
	case sn.Layer != 0:
		if changed, err = unbind(tx, nil, sn.Layer); err != nil {
			return nil, err
		}
	}
	if err := own(tx, bucketSnapshots).Delete([]byte(id)); err != nil {
		return nil, err
	}
	return changed, own(tx, bucketRemoved).Put([]byte(id), []byte{})
}

// syncLatest is how long pulls and starts keep a layer from being brought to its devices: where one follows on the other all
// day, images must become durable all the same.
const syncLatest = time.Minute

// overdue tells that. Called with mu held.
func (l *layer) overdue() bool {
	return l.rec.State == Stored && l.rec.Damaged == "" && time.Since(l.stored) > syncLatest
}

// found looks at what stands of a layer. It touches the HDD. The error is that of a
// device that cannot tell: a pack that cannot be read now may be good.
func (s *Store) found(l *layer, rec Layer) (Found, error) {
	s.mu.Lock()
	f := Found{
		SameBoot: rec.Boot == s.config.BootID, Held: l.holds > 0, Running: l.unpack != nil,
		Expired: time.Since(l.since) > s.config.Grace, WriteBack: s.config.WriteBack || l.homes > 0, Wanted: l.wanted > 0,
		Overdue: l.overdue(),
	}
	s.mu.Unlock()
	if rec.State.Valid() {
		p, err := pack.Open(s.PackPath(rec.ID))
		switch {
		case err == nil:
			f.Pack = true
			p.Close()
		case errdefs.IsDataLoss(err), errdefs.IsInvalidArgument(err), errdefs.IsFailedPrecondition(err):
			log.L.WithError(err).WithField("layer", rec.ID).Warn("the pack of a layer cannot be used")
		case !errors.Is(err, os.ErrNotExist):
			return f, fmt.Errorf("look at the pack of layer %s: %w", rec.ID, err)
		}
		_, err = os.Lstat(s.Tiers.LayerData(rec.ID.String()))
		f.NVM = err == nil
	}
	if rec.State == Staged {
		_, err := os.Lstat(s.Tiers.Upper(rec.Tier, rec.Snapshot))
		f.Staged = err == nil
	}
	return f, nil
}

// markDamaged records why a layer cannot be read.
func (s *Store) markDamaged(ctx context.Context, id LayerID, why string) error {
	log.G(ctx).WithField("layer", id).Warnf("layer %s is damaged: %s", id, why)
	return s.updateLayer(ctx, id, func(l *Layer) { l.Damaged = why })
}

// Await returns when a layer can be read, as the layer then is. It moves the
// layer to the front of the queue. The error is ErrNotFound for a layer that is
// gone, ErrDataLoss for one that is damaged and cannot be had again.
func (s *Store) Await(ctx context.Context, id LayerID) (Layer, error) {
	return s.await(ctx, id, Layer.readable, func(l *layer, n int) { l.wanted += n })
}

// AwaitHome returns when the pack of a layer is whole, or with ErrUnavailable when the layer is damaged and left alone. Filling goes on at its own
// pace, behind pulls and starts.
func (s *Store) AwaitHome(ctx context.Context, id LayerID) error {
	ended := func(l Layer) bool {
		if l.Damaged != "" { // nothing mends it but who needs it to be read
			return l.Repairs >= mostRepairs
		}
		return l.State == Home
	}
	l, err := s.await(ctx, id, ended, func(l *layer, n int) { l.homes += n })
	if err == nil && l.Damaged != "" {
		err = fmt.Errorf("layer %s is damaged: %s: %w", id, l.Damaged, errdefs.ErrUnavailable)
	}
	return err
}

func (l Layer) readable() bool { return l.State.Valid() && l.Damaged == "" }

func (s *Store) await(ctx context.Context, id LayerID, ready func(Layer) bool, count func(*layer, int)) (Layer, error) {
	l, err := s.layer(id)
	if err != nil {
		return Layer{}, err
	}
	s.mu.Lock()
	if ready(l.rec) {
		defer s.mu.Unlock()
		return l.rec, nil
	}
	count(l, 1)
	// What is tried again may go well. An unpacking that failed is not, before
	// somebody begins it anew: who comes late must be told.
	if l.rec.State != Unpacking || l.rec.Users > 0 {
		l.last = nil
	}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		count(l, -1)
		s.mu.Unlock()
	}()
	s.exec.hurry(id)
	for {
		s.mu.Lock()
		rec, last, changed, gone, trouble := l.rec, l.last, l.changed, s.layers[id] != l, l.trouble("", nil)
		s.mu.Unlock()
		switch {
		case gone:
			return rec, fmt.Errorf("layer %s: %w", id, errdefs.ErrNotFound)
		case ready(rec):
			return rec, nil
		case rec.Damaged != "" && (last != nil || rec.Blob == ""):
			return rec, fmt.Errorf("layer %s cannot be used: %s: %w", id, trouble, errdefs.ErrDataLoss)
		case last != nil:
			return rec, last
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return rec, ctx.Err()
		case <-s.ctx.Done():
			return rec, fmt.Errorf("layer %s: the daemon is stopping: %w", id, errdefs.ErrUnavailable)
		}
	}
}

// occupied counts what a layer takes on NVM.
func (s *Store) occupied(id LayerID) (bytes int64, err error) {
	for e, err := range s.Tiers.OnNVM(id.String()) {
		if err != nil {
			return 0, err
		}
		bytes += e.Bytes
	}
	return bytes, nil
}

// Bytes is what a layer takes on each tier, by placement.Tier.
func (l *Layer) Bytes() (out [2]int64) {
	if l.State == Staged {
		out[l.Tier] = l.Data
		return out
	}
	out[placement.NVM], out[placement.HDD] = l.NVM, l.HDD()
	return out
}

// Stands says on which tiers a layer has bytes: "nvm", "hdd" or "both".
func (l *Layer) Stands() string {
	b := l.Bytes()
	switch {
	case b[placement.NVM] > 0 && b[placement.HDD] > 0 && l.State == Home:
		return "both"
	case b[placement.NVM] > b[placement.HDD]:
		return tier.Tiers[0].String()
	}
	return placement.HDD.String()
}
