// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package region

import (
	"bufio"
	"cmp"
	"context"
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/scmlib/region/api"
	"github.com/nhybrid/nhybrid/scmlib/region/stream"
)

// Attach gives a container that is being created its region, as a detached mount of its file. The region is made if the container has none yet: from
// image, the stream that its root filesystem carries, if that is not nil, or else zeros.
func (s *Store) Attach(ctx context.Context, a api.Attach, image *os.File) (_ *os.File, r Record, err error) {
	ref := Ref{Container, a.Namespace, a.Container}
	if err := ref.check(); err != nil {
		return nil, r, err
	}
	process, err := processOf(a.Pid)
	if err != nil {
		return nil, r, err
	}
	user := User{a.Namespace, a.Container, process}
	instance := ""
	if s.o.Identify != nil {
		if instance, err = s.o.Identify(ctx, a.Namespace, a.Container); err != nil {
			return nil, r, fmt.Errorf("region for container %s of namespace %q: %w", a.Container, a.Namespace, err)
		}
	}
	if a.Tenant != "" {
		if err := checkIdentifier("namespace", a.Tenant); err != nil {
			return nil, r, err
		}
	}
	if a.Volume != "" {
		ref = Ref{Volume, cmp.Or(a.Tenant, a.Namespace), a.Volume}
	}
	return s.give(ctx, ref, func() (Record, error) {
		if a.Volume != "" {
			return s.attachVolume(ctx, ref, user)
		}
		return s.attachOwn(ctx, Record{Ref: ref, Tenant: a.Tenant, Instance: instance, Users: []User{user}}, a, image)
	})
}

// Use gives a volume to a process of the host, under the same rules as to a container, until that process ends.
func (s *Store) Use(ctx context.Context, namespace, volume string, pid int) (*os.File, Record, error) {
	ref := Ref{Volume, namespace, volume}
	if err := ref.check(); err != nil {
		return nil, Record{}, err
	}
	process, err := processOf(pid)
	if err != nil {
		return nil, Record{}, err
	}
	return s.give(ctx, ref, func() (Record, error) {
		return s.attachVolume(ctx, ref, User{namespace, fmt.Sprintf("(process %d of the host)", pid), process})
	})
}

// give finds or makes a region and returns its mount.
func (s *Store) give(ctx context.Context, ref Ref, find func() (Record, error)) (_ *os.File, r Record, err error) {
	release, err := s.hold(ctx, ref)
	if err != nil {
		return nil, r, err
	}
	defer release()
	if r, err = find(); err != nil {
		return nil, r, err
	}
	if err := s.memory.stamp(s.data(ref)); err != nil {
		return nil, r, err
	}
	if err := s.guard.watch(s.data(ref)); err != nil {
		return nil, r, err
	}
	mount, err := detachedMount(s.data(ref))
	return mount, r, err
}

func (s *Store) attachVolume(ctx context.Context, ref Ref, user User) (Record, error) {
	r, err := s.get(ref)
	if errdefs.IsNotFound(err) {
		return r, missing(ref, err)
	}
	if err != nil {
		return r, err
	}
	r.Users = slices.DeleteFunc(living(r.Users), func(u User) bool { return u == user })
	if err := inUse(r, "attach"); err != nil && !r.Shared {
		return r, fmt.Errorf("%w, or make the volume shared", err)
	}
	if err := s.restoreBlocks(ctx, r, len(r.Users) == 0); err != nil {
		return r, err
	}
	r.Users = append(r.Users, user)
	return r, s.updateUse(r)
}

// attachOwn finds or makes the region of the container that fresh describes.
func (s *Store) attachOwn(ctx context.Context, fresh Record, a api.Attach, image *os.File) (Record, error) {
	r, err := s.get(fresh.Ref)
	if err == nil && r.Instance != fresh.Instance {
		if err = s.replaced(ctx, r); err != nil {
			return r, err
		}
		err = errdefs.ErrNotFound
	}
	switch {
	case errdefs.IsNotFound(err):
		return s.makeOwn(ctx, fresh, a, image)
	case err != nil:
		return r, err
	case a.Size != 0 && a.Size != r.Size:
		return r, fmt.Errorf("container %s has a region of %s, not %s: remove it by nhybridctl scm rm container/%s, or ask for its size: %w",
			a.Container, FormatSize(r.Size), FormatSize(a.Size), a.Container, errdefs.ErrFailedPrecondition)
	}
	// One that an earlier start has left behind still has it.
	r.Users = slices.DeleteFunc(living(r.Users), func(u User) bool { return u == fresh.Users[0] })
	if err := s.restoreBlocks(ctx, r, len(r.Users) == 0); err != nil {
		return r, err
	}
	r.Users = append(r.Users, fresh.Users...)
	return r, s.updateUse(r)
}

// replaced makes way for the region of another container of the same id. The caller holds the region of the earlier one.
func (s *Store) replaced(ctx context.Context, r Record) error {
	if r.Keep || s.o.Keep {
		return s.becomeVolume(r)
	}
	if err := inUse(r, "remove region of an earlier container of this id,"); err != nil {
		return err
	}
	log.G(ctx).WithField("container", r.Name).Info("region of an earlier container of this id is removed")
	return unlessLeft(s.drop(r))
}

func (s *Store) makeOwn(ctx context.Context, r Record, a api.Attach, image *os.File) (Record, error) {
	if image == nil {
		if a.FromImage {
			return r, fmt.Errorf("the image of container %s has no region at /%s: ask for a size: %w", a.Container, api.Image, errdefs.ErrNotFound)
		}
		r.Size = a.Size
		return s.make(ctx, r, plan{limit: s.fast})
	}
	st, err := image.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("it is not a regular file: %w", errdefs.ErrInvalidArgument)
	}
	var d *stream.Decoder
	if err == nil {
		d, err = decoder(image)
	}
	if err == nil && a.Size != 0 && a.Size < d.Header().Size {
		err = fmt.Errorf("it has %s, the container asks for %s: ask for as much, or for %s=image: %w", FormatSize(d.Header().Size), FormatSize(a.Size),
			api.Kind, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return r, fmt.Errorf("region /%s in the image of container %s: %w", api.Image, a.Container, err)
	}
	r.Size, r.Origin = max(a.Size, d.Header().Size), origin("image", d.Header())
	r, err = s.make(ctx, r, plan{from: d, fromSize: d.Header().Size, limit: s.fast})
	if err != nil {
		return r, fmt.Errorf("start from /%s in the image of container %s: %w", api.Image, a.Container, err)
	}
	return r, nil
}

func decoder(r io.Reader) (*stream.Decoder, error) {
	return stream.NewDecoder(bufio.NewReaderSize(r, burst))
}

// detachedMount is a mount of a file that is not below any directory yet.
func detachedMount(path string) (*os.File, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_SYMLINK_NOFOLLOW)
	if err != nil {
		return nil, fmt.Errorf("make mount of region: %w", err)
	}
	f := os.NewFile(uintptr(fd), path)
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC, Propagation: unix.MS_PRIVATE}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		f.Close()
		return nil, fmt.Errorf("make mount of region: %w", err)
	}
	return f, nil
}
