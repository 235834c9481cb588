// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"

	"github.com/nhybrid/nhybrid/placement/tier"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
	"github.com/nhybrid/nhybrid/snapshotter/unpack"
)

// Spec says what is to be unpacked, and where its bytes go.
type Spec struct {
	Namespace string // whose content store has the blob, or will have it
	Blob      digest.Digest
	Size      int64 // bytes of the blob
	MediaType string
	DiffID    digest.Digest // "" if it is not known
	// Gate returns when storing may begin; nil: at once.
	Gate func(context.Context) error
	// Place says where the bytes of a file go; nil: into the pack.
	Place func(unpack.File) unpack.Placement
	// Progress is told how many bytes were read of the blob and came out of it; nil: nobody.
	Progress func(compressed, uncompressed int64)
	// Ended is called when the pack is there and before the layer can be read; nil: not.
	Ended func(LayerID)
	// Decision explains what became of it; nil: nothing is recorded.
	Decision func(unpack.Result) json.RawMessage

	// open opens the blob where it is fetched from a registry; nil: it comes to containerd.
	open func(context.Context) (io.ReadCloser, error)
}

// unpacking is the work of making a layer from its blob. Guarded by Store.mu.
type unpacking struct {
	cancel  context.CancelFunc
	done    chan struct{}
	fetches bool  // from a registry
	ended   bool  // it was cancelled
	after   *Spec // of who came when it was: it begins anew
}

// end cancels an unpacking. Called with Store.mu held.
func (u *unpacking) end() {
	u.ended = true
	u.cancel()
}

// errBlobGone ends an unpacking that would wait for a blob that no pull is downloading: a client has committed the layer by
// itself, and containerd may have collected the blob since. The executor knows other ways.
var errBlobGone = fmt.Errorf("no pull is downloading it any more: %w", errdefs.ErrNotFound)

// Begin returns the layer with the given blob and holds it until [Store.Release].
// Where there is none, or one that is damaged, it begins an unpacking, which goes
// on without the caller. fresh reports whether it did.
func (s *Store) Begin(ctx context.Context, spec Spec) (id LayerID, fresh bool, err error) {
	if s.config.Blobs == nil {
		return 0, false, fmt.Errorf("unpack %s: no containerd is configured: %w", spec.Blob, errdefs.ErrUnavailable)
	}
	if id, ok := s.holdBlob(spec); ok {
		return id, false, nil
	}
	var rec Layer
	err = s.db.update(ctx, func(_ context.Context, tx *bolt.Tx) (err error) {
		rec, err = newLayer(tx, Layer{
			State: Unpacking, Namespace: spec.Namespace, Blob: spec.Blob, Size: spec.Size, MediaType: spec.MediaType,
			DiffID: spec.DiffID, Boot: s.config.BootID,
		})
		return err
	})
	if err != nil {
		return 0, false, fmt.Errorf("unpack %s: %w", spec.Blob, err)
	}
	s.mu.Lock()
	if id, ok := s.byBlob[spec.Blob.String()]; ok && s.layers[id] != nil {
		// Another pull was faster. The number stays unused.
		s.layers[id].holds++
		s.layers[id].wantedIn(spec.Namespace)
		s.layers[rec.ID] = &layer{rec: rec, changed: make(chan struct{}), since: time.Now()}
		s.mu.Unlock()
		s.exec.kick(rec.ID) // nobody holds it: it goes
		return id, false, nil
	}
	l := s.remember(rec)
	l.holds++
	l.wantedIn(spec.Namespace)
	s.mu.Unlock()
	s.start(l, spec)
	return rec.ID, true, nil
}

// holdBlob holds the layer of a blob if there is one, and has it unpacked anew if
// nothing better is known of it.
func (s *Store) holdBlob(spec Spec) (LayerID, bool) {
	s.mu.Lock()
	id, ok := s.byBlob[spec.Blob.String()]
	l := s.layers[id]
	if !ok || l == nil || l.dying {
		s.mu.Unlock()
		return 0, false
	}
	l.holds++
	l.wantedIn(spec.Namespace)
	rec, running := l.rec, l.unpack != nil
	if running && l.unpack.ended && l.unpack.after == nil {
		l.unpack.after = &spec
	}
	s.mu.Unlock()
	if !running && (rec.Damaged != "" || rec.State == Unpacking) {
		s.start(l, spec)
	}
	return id, true
}

// wantedIn notes the namespace of a pull that needs the blob. Called with Store.mu held.
func (l *layer) wantedIn(ns string) {
	if ns != "" && !slices.Contains(l.spaces, ns) {
		l.spaces = append(l.spaces, ns)
	}
}

// start unpacks in a goroutine of its own, unless that is under way.
func (s *Store) start(l *layer, spec Spec) *unpacking {
	ctx, cancel := context.WithCancel(s.ctx)
	u := &unpacking{cancel: cancel, done: make(chan struct{}), fetches: spec.open != nil}
	s.mu.Lock()
	if l.unpack != nil || s.closing {
		u = l.unpack
		s.mu.Unlock()
		cancel()
		return u
	}
	l.unpack = u
	l.last = nil
	s.signal(l)
	s.wg.Go(func() {
		defer close(u.done)
		defer cancel()
		l.run.Lock()
		s.mu.Lock()
		rec := l.rec // of now: the executor may have been faster
		var err error
		if s.layers[rec.ID] != l {
			err = context.Canceled // removed, before this was begun
		}
		s.mu.Unlock()
		if err == nil && !rec.readable() {
			err = s.unpack(ctx, l, u, rec, spec)
		}
		l.run.Unlock()
		s.mu.Lock()
		l.unpack = nil
		l.last = err
		over := ctx.Err() != nil || errors.Is(err, errBlobGone) || errors.Is(err, context.Canceled)
		again := u.after
		if l.holds <= 0 || s.ctx.Err() != nil {
			again = nil
		}
		switch {
		case err == nil:
			l.refetch = refetch{}
		case over && (again != nil || l.rec.Users > 0):
			l.last = nil // it is tried again, or in another way
		case u.fetches && !over:
			l.refetch.failed(err)
		}
		rec = l.rec
		s.signal(l)
		s.mu.Unlock()
		switch {
		case err == nil:
		case again != nil:
			s.start(l, *again)
		case over:
			log.L.WithField("layer", rec.ID).Debug("unpacking was cancelled")
		case u.fetches: // the executor tells, and when it tries again
		default:
			log.L.WithError(err).WithFields(log.Fields{"layer": rec.ID, "blob": rec.Blob}).Error("a layer could not be unpacked")
		}
		s.exec.kick(rec.ID)
	})
	s.mu.Unlock()
	return u
}

func (s *Store) unpack(ctx context.Context, l *layer, u *unpacking, rec Layer, spec Spec) error {
	if spec.Gate != nil {
		if err := spec.Gate(ctx); err != nil {
			return err
		}
	}
	place := &place{of: s.places, mayWait: func() error {
		s.mu.Lock()
		defer s.mu.Unlock()
		if !u.fetches && l.holds <= 0 && l.rec.Users > 0 {
			u.ended = true
			return errBlobGone
		}
		return nil
	}}
	if spec.open != nil {
		place.of = s.fetches
	}
	if err := place.take(ctx); err != nil {
		return err
	}
	defer place.leave()
	for pause := time.Duration(0); ; pause = min(max(2*pause, restartFirst), restartMost) {
		err := s.unpackOnce(ctx, l, rec, spec, place)
		if !errors.Is(err, unpack.ErrRestarted) {
			return err
		}
		log.G(ctx).WithError(err).WithField("layer", rec.ID).Info("the download of a layer began anew, and so does its unpacking")
		if err := place.without(ctx, func() error { return sleep(ctx, pause) }); err != nil {
			return err
		}
	}
}

// restartFirst and restartMost bound the pause after the second and each further time that a download is found to be another one.
const (
	restartFirst = 100 * time.Millisecond
	restartMost  = 5 * time.Second
)

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *Store) unpackOnce(ctx context.Context, l *layer, rec Layer, spec Spec, place *place) error {
	open := spec.open
	if open == nil {
		open = func(ctx context.Context) (io.ReadCloser, error) {
			r, err := s.open(ctx, l, spec, place)
			if err != nil {
				err = fmt.Errorf("read blob %s: %w", spec.Blob, err)
			}
			return r, err
		}
	}
	r, err := open(ctx)
	if err != nil {
		return err
	}
	defer r.Close()
	// Of the layers of an image most wait for their turn to be downloaded: without a pack and buffers.
	head := make([]byte, 512)
	n, err := r.Read(head)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	return s.unpackFrom(ctx, l, rec, spec, struct {
		io.Reader
		io.Closer
	}{io.MultiReader(bytes.NewReader(head[:n]), r), r})
}

// unpackFrom makes the layer of a blob that is being read. Nothing of it is
// valid before both digests were found to be right.
func (s *Store) unpackFrom(ctx context.Context, l *layer, rec Layer, spec Spec, r io.ReadCloser) (err error) {
	s.mu.Lock()
	l.nvmFailures = s.nvmFailures
	s.mu.Unlock()
	// Containers may still read a damaged layer: the old pack stays theirs, and so do
	// the files on NVM, since the same blob gives the same numbers.
	anew := rec.State != Unpacking
	s.dropPack(rec.ID)
	if !anew {
		if err := s.Tiers.RemoveData(rec.ID.String()); err != nil {
			return err
		}
	}
	w, err := pack.Create(s.newPack(rec.ID), s.flusher.options())
	if err != nil {
		return fmt.Errorf("unpack layer %s: %w", rec.ID, err)
	}
	kept := false // the descriptor is the store's
	defer func() {
		if err != nil {
			if kept {
				s.dropPack(rec.ID)
				err = errors.Join(err, os.Remove(s.PackPath(rec.ID)))
			} else {
				_ = s.flusher.finish(w.File()) // it is deleted
				err = errors.Join(err, w.Abort())
			}
			if !anew {
				err = errors.Join(err, s.Tiers.RemoveData(rec.ID.String()))
			}
		}
	}()
	m, res, err := unpack.Layer(ctx, r, w, unpack.Want{Digest: spec.Blob, DiffID: spec.DiffID, Size: spec.Size}, unpack.Options{
		Layer: uint64(rec.ID), Place: spec.Place, NVM: nvmFiles{s, rec.ID}, MaxBytes: s.config.MostBytes, MaxMetadata: s.config.MostMetadata, Progress: spec.Progress,
	})
	if err != nil {
		return err
	}
	st, err := w.Finish(m, pack.Identity{
		Layer: uint64(rec.ID), Blob: spec.Blob, DiffID: res.DiffID, Compressed: res.Compressed, Uncompressed: res.Uncompressed,
	})
	if err != nil {
		return fmt.Errorf("unpack blob %s: %w", spec.Blob, err)
	}
	if err := os.Rename(s.newPack(rec.ID), s.PackPath(rec.ID)); err != nil {
		return fmt.Errorf("unpack layer %s: %w", rec.ID, err)
	}
	s.keepPack(rec.ID, w.File())
	kept = true
	s.metaCache.drop(rec.ID)
	if st.Entries > largeLayer {
		debug.FreeOSMemory() // the metadata go before a view needs as much
	}
	if anew {
		if err := s.mended(ctx, rec.ID); err != nil {
			return err
		}
	}
	if spec.Ended != nil {
		spec.Ended(rec.ID)
	}
	nvm, err := s.occupied(rec.ID)
	if err != nil {
		return err
	}
	var decision json.RawMessage
	if spec.Decision != nil {
		decision = spec.Decision(res)
	}
	err = s.updateLayer(ctx, rec.ID, func(l *Layer) {
		l.State, l.Damaged, l.Boot, l.DiffID = Stored, "", s.config.BootID, res.DiffID
		l.Pack, l.Holes, l.NVM = st.Size, st.HoleBytes, nvm
		l.Tar, l.Data, l.Files = res.Uncompressed, st.DataBytes, st.Files
		l.Usage = snapshots.Usage{Size: st.Size, Inodes: st.Inodes}
		if decision != nil {
			l.Decision = decision
		}
		if anew {
			l.Repairs++
		}
	})
	if err != nil {
		return err
	}
	log.G(ctx).WithFields(log.Fields{"layer": rec.ID, "blob": spec.Blob, "files": st.Files, "bytes": st.DataBytes, "nvm": nvm, "holes": st.HoleBytes}).Info("layer stored")
	return nil
}

// newPack is where a pack is written.
func (s *Store) newPack(id LayerID) string { return s.path("p", "."+id.String()+".new") }

// mended has everybody who comes next see the new pack of a layer, and replaces
// the files on NVM that were written with the old one.
func (s *Store) mended(ctx context.Context, id LayerID) error {
	if err := s.views.forget(ctx, id); err != nil {
		return fmt.Errorf("mend layer %s: %w", id, err)
	}
	for e, err := range s.Tiers.OnNVM(id.String()) {
		if err != nil {
			return fmt.Errorf("mend layer %s: %w", id, err)
		}
		if err := s.replaceOnNVM(ctx, pack.Ref{Layer: uint64(id), Number: e.Number}); err != nil {
			return fmt.Errorf("mend layer %s: file %d: %w", id, e.Number, err)
		}
	}
	return nil
}

// nvmFiles brings files of a layer that is being unpacked to NVM. They stand
// under their names at once: nothing refers to the layer yet.
type nvmFiles struct {
	s  *Store
	id LayerID
}

// uncachedFrom is the size from which a file that goes to NVM alone is not cached:
// of one that is, the trace of the first start could not tell what it touches
// (package trace), and all of it would stay on NVM. Reading it from there costs a
// start little.
const uncachedFrom = 256 << 10

// Create implements [unpack.NVM].
func (n nvmFiles) Create(number uint32, alone bool) (unpack.NVMFile, error) {
	f, err := n.s.Tiers.CreateData(n.id.String(), number)
	switch {
	case err != nil:
		return nil, err
	case alone:
		return tier.NewUncached(f, uncachedFrom), nil
	}
	return f, nil
}

// Remove implements [unpack.NVM].
func (n nvmFiles) Remove(number uint32) error {
	err := os.Remove(n.s.Tiers.DataFile(n.id.String(), number))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// Find returns the layer of a blob, as [Store.Begin] would.
func (s *Store) Find(blob digest.Digest) (Layer, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if id, ok := s.byBlob[blob.String()]; ok && s.layers[id] != nil {
		return s.layers[id].rec, true
	}
	return Layer{}, false
}

// Backlog is how many bytes of packs are not on the HDD yet.
func (s *Store) Backlog() int64 { return s.flusher.Backlog() }
