// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package parts

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"

	"github.com/nhybrid/nhybrid/internal/erofs"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// Verify reads all hot chunks of the image at path and compares them with the packs, whose paths packPath gives. pace
// is as for [Write], and counts what is read from HDD. A difference is errdefs.ErrDataLoss: one of the two is damaged, and
// the image can be written anew from whichever is good.
func Verify(ctx context.Context, path string, packPath func(layer uint64) string, pace func(int) error) error {
	image, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("verify parts image: %w", err)
	}
	defer image.Close()
	c, err := readFrom(image)
	if err != nil {
		return err
	}
	w := &writer{contents: c}
	if err := w.layout(); err != nil {
		return fmt.Errorf("verify parts image %q: %w", path, err)
	}
	packs, err := c.openPacks(packPath)
	if err != nil {
		return fmt.Errorf("verify parts image %q: %w", path, err)
	}
	defer closeAll(packs)
	for _, n := range w.nodes {
		if n.file == nil {
			continue
		}
		home := packs[c.device(n.at)-1]
		if err := compare(ctx, image, w.meta+n.block*erofs.BlockSize, home, int64(c.blocks[n.at])*erofs.BlockSize, n.file, pace); err != nil {
			return fmt.Errorf("verify parts image %q: %q: %w", path, n.file.Redirect, err)
		}
	}
	return nil
}

// compare holds the hot chunks, which stand at pos one behind the other, against the file that begins at base of its pack.
func compare(ctx context.Context, image *os.File, pos int64, home *os.File, base int64, f *File, pace func(int) error) error {
	got, want := make([]byte, copyPiece), make([]byte, copyPiece)
	for _, r := range f.Hot {
		for off := r.Offset; off < r.end(); {
			n := min(copyPiece, r.end()-off)
			if err := errors.Join(ctx.Err(), pace(int(n))); err != nil {
				return err
			}
			_, err := image.ReadAt(got[:n], pos)
			if _, err2 := home.ReadAt(want[:n], base+off); err == nil {
				err = err2
			}
			if err != nil && !errors.Is(err, io.EOF) {
				return err
			}
			if err != nil || !bytes.Equal(got[:n], want[:n]) {
				return fmt.Errorf("the parts on NVM differ from the pack within %d bytes at %d: %w", n, off, errdefs.ErrDataLoss)
			}
			off, pos = off+n, pos+n
		}
	}
	return nil
}

// trial is a pack of one file, for [Probe].
type trial struct {
	path string
	size int64
}

func (t trial) PackPath(uint64) string { return t.path }

func (t trial) PackFile(pack.Ref) (uint32, int64, error) { return 1, t.size, nil }

// Probe finds out whether this machine can mount parts, by doing so: with an image below nvm, a directory on NVM, and a pack
// below hdd, one on HDD. It leaves nothing behind. errdefs.ErrNotImplemented says that it cannot, and why; another error is
// about the trial itself.
//
// A kernel on which a file-backed EROFS counts as a level of stacking (host.Features.StackOK) mounts parts, too, and
// containers could then not mount an overlay of their own: the caller does without parts there.
func Probe(ctx context.Context, nvm, hdd string) (err error) {
	var dirs [2]string
	for i, root := range []string{nvm, hdd} {
		if dirs[i], err = os.MkdirTemp(root, ".parts-"); err != nil {
			return fmt.Errorf("make a directory to try parts: %w", err)
		}
		defer func() {
			if e := os.RemoveAll(dirs[i]); err == nil {
				err = e
			}
		}()
	}
	data := bytes.Repeat([]byte("nhybrid!"), 3*Chunk/8)
	packs := trial{filepath.Join(dirs[1], "pack"), int64(len(data))}
	if err := os.WriteFile(packs.path, append(make([]byte, Chunk), data...), 0o600); err != nil {
		return fmt.Errorf("try parts: %w", err)
	}
	image, point := filepath.Join(dirs[0], "image"), filepath.Join(dirs[0], "point")
	name := pack.Ref{Layer: 1, Number: 1}.Redirect()
	set := Set{Files: []File{{name, packs.size, []Range{{Chunk, Chunk}}}}}
	if _, err := Write(ctx, image, dirs[0], packs, set, func(int) error { return nil }); err != nil {
		return fmt.Errorf("try parts: %w", err)
	}
	if err := Mount(image, point, packs.PackPath); err != nil {
		return fmt.Errorf("try parts: %w", err)
	}
	defer func() {
		if e := Unmount(point); err == nil {
			err = e
		}
	}()
	got, err := os.ReadFile(point + name)
	if err != nil {
		return fmt.Errorf("try parts: the kernel mounts them and cannot read them: %w (%w)", err, errdefs.ErrNotImplemented)
	}
	if !bytes.Equal(got, data) {
		return fmt.Errorf("try parts: the kernel mounts them and reads something else: %w", errdefs.ErrNotImplemented)
	}
	return nil
}
