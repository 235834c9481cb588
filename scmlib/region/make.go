// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package region

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/time/rate"

	"github.com/nhybrid/nhybrid/scmlib/region/stream"
)

// plan is how a region comes into being.
type plan struct {
	from     extents // nil: zeros
	fromSize int64   // of the region that from is of, if it shall be larger than that
	limit    *rate.Limiter
	pooled   bool // the directory is in the pool
	promise  *promise
}

// make brings a region into being. The caller holds it.
func (s *Store) make(ctx context.Context, r Record, p plan) (_ Record, err error) {
	if err := s.vacant(r.Ref); err != nil {
		return r, err
	}
	if err := stream.CheckSize(r.Size); err != nil {
		return r, err
	}
	if p.fromSize == 0 {
		p.fromSize = r.Size
	}
	dir, have := "", int64(0)
	if p.fromSize == r.Size {
		if dir = s.takePooled(r.Size); dir != "" {
			have, p.pooled = r.Size, true
		}
	}
	defer func() {
		if err != nil && dir != "" {
			err = errors.Join(err, s.discard(dir))
		}
	}()
	if p.promise, err = s.reserve(want{namespace: r.Owner(), size: r.Size, regions: 1, have: have}); err != nil {
		return r, fmt.Errorf("make region %s: %w", r.Ref, err)
	}
	defer p.promise.release()
	s.step("reserved")
	switch {
	case dir == "":
		if dir, err = s.scratch(); err == nil {
			err = makeData(ctx, p.limit, dir, p.fromSize, p.from)
		}
	case p.from != nil:
		// Its new place is not one from which a crash brings it back: see findPool. So it is made like one that never waited.
		p.pooled = false
		if dir, err = s.leavePool(dir); err == nil {
			err = overlay(ctx, p.limit, filepath.Join(dir, "data"), r.Size, p.from)
		}
	}
	if err == nil {
		err = s.finish(ctx, dir, &r, p)
	}
	if err != nil {
		return r, fmt.Errorf("make region %s: %w", r.Ref, err)
	}
	dir = ""
	return r, nil
}

// finish gives the data in dir its metadata and its place.
func (s *Store) finish(ctx context.Context, dir string, r *Record, p plan) error {
	path := filepath.Join(dir, "data")
	s.step("data written")
	if p.from != nil {
		if err := adopt(path); err != nil {
			return err
		}
	}
	if p.fromSize != 0 && p.fromSize != r.Size {
		if err := s.growData(ctx, path, p.fromSize, r.Size); err != nil {
			return err
		}
	}
	r.ID, r.Created = randomID(), time.Now().UTC()
	var err error
	if p.pooled {
		err = claim(dir, *r)
	} else {
		err = errors.Join(writeFile(filepath.Join(dir, unsure), nil, false), writeFile(filepath.Join(dir, "meta"), stripped(*r), false))
	}
	if err != nil {
		return err
	}
	if len(r.Users) > 0 {
		if err := writeUse(dir, *r); err != nil {
			return err
		}
	}
	s.step("meta written")
	if err := os.Rename(dir, s.dir(r.Ref)); err != nil {
		return err
	}
	s.step("in place")
	if p.pooled {
		err = os.Remove(filepath.Join(s.dir(r.Ref), unsure))
	} else {
		err = settled(s.dir(r.Ref))
	}
	if err != nil {
		return errors.Join(err, s.discard(s.dir(r.Ref)))
	}
	p.promise.kept(func() { s.regs[r.key()] = *r })
	s.refill()
	s.tell()
	return nil
}

func (s *Store) vacant(ref Ref) error {
	if err := ref.check(); err != nil {
		return err
	}
	_, err := s.get(ref)
	switch {
	case err == nil:
		return fmt.Errorf("region %s of namespace %q: %w", ref, ref.Namespace, errdefs.ErrAlreadyExists)
	case errdefs.IsNotFound(err):
		return nil
	}
	return err
}

// CreateOptions of a volume.
type CreateOptions struct {
	Size   int64 `json:"size"`
	Shared bool  `json:"shared"` // several containers may have it at a time; who writes is decided by the lock of scmlib
}

// Create makes a volume of zeros.
func (s *Store) Create(ctx context.Context, namespace, name string, o CreateOptions) (Record, error) {
	ref := Ref{Volume, namespace, name}
	release, err := s.hold(ctx, ref)
	if err != nil {
		return Record{}, err
	}
	defer release()
	return s.make(ctx, Record{Ref: ref, Size: o.Size, Shared: o.Shared}, plan{limit: s.fast})
}

// Import makes a volume from a stream, which is read to its end. Nothing is made of one that is damaged.
func (s *Store) Import(ctx context.Context, namespace, name string, from io.Reader) (Record, error) {
	ref := Ref{Volume, namespace, name}
	d, err := decoder(from)
	if err != nil {
		return Record{}, fmt.Errorf("import %s: %w", ref, err)
	}
	release, err := s.hold(ctx, ref)
	if err != nil {
		return Record{}, err
	}
	defer release()
	return s.make(ctx, Record{Ref: ref, Size: d.Header().Size, Origin: origin("import", d.Header())}, plan{from: d, limit: s.slow})
}

func origin(how string, h stream.Header) string {
	if h.Name == "" || checkOrigin(h.Name) != nil {
		return how
	}
	return fmt.Sprintf("%s of %s, %s", how, h.Name, h.Created.UTC().Format(time.RFC3339))
}

// checkOrigin holds what a stream says of itself to what is fit to be shown.
func checkOrigin(s string) error {
	for _, c := range s {
		if c < ' ' || c > '~' {
			return errdefs.ErrInvalidArgument
		}
	}
	if len(s) > 200 {
		return errdefs.ErrInvalidArgument
	}
	return nil
}

// Remove removes a region that nobody has.
func (s *Store) Remove(ctx context.Context, ref Ref) error {
	release, err := s.hold(ctx, ref)
	if err != nil {
		return err
	}
	defer release()
	r, err := s.Inspect(ref)
	if err != nil {
		return err
	}
	if err := inUse(r, "remove"); err != nil {
		return err
	}
	return s.drop(r)
}

// drop removes a region. The caller holds it.
func (s *Store) drop(r Record) error {
	s.guard.forget(s.data(r.Ref))
	s.mu.Lock()
	delete(s.regs, r.key())
	delete(s.short, r.key())
	s.mu.Unlock()
	s.step("forgotten")
	err := s.discard(s.dir(r.Ref))
	if unlessLeft(err) == nil && r.Kind != Container { // what containers have is asked for again
		err = errors.Join(err, syncDir(filepath.Join(s.root, "k")))
	}
	s.refill()
	s.tell()
	return err
}

// SetKeep says whether a container's region becomes a volume when its container is removed.
func (s *Store) SetKeep(ctx context.Context, ref Ref, keep bool) error {
	release, err := s.hold(ctx, ref)
	if err != nil {
		return err
	}
	defer release()
	r, err := s.get(ref)
	if err != nil {
		return err
	}
	if ref.Kind != Container {
		return fmt.Errorf("keep %s: only the region of a container goes with something: %w", ref, errdefs.ErrInvalidArgument)
	}
	r.Keep = keep
	return s.update(r)
}

// Release is called when a container is gone: its region is removed, or becomes a volume of its name. Where the store can ask, it is not believed. A region
// that a process still maps is not removed, as its blocks would not be free: Release has to be called again when the process has ended.
func (s *Store) Release(ctx context.Context, namespace, container string) error {
	ref := Ref{Container, namespace, container}
	if ref.check() != nil {
		return nil // it cannot have had one
	}
	release, err := s.hold(ctx, ref)
	if err != nil {
		return err
	}
	defer release()
	r, err := s.get(ref)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if s.o.Identify != nil {
		switch now, err := s.o.Identify(ctx, namespace, container); {
		case err == nil && now == r.Instance:
			return nil
		case err != nil && !errdefs.IsNotFound(err):
			return fmt.Errorf("is container %s of namespace %q gone: %w", container, namespace, err)
		}
	}
	switch {
	case r.Keep || s.o.Keep:
		return s.becomeVolume(r)
	case alive(r.Users):
		log.G(ctx).WithFields(log.Fields{"region": ref.String(), "namespace": namespace}).Info("container is gone, but a process of it has its region, which stays until that ends")
		return nil
	}
	return unlessLeft(s.drop(r))
}

// becomeVolume turns a container's region into a volume, which whoever has it still has. The caller holds it. The directory alone says what it is: see readMeta.
func (s *Store) becomeVolume(r Record) error {
	old := r
	r.Ref = Ref{Volume, r.Owner(), r.Name}
	r.Origin, r.Tenant, r.Instance, r.Keep, r.Users = "container "+old.Name, "", "", false, living(r.Users)
	s.guard.forget(s.data(old.Ref))
	s.mu.Lock()
	_, taken := s.regs[r.key()]
	if _, busy := s.busy[r.key()]; taken || busy || r.Ref.check() != nil {
		r.Name = r.Name[:min(len(r.Name), maxIdentifier-len(r.ID)-1)] + "-" + r.ID
	}
	err := os.Rename(s.dir(old.Ref), s.dir(r.Ref))
	if err == nil {
		delete(s.regs, old.key())
		delete(s.short, old.key()) // it is looked for again under the new name
		s.regs[r.key()] = r
	}
	s.mu.Unlock()
	if err != nil {
		return fmt.Errorf("keep region of container %s as a volume: %w", old.Name, err)
	}
	s.step("renamed")
	err = errors.Join(s.updateUse(r), s.update(r))
	if len(r.Users) > 0 {
		err = errors.Join(err, s.guard.watch(s.data(r.Ref)))
		// It may have been written to while it was not watched. What lacks blocks then is in Problems.
		if rerr := s.restoreBlocks(context.Background(), r, false); !errdefs.IsResourceExhausted(rerr) {
			err = errors.Join(err, rerr)
		}
	}
	s.tell()
	return errors.Join(err, syncDir(filepath.Join(s.root, "k")))
}

// Reconcile releases the regions of all containers that are gone, as far as the store can ask, and tries again to remove what could not be removed.
func (s *Store) Reconcile(ctx context.Context) error {
	s.retryErase()
	if s.o.Identify == nil {
		return nil
	}
	var errs []error
	for _, r := range s.List("") {
		if r.Kind == Container {
			errs = append(errs, s.Release(ctx, r.Namespace, r.Name))
		}
	}
	return errors.Join(errs...)
}
