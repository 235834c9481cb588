// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package region

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"github.com/nhybrid/nhybrid/scmlib/region/stream"
)

// Image is the content of a region at one instant.
type Image struct {
	Record Record
	Taken  time.Time
	Stood  time.Duration // for how long containers stood still for it

	f       *os.File
	used    int64
	slow    *rate.Limiter
	release func()
}

// Close gives back the room that the image takes.
func (i *Image) Close() error {
	defer i.release()
	return i.f.Close()
}

// Encode writes the image as a stream, at the store's rate.
func (i *Image) Encode(ctx context.Context, w io.Writer) (stream.Stats, error) {
	b := bufio.NewWriterSize(w, burst)
	e, err := stream.NewEncoder(b, stream.Header{Size: i.Record.Size, Name: i.Record.Ref.String(), Created: i.Taken})
	if err != nil {
		return stream.Stats{}, err
	}
	err = eachExtent(usedOf(i.f, i.Record.Size), func(off int64, data []byte) error {
		if err := i.slow.WaitN(ctx, len(data)); err != nil {
			return err
		}
		return e.Write(off, data)
	})
	if err != nil {
		return stream.Stats{}, err
	}
	stats, err := e.Close()
	if err == nil {
		err = b.Flush()
	}
	return stats, err
}

// Take copies the used parts of a region. Containers that have it stand still meanwhile: what a copy of memory that changes would hold is no state that the memory
// ever had. A container that cannot be frozen is an error. also, if not nil, is done while they stand still.
func (s *Store) Take(ctx context.Context, ref Ref, also func(context.Context) error) (*Image, error) {
	release, err := s.hold(ctx, ref)
	if err != nil {
		return nil, err
	}
	defer release()
	i, err := s.take(ctx, ref, also)
	if err != nil {
		return nil, fmt.Errorf("copy region %s: %w", ref, err)
	}
	return i, nil
}

func (s *Store) take(ctx context.Context, ref Ref, also func(context.Context) error) (_ *Image, err error) {
	r, err := s.get(ref)
	if err != nil {
		return nil, err
	}
	src, err := openData(s.data(ref), os.O_RDONLY)
	if err != nil {
		return nil, err
	}
	if ref.Kind == Snapshot {
		return &Image{Record: r, Taken: r.Created, f: src, used: r.Used, slow: s.slow, release: func() {}}, nil
	}
	defer src.Close()
	// Most of it is as it will be when the containers stand still, so this tells how much room a copy needs; a little more may be written meanwhile.
	n, err := count(usedOf(src, r.Size))
	if err != nil {
		return nil, err
	}
	spare, err := s.reserve(want{size: n + n/8 + burst})
	if err != nil {
		return nil, err
	}
	i := &Image{Record: r, slow: s.slow, release: spare.release}
	defer func() {
		if err != nil {
			i.release()
			if i.f != nil {
				i.f.Close()
			}
		}
	}()
	if i.f, err = s.tmpfile(); err != nil {
		return nil, err
	}
	// To clone is faster than to copy, but a store of the container to a block that two files share needs a new one, for which there may be no room:
	// so it is done where all of the region fits once more, and undone by copying what was cloned as soon as the container runs again.
	shared, err := s.tmpfile()
	if err != nil {
		return nil, err
	}
	defer shared.Close()
	cloned := false
	err = s.still(ctx, &r, &i.Stood, func() error {
		i.Taken = time.Now().UTC()
		if b, err := s.Books(); err == nil && room(b) >= r.Size {
			cloned = clone(shared, src)
		}
		var err error
		if !cloned {
			i.used, err = sparse(ctx, s.fast, i.f, r.Size, usedOf(src, r.Size))
		}
		if err == nil && also != nil {
			err = also(ctx)
		}
		return err
	})
	if err == nil && cloned {
		i.used, err = sparse(ctx, s.fast, i.f, r.Size, usedOf(shared, r.Size))
	}
	if err != nil {
		return nil, err
	}
	return i, nil
}

// tmpfile makes a file without a name on the NVM: it is gone with whoever has it open.
func (s *Store) tmpfile() (*os.File, error) {
	dir := filepath.Join(s.root, "tmp")
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("make file below %q: %w", dir, err)
	}
	return os.NewFile(uintptr(fd), filepath.Join(dir, "unnamed")), nil
}

// still does fn while all containers that have a region stand still.
func (s *Store) still(ctx context.Context, r *Record, stood *time.Duration, fn func() error) (err error) {
	var groups []*freezer
	for _, u := range r.Users {
		if !u.Alive() {
			continue
		}
		f, err := freezerOf(u.Pid)
		if err != nil {
			return fmt.Errorf("container %s has the region and cannot be frozen: %w", u.Container, err)
		}
		if !f.wasStopped && !slices.ContainsFunc(groups, func(g *freezer) bool { return g.file == f.file }) {
			groups = append(groups, f)
			r.Frozen = append(r.Frozen, f.file)
		}
	}
	if len(groups) == 0 {
		return fn()
	}
	// Written first: should this daemon die in between, the next one thaws them.
	if err := s.updateUse(*r); err != nil {
		return err
	}
	began := time.Now()
	defer func() {
		for _, g := range groups {
			err = errors.Join(err, g.thaw())
		}
		*stood = time.Since(began)
		r.Frozen = nil
		err = errors.Join(err, s.updateUse(*r))
	}()
	for _, g := range groups {
		if err := g.freeze(ctx); err != nil {
			return err
		}
	}
	s.step("frozen")
	return fn()
}

// Snapshot keeps the content of a region under a name.
func (s *Store) Snapshot(ctx context.Context, ref Ref, name string) (Record, error) {
	to := Ref{Snapshot, ref.Namespace, name}
	release, err := s.hold(ctx, to)
	if err != nil {
		return Record{}, err
	}
	defer release()
	if err := s.vacant(to); err != nil {
		return Record{}, err
	}
	if ref.Kind == Snapshot {
		return Record{}, fmt.Errorf("snapshot %s: it is one: %w", ref, errdefs.ErrInvalidArgument)
	}
	i, err := s.Take(ctx, ref, nil)
	if err != nil {
		return Record{}, err
	}
	defer i.Close()
	r := Record{Ref: to, Size: i.Record.Size, Used: i.used, Origin: ref.String(), Tenant: i.Record.Tenant}
	promise, err := s.reserve(want{namespace: r.Owner(), size: i.used, regions: 1, have: i.used})
	if err != nil {
		return r, fmt.Errorf("snapshot %s: %w", ref, err)
	}
	defer promise.release()
	dir, err := s.scratch()
	if err != nil {
		return r, err
	}
	if err = i.f.Sync(); err == nil {
		err = unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", i.f.Fd()), unix.AT_FDCWD, filepath.Join(dir, "data"), unix.AT_SYMLINK_FOLLOW)
	}
	if err == nil {
		err = s.finish(ctx, dir, &r, plan{promise: promise})
	}
	if err != nil {
		return r, errors.Join(fmt.Errorf("snapshot %s: %w", ref, err), os.RemoveAll(dir))
	}
	log.G(ctx).WithFields(log.Fields{"region": ref.String(), "snapshot": name, "used": i.used, "stood": i.Stood}).Info("snapshot of a region")
	return r, nil
}

// Clone makes a volume with the content of a region.
func (s *Store) Clone(ctx context.Context, ref Ref, name string, o CreateOptions) (Record, error) {
	to := Ref{Volume, ref.Namespace, name}
	// Before the name of the copy is taken: whoever waited for a region of that name would wait for himself.
	if _, err := s.get(ref); err != nil {
		return Record{}, err
	}
	release, err := s.hold(ctx, to)
	if err != nil {
		return Record{}, err
	}
	defer release()
	if err := s.vacant(to); err != nil {
		return Record{}, err
	}
	i, err := s.Take(ctx, ref, nil)
	if err != nil {
		return Record{}, err
	}
	defer i.Close()
	r := Record{Ref: to, Size: max(o.Size, i.Record.Size), Shared: o.Shared, Origin: ref.String()}
	return s.make(ctx, r, plan{from: usedOf(i.f, i.Record.Size), fromSize: i.Record.Size, limit: s.slow})
}

// Export writes a region as a stream.
func (s *Store) Export(ctx context.Context, ref Ref, w io.Writer) (stream.Stats, error) {
	i, err := s.Take(ctx, ref, nil)
	if err != nil {
		return stream.Stats{}, err
	}
	defer i.Close()
	stats, err := i.Encode(ctx, w)
	if err != nil {
		return stats, fmt.Errorf("export %s: %w", ref, err)
	}
	return stats, nil
}

// Measure tells what Encode will write. It does not keep to the store's rate.
func (i *Image) Measure() (stream.Stats, error) {
	m := *i
	m.slow = rate.NewLimiter(rate.Inf, burst)
	return m.Encode(context.Background(), io.Discard)
}

// RegionOf names the region of a container: its own, or the volume that it was given last.
func (s *Store) RegionOf(namespace, container string) (Ref, error) {
	own := Ref{Container, namespace, container}
	_, err := s.Inspect(own)
	if err == nil || !errdefs.IsNotFound(err) {
		return own, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.regs {
		for _, u := range r.Users {
			if u.Namespace == namespace && u.Container == container {
				return r.Ref, nil
			}
		}
	}
	return own, fmt.Errorf("container %s has no region: %w", container, errdefs.ErrNotFound)
}
