// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/placement/tier"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// copyPiece is how many bytes are copied between two calls of pace.
const copyPiece = 512 << 10

// Promote copies one file from its pack to NVM, where the kernel looks first. It
// may be open, mapped or executed meanwhile: who has it open keeps the inode that
// it has, who opens it next gets the copy. It is on NVM under its name only when
// it is whole, checked and synced, since a torn one would hide the good one. A
// file that is on NVM already is no work. pace is called before each piece and may end the work by an error.
//
// Errors: ErrNotFound if there is no such file; ErrDataLoss if the pack is damaged there.
func (s *Store) Promote(ctx context.Context, redirect string, pace func(int) error) (copied int64, err error) {
	ref, err := pack.ParseRedirect(redirect)
	if err != nil {
		return 0, err
	}
	if s.OnNVM(ref) >= 0 {
		return 0, nil
	}
	return s.promote(ctx, ref, pace)
}

// PromoteNew copies a file of a layer that is not stored yet from its pack to NVM,
// in a call of [Spec.Ended].
func (s *Store) PromoteNew(id LayerID, number uint32) error {
	_, err := s.promote(s.ctx, pack.Ref{Layer: uint64(id), Number: number}, func(int) error { return nil })
	if errdefs.IsNotFound(err) {
		return nil // the layer itself has replaced it
	}
	return err
}

func (s *Store) promote(ctx context.Context, ref pack.Ref, pace func(int) error) (copied int64, err error) {
	f, e, err := s.extent(ref)
	if err != nil {
		return 0, fmt.Errorf("promote %s: %w", ref.Redirect(), err)
	}
	defer f.Close()
	tmp, err := os.CreateTemp(s.Tiers.StagingRoot(placement.NVM), ".up-")
	if err != nil {
		return 0, fmt.Errorf("promote %s: %w", ref.Redirect(), err)
	}
	defer func() {
		tmp.Close()
		if err != nil {
			os.Remove(tmp.Name())
		}
	}()
	in := tier.Passing(f, int64(e.Block)*pack.BlockSize)
	var sum uint32
	buf := make([]byte, min(copyPiece, e.Size))
	for copied < e.Size {
		piece := buf[:min(int64(len(buf)), e.Size-copied)]
		if err := errors.Join(ctx.Err(), pace(len(piece))); err != nil {
			return copied, err
		}
		if _, err := io.ReadFull(in, piece); err != nil {
			return copied, fmt.Errorf("promote %s: read pack: %w", ref.Redirect(), err)
		}
		sum = pack.Sum(sum, piece)
		if _, err := tmp.Write(piece); err != nil {
			return copied, fmt.Errorf("promote %s: %w", ref.Redirect(), err)
		}
		copied += int64(len(piece))
	}
	if sum != e.Sum {
		return copied, fmt.Errorf("promote %s: the pack does not hold what was unpacked: %w", ref.Redirect(), errdefs.ErrDataLoss)
	}
	if err := tmp.Sync(); err != nil {
		return copied, fmt.Errorf("promote %s: %w", ref.Redirect(), err)
	}
	// Cached, it would take memory for nothing, and a trace could not tell what of
	// it is touched.
	_ = unix.Fadvise(int(tmp.Fd()), 0, 0, unix.FADV_DONTNEED) // a hint
	layer := LayerID(ref.Layer).String()
	if err := s.Tiers.PlaceData(tmp.Name(), layer, ref.Number); err != nil {
		return copied, fmt.Errorf("promote %s: %w", ref.Redirect(), err)
	}
	if s.going(LayerID(ref.Layer)) { // its files on NVM may have been removed before
		return copied, errors.Join(fmt.Errorf("promote %s: layer %d: %w", ref.Redirect(), ref.Layer, errdefs.ErrNotFound), s.Tiers.RemoveData(layer))
	}
	return copied, nil
}

// going reports whether a layer is being removed, or was.
func (s *Store) going(id LayerID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.layers[id]
	return l == nil || l.dying
}

// extent opens the pack of a file and finds the file in it.
func (s *Store) extent(ref pack.Ref) (*os.File, pack.Extent, error) {
	f, err := os.Open(s.PackPath(LayerID(ref.Layer)))
	if errors.Is(err, os.ErrNotExist) {
		err = fmt.Errorf("layer %d: %w", ref.Layer, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, pack.Extent{}, err
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, pack.Extent{}, err
	}
	e, err := pack.ReadExtent(f, st.Size(), ref.Number)
	if err != nil {
		f.Close()
		return nil, e, err
	}
	return f, e, nil
}

// Extent is the place of a file in the pack of its layer. ErrNotFound if there is no such file.
func (s *Store) Extent(ref pack.Ref) (pack.Extent, error) {
	f, e, err := s.extent(ref)
	if err != nil {
		return e, fmt.Errorf("find %s in its pack: %w", ref.Redirect(), err)
	}
	return e, f.Close()
}

// PackFile says where in the pack of its layer a file begins, in blocks of
// [pack.BlockSize], and how many bytes it has. ErrNotFound if there is no such file.
func (s *Store) PackFile(ref pack.Ref) (block uint32, size int64, err error) {
	e, err := s.Extent(ref)
	return e.Block, e.Size, err
}

// OnNVM is the size of a file on NVM, -1 if it is not there.
func (s *Store) OnNVM(ref pack.Ref) int64 {
	return s.Tiers.DataSize(LayerID(ref.Layer).String(), ref.Number)
}

// Demote takes a file off NVM. Its layer must be at home on HDD, which
// ErrFailedPrecondition says it is not. Of the bytes that the file occupied it
// tells which are free now and which are held by somebody who has it open.
func (s *Store) Demote(redirect string, pins *tier.Pins) (freed, held int64, err error) {
	ref, err := pack.ParseRedirect(redirect)
	if err != nil {
		return 0, 0, err
	}
	l, err := s.Layer(LayerID(ref.Layer))
	if err != nil {
		return 0, 0, err
	}
	if l.State != Home || l.Damaged != "" {
		return 0, 0, fmt.Errorf("demote %s: its layer is not whole on HDD: %w", redirect, errdefs.ErrFailedPrecondition)
	}
	return pins.Unlink(s.Tiers.DataFile(l.ID.String(), ref.Number))
}

// replaceOnNVM writes a file on NVM anew from its pack. It is not compared first: where
// the device has lost a write, the page cache still has what was written. A file
// that NVM does not take leaves it.
func (s *Store) replaceOnNVM(ctx context.Context, ref pack.Ref) error {
	f, e, err := s.extent(ref)
	if err != nil {
		return err
	}
	f.Close()
	if e.Hole {
		return nil // it was written with the pack, and stands nowhere else
	}
	_, err = s.promote(ctx, ref, func(int) error { return nil })
	if err == nil || errdefs.IsDataLoss(err) || ctx.Err() != nil {
		return err
	}
	log.G(ctx).WithError(err).Warn("a file leaves NVM, which does not take it any more")
	return os.Remove(s.Tiers.DataFile(LayerID(ref.Layer).String(), ref.Number))
}

// Counted records how many bytes a layer occupies on NVM, after files of it have
// changed tier. Nobody is told, since no step follows: whoever moves files would
// be given another plan after each layer, and never come to the end of one.
func (s *Store) Counted(ctx context.Context, id LayerID, bytes int64) error {
	l, err := s.Layer(id)
	if err != nil || bytes == l.NVM {
		return err // a transaction would write to both tiers
	}
	err = s.writeLayer(ctx, id, func(l *Layer) { l.NVM = bytes })
	if err == nil {
		s.refresh(id)
	}
	return err
}
