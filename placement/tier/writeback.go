// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package tier

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/placement"
)

// writeBackChunk is how many bytes are copied between two calls of pace.
const writeBackChunk = 512 << 10

// WriteBack copies the data of a layer from NVM to HDD, so that they stand on
// both, and returns the bytes copied. The caller syncs the HDD afterwards; only
// then the copy counts. Files that are there already with the right size are
// skipped, so that an interrupted call can be repeated within one run of the
// machine. After a crash the size of a file says nothing of its data: see
// [Store.DropCopy].
//
// pace is called before each piece of at most 512 KiB with its size; it may
// sleep, and ends the copying by an error.
func (s *Store) WriteBack(ctx context.Context, id string, pace func(int) error) (copied int64, err error) {
	from, to := s.Data(placement.NVM, id), s.Data(placement.HDD, id)
	type inode struct{ dev, ino uint64 }
	links := map[inode]string{}
	tmp := filepath.Join(s.roots[placement.HDD], "s", "."+id+".home")
	defer os.Remove(tmp)
	err = filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(from, path)
		dst := filepath.Join(to, rel)
		info, err := d.Info()
		if err != nil {
			return err
		}
		if d.IsDir() {
			return copyDir(info, dst)
		}
		// The rest of a layer, and empty files, is metadata: it stands in the capture.
		if !d.Type().IsRegular() || info.Size() == 0 {
			return nil
		}
		st := stat(info)
		if first, ok := links[inode{st.Dev, st.Ino}]; ok {
			return link(first, dst)
		}
		if st.Nlink > 1 {
			links[inode{st.Dev, st.Ino}] = dst
		}
		if have, err := os.Lstat(dst); err == nil && have.Mode().IsRegular() && have.Size() == info.Size() {
			return nil
		}
		n, err := copyFile(path, tmp, pace)
		copied += n
		if err != nil {
			return err
		}
		return os.Rename(tmp, dst)
	})
	if err != nil {
		return copied, fmt.Errorf("copy layer %q to HDD: %w", id, err)
	}
	return copied, nil
}

// DropCopy deletes the copy of a layer on HDD that an earlier run of the machine
// left unfinished; the layer stands on NVM.
//
// Only what stands on NVM too is a copy, and goes. A record that says less than
// was done, from an older copy of the database, must not cost the files that
// have left NVM since.
func (s *Store) DropCopy(id string) error {
	from, to := s.Data(placement.NVM, id), s.Data(placement.HDD, id)
	if !isDir(from) {
		return fmt.Errorf("layer %q is not on NVM: %w", id, errdefs.ErrFailedPrecondition)
	}
	err := filepath.WalkDir(to, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, os.ErrNotExist) {
			return nil // none was begun
		}
		if err != nil || d.IsDir() {
			return err
		}
		switch _, err := os.Lstat(from + path[len(to):]); {
		case errors.Is(err, os.ErrNotExist):
			return nil
		case err != nil:
			return err
		}
		return os.Remove(path)
	})
	if err != nil {
		return fmt.Errorf("drop the copy of layer %q on HDD: %w", id, err)
	}
	return nil
}

// copyDir makes a directory with owner and mode of the original, which
// containerd's applier reads for a layer on top that does not list it.
func copyDir(info fs.FileInfo, dst string) error {
	if err := os.Mkdir(dst, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	st := stat(info)
	if err := os.Lchown(dst, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	return syscall.Chmod(dst, st.Mode&0o7777)
}

// stat is what the os package keeps behind every FileInfo of its own on Linux.
func stat(info fs.FileInfo) *syscall.Stat_t {
	return info.Sys().(*syscall.Stat_t) //nolint:forcetypeassert // see above
}

func link(first, dst string) error {
	err := os.Link(first, dst)
	if errors.Is(err, os.ErrExist) {
		return nil
	}
	return err
}

// copyFile copies data and holes; everything else about the file is metadata
// and stands in the capture.
func copyFile(src, dst string, pace func(int) error) (n int64, err error) {
	in, err := os.Open(src)
	if err != nil {
		return 0, err
	}
	defer in.Close()
	st, err := in.Stat()
	if err != nil {
		return 0, err
	}
	out, err := os.OpenFile(dst, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return 0, err
	}
	defer func() {
		if e := out.Close(); err == nil {
			err = e
		}
	}()
	for off := int64(0); off < st.Size(); {
		data, err := syscall.Seek(int(in.Fd()), off, seekData)
		if errors.Is(err, syscall.ENXIO) {
			break // a hole up to the end
		}
		if err != nil {
			return n, err
		}
		hole, err := syscall.Seek(int(in.Fd()), data, seekHole)
		if err != nil {
			return n, err
		}
		source := &passing{in, data, unix.RWF_DONTCACHE}
		if _, err := out.Seek(data, io.SeekStart); err != nil {
			return n, err
		}
		for off = data; off < hole; {
			piece := min(writeBackChunk, hole-off)
			if err := pace(int(piece)); err != nil {
				return n, err
			}
			m, err := io.CopyN(out, source, piece)
			n, off = n+m, off+m
			if err != nil {
				return n, err
			}
			// Submitted here, the writes have the I/O class of this thread; left to the
			// kernel's flusher they would have its, and come all at once.
			if err := unix.SyncFileRange(int(out.Fd()), off-m, m, unix.SYNC_FILE_RANGE_WRITE); err != nil {
				return n, err
			}
		}
	}
	return n, out.Truncate(st.Size())
}

// passing reads a file and leaves in the page cache only what was there before
// (Linux 6.14): cached for a copy, it would take memory from others, and a start
// that is traced meanwhile would seem to touch all of it.
type passing struct {
	file  *os.File
	off   int64
	flags int
}

func (p *passing) Read(b []byte) (int, error) {
	n, err := unix.Preadv2(int(p.file.Fd()), [][]byte{b}, p.off, p.flags)
	if err != nil && p.flags != 0 && !errors.Is(err, unix.EINTR) { // an older kernel, or a filesystem that cannot
		p.flags = 0
		n, err = p.file.ReadAt(b, p.off)
		if n > 0 {
			err = nil
		}
	}
	switch {
	case errors.Is(err, unix.EINTR):
		return 0, nil
	case err != nil:
		return 0, err
	case n == 0 && len(b) > 0:
		return 0, io.EOF
	}
	p.off += int64(n)
	return n, nil
}

// Values of lseek(2).
const (
	seekData = 3
	seekHole = 4
)
