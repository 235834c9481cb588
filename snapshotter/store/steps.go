// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// perform does one step for a layer. Called with the layer's run lock held.
func (s *Store) perform(ctx context.Context, l *layer, rec Layer, step Step, why string) error {
	switch step {
	case Unpack:
		return s.unpackAnew(ctx, rec)
	case Pack:
		return s.packStaged(ctx, rec)
	case Sync:
		return s.sync(ctx)
	case Fill:
		return s.fill(ctx, rec)
	case Remove:
		return s.remove(ctx, l, rec)
	case Damage:
		return s.markDamaged(ctx, rec.ID, why)
	}
	return nil
}

// packStaged makes a pack of a committed directory. On NVM its data files are
// linked to their numbers, so that no byte moves; on HDD they are copied into the
// pack. The directory goes when the record says that it is not needed.
func (s *Store) packStaged(ctx context.Context, rec Layer) (err error) {
	below, err := s.Metas(ctx, rec.Parents)
	if err != nil {
		return fmt.Errorf("pack layer %s: %w", rec.ID, err)
	}
	dir := s.Tiers.Upper(rec.Tier, rec.Snapshot)
	m, files, stats, err := pack.Scan(ctx, dir, uint64(rec.ID), below)
	if err != nil {
		return fmt.Errorf("pack layer %s: %w", rec.ID, err)
	}
	if err := s.Tiers.RemoveData(rec.ID.String()); err != nil { // of an earlier try
		return err
	}
	w, err := pack.Create(s.newPack(rec.ID), s.flusher.options())
	if err != nil {
		return fmt.Errorf("pack layer %s: %w", rec.ID, err)
	}
	packed := false // the descriptor is the store's
	defer func() {
		if err != nil && !packed {
			err = errors.Join(err, w.Abort())
		}
	}()
	p := &packing{s: s, dir: dir, id: rec.ID, link: rec.Tier == placement.NVM, w: w}
	if err := p.files(ctx, m, files); err != nil {
		return fmt.Errorf("pack layer %s: %w", rec.ID, err)
	}
	st, err := w.Finish(m, pack.Identity{Layer: uint64(rec.ID)})
	if err != nil {
		return fmt.Errorf("pack layer %s: %w", rec.ID, err)
	}
	if err := os.Rename(s.newPack(rec.ID), s.PackPath(rec.ID)); err != nil {
		return fmt.Errorf("pack layer %s: %w", rec.ID, err)
	}
	s.keepPack(rec.ID, w.File())
	packed = true
	err = s.updateLayer(ctx, rec.ID, func(l *Layer) {
		l.State, l.Boot = Stored, s.config.BootID
		l.Pack, l.Holes, l.NVM = st.Size, p.holes, p.nvm
		l.Data, l.Files = st.DataBytes, st.Files
		l.Usage = snapshots.Usage{Size: stats.Bytes, Inodes: stats.Inodes}
		l.Snapshot, l.Parents = "", nil
	})
	if err != nil {
		return err
	}
	if err := s.Tiers.Unstage(rec.Snapshot); err != nil {
		log.G(ctx).WithError(err).Warn("could not clear a staging directory")
	}
	s.Quota.Forget(rec.Snapshot) // what is committed does not grow
	return nil
}

// packing brings the files of a directory to their numbers.
type packing struct {
	s          *Store
	id         LayerID
	dir        string
	link       bool
	w          *pack.Writer
	holes, nvm int64
}

func (p *packing) files(ctx context.Context, m *pack.Meta, files []string) error {
	byNumber := make([]*pack.Inode, len(files)+1)
	m.EachInode(func(i *pack.Inode) {
		if i.HasData() && i.Data.Layer == uint64(p.id) && int(i.Data.Number) < len(byNumber) {
			byNumber[i.Data.Number] = i
		}
	})
	root, err := os.OpenRoot(p.dir)
	if err != nil {
		return err
	}
	defer root.Close()
	for i, name := range files {
		if err := ctx.Err(); err != nil {
			return err
		}
		in := byNumber[i+1]
		if in == nil {
			return fmt.Errorf("file %q has no number: %w", name, errdefs.ErrInternal)
		}
		if err := p.file(root, name, in); err != nil {
			return fmt.Errorf("%q: %w", name, err)
		}
	}
	return nil
}

func (p *packing) file(root *os.Root, name string, in *pack.Inode) error {
	number, block, err := p.w.Begin(in.Size)
	if err != nil {
		return err
	}
	if number != in.Data.Number {
		return fmt.Errorf("it is number %d and was found as %d: %w", number, in.Data.Number, errdefs.ErrInternal)
	}
	in.Block = block
	f, err := openBelow(root, p.dir, name)
	if err != nil {
		return err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return err
	}
	if st.Size != in.Size {
		return fmt.Errorf("it has %d bytes now and had %d: %w", st.Size, in.Size, errdefs.ErrAborted)
	}
	if !p.link {
		if _, err := io.Copy(p.w, f); err != nil {
			return err
		}
		in.Sum, err = p.w.End()
		return err
	}
	if in.Sum, err = pack.SumOf(f); err != nil {
		return err
	}
	if err := p.s.Tiers.LinkData(f, p.id.String(), in.Data.Number); err != nil {
		return err
	}
	p.holes += in.Size
	p.nvm += 512 * st.Blocks
	if err := p.w.Hole(in.Sum); err != nil {
		return err
	}
	_, err = p.w.End()
	return err
}

// openBelow opens a file of a directory that may lie deeper than PATH_MAX allows.
func openBelow(root *os.Root, dir, name string) (*os.File, error) {
	if len(dir)+len(name) < unix.PathMax-1 {
		fd, err := unix.Open(filepath.Join(dir, name), unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return nil, err
		}
		return os.NewFile(uintptr(fd), name), nil
	}
	return root.Open(name)
}

// remove deletes all that stands of a layer, and then its record. Nobody can find
// the layer from here on: who asks for its blob gets a new one.
func (s *Store) remove(ctx context.Context, l *layer, rec Layer) error {
	s.mu.Lock()
	if l.holds > 0 || l.rec.Users > 0 {
		s.mu.Unlock()
		return nil // somebody was faster
	}
	l.dying = true
	if s.byBlob[rec.Blob.String()] == rec.ID {
		delete(s.byBlob, rec.Blob.String())
	}
	s.mu.Unlock()
	s.dropPack(rec.ID)
	s.metaCache.drop(rec.ID)
	if err := os.Remove(s.PackPath(rec.ID)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove pack of layer %s: %w", rec.ID, err)
	}
	if err := s.Tiers.RemoveData(rec.ID.String()); err != nil {
		return fmt.Errorf("remove layer %s from NVM: %w", rec.ID, err)
	}
	if rec.State == Staged {
		if err := s.Tiers.Unstage(rec.Snapshot); err != nil {
			return fmt.Errorf("remove directory of layer %s: %w", rec.ID, err)
		}
	}
	err := s.db.update(ctx, func(_ context.Context, tx *bolt.Tx) error {
		return own(tx, bucketLayers).Delete([]byte(rec.ID.String()))
	})
	if err != nil {
		return fmt.Errorf("remove record of layer %s: %w", rec.ID, err)
	}
	s.mu.Lock()
	delete(s.layers, rec.ID)
	s.signal(l)
	s.mu.Unlock()
	s.mirror.changed()
	return nil
}
