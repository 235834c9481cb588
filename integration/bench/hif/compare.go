// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/continuity/sysx"
	"golang.org/x/sys/unix"
)

// integrity says how much of an image was compared, and what differed.
type integrity struct {
	Entries int      `json:"entries"`
	Bytes   int64    `json:"bytes"`
	Errors  int      `json:"errors"`
	First   []string `json:"first,omitempty"`
}

// told bounds how many differences are named.
const told = 20

func (i *integrity) differ(format string, args ...any) {
	if i.Errors++; i.Errors <= told {
		i.First = append(i.First, fmt.Sprintf(format, args...))
	}
}

// compare holds two trees against each other: names, types, owners, modes, times, links, extended attributes, and every
// byte. Times of directories are left out: those that a layer has no entry for are made when it is unpacked.
func compare(ctx context.Context, want, got string) (*integrity, error) {
	c := &comparison{want: want, got: got, a: make([]byte, 1<<20), b: make([]byte, 1<<20)}
	return &c.integrity, c.directory(ctx, ".")
}

type comparison struct {
	integrity
	want, got string
	a, b      []byte
}

func (c *comparison) directory(ctx context.Context, dir string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	want, err := os.ReadDir(filepath.Join(c.want, dir))
	if err != nil {
		return err
	}
	got, err := os.ReadDir(filepath.Join(c.got, dir))
	if err != nil {
		c.differ("/%s: %v", dir, err)
		return nil
	}
	names := func(entries []os.DirEntry) (names []string) {
		for _, e := range entries {
			names = append(names, e.Name())
		}
		return names
	}
	wanted, have := names(want), names(got)
	for _, name := range have {
		if !slices.Contains(wanted, name) {
			c.differ("/%s: should not be there", filepath.Join(dir, name))
		}
	}
	for _, e := range want {
		path := filepath.Join(dir, e.Name())
		if !slices.Contains(have, e.Name()) {
			c.differ("/%s: is missing", path)
			continue
		}
		if err := c.entry(path); err != nil {
			return err
		}
		if e.IsDir() {
			if err := c.directory(ctx, path); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *comparison) entry(path string) error {
	c.Entries++
	want, got := filepath.Join(c.want, path), filepath.Join(c.got, path)
	var a, b unix.Stat_t
	if err := unix.Lstat(want, &a); err != nil {
		return fmt.Errorf("compare %q: %w", want, err)
	}
	if err := unix.Lstat(got, &b); err != nil {
		c.differ("/%s: %v", path, err)
		return nil
	}
	dir := a.Mode&unix.S_IFMT == unix.S_IFDIR
	switch {
	case a.Mode != b.Mode || a.Uid != b.Uid || a.Gid != b.Gid || a.Rdev != b.Rdev:
		c.differ("/%s: mode %o, owner %d:%d, device %d; should be %o, %d:%d, %d", path, b.Mode, b.Uid, b.Gid, b.Rdev, a.Mode, a.Uid, a.Gid, a.Rdev)
	case !dir && (a.Size != b.Size || a.Mtim != b.Mtim):
		c.differ("/%s: size %d, time %v; should be %d, %v", path, b.Size, b.Mtim, a.Size, a.Mtim)
	}
	if x, y := attributes(want), attributes(got); x != y {
		c.differ("/%s: attributes %q; should be %q", path, y, x)
	}
	switch a.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		x, err := os.Readlink(want)
		if err != nil {
			return err
		}
		if y, err := os.Readlink(got); err != nil || x != y {
			c.differ("/%s: leads to %q (%v); should to %q", path, y, err, x)
		}
	case unix.S_IFREG:
		if b.Mode&unix.S_IFMT == unix.S_IFREG {
			return c.content(path)
		}
	}
	return nil
}

// content compares two files byte by byte.
func (c *comparison) content(path string) error {
	want, err := os.Open(filepath.Join(c.want, path))
	if err != nil {
		return err
	}
	defer want.Close()
	got, err := os.Open(filepath.Join(c.got, path))
	if err != nil {
		c.differ("/%s: %v", path, err)
		return nil
	}
	defer got.Close()
	for {
		n, err := io.ReadFull(want, c.a)
		end := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
		if err != nil && !end {
			return fmt.Errorf("compare %q: %w", path, err)
		}
		m, gotErr := io.ReadFull(got, c.b)
		if gotErr != nil && !errors.Is(gotErr, io.EOF) && !errors.Is(gotErr, io.ErrUnexpectedEOF) {
			c.differ("/%s: %v", path, gotErr)
			return nil
		}
		if !bytes.Equal(c.a[:n], c.b[:m]) {
			c.differ("/%s: other content", path)
			return nil
		}
		c.Bytes += int64(n)
		if end {
			return nil
		}
	}
}

// attributes are all extended attributes of a path, as a text.
func attributes(path string) string {
	names, err := sysx.LListxattr(path)
	if err != nil {
		return err.Error()
	}
	slices.Sort(names)
	var b strings.Builder
	for _, name := range names {
		value, err := sysx.LGetxattr(path, name)
		fmt.Fprintf(&b, "%s=%x %v\n", name, value, err)
	}
	return b.String()
}
