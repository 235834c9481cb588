// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"archive/tar"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// dataWriter writes the data files of one layer to the pack and to NVM. Small files stand in the metadata.
type dataWriter struct {
	ctx    context.Context
	pack   Pack
	opts   Options
	buffer []byte
	text   *text
	inline []byte             // of the small file in question
	keep   func([]byte) error // appends to inline

	numbers  uint32 // the highest number
	files    uint32
	bytes    int64
	nvmBytes int64
	holes    uint32
	nvmErr   error            // NVM gets no more files
	onNVM    map[uint32]onNVM // files that Create has made
}

type onNVM struct {
	size int64
	hole bool
}

func newDataWriter(ctx context.Context, p Pack, opts Options) *dataWriter {
	w := &dataWriter{ctx: ctx, pack: p, opts: opts, onNVM: map[uint32]onNVM{}}
	w.keep = func(p []byte) error { w.inline = append(w.inline, p...); return nil }
	return w
}

// write stores the data of the entry that r stands at and sets where it is in i.
func (w *dataWriter) write(i *pack.Inode, dir, base string, hdr *tar.Header, r io.Reader) error {
	if w.buffer == nil {
		w.buffer = getChunk()
	}
	size := hdr.Size
	if size > w.opts.MaxBytes-w.bytes {
		return bad(fmt.Errorf("data of all files is more than %d bytes", w.opts.MaxBytes))
	}
	if size == 0 {
		// A sparse file of no size may still have data in the tar: an error of r.
		if _, err := r.Read(w.buffer); err != nil && !errors.Is(err, io.EOF) {
			return bad(err)
		}
		return nil
	}
	if size <= pack.InlineMax {
		w.inline = w.inline[:0]
		if err := w.copy(size, r, w.keep); err != nil {
			return err
		}
		i.Size, i.Inline = size, w.text.cloneBytes(w.inline)
		w.files++
		w.bytes += size
		return nil
	}
	number, block, err := w.pack.Begin(size)
	if err != nil {
		return fmt.Errorf("begin a file of %d bytes in the pack: %w", size, err)
	}
	w.numbers = number
	f := file{w: w, number: number, toPack: true}
	if w.opts.NVM != nil && w.opts.Place != nil && w.nvmErr == nil {
		place := w.opts.Place(File{Path: strings.TrimPrefix(path.Join(dir, base), "/"), Size: size, Mode: uint32(hdr.Mode) & 0o7777, Number: number})
		if place != ToPack {
			f.create(place)
		}
	}
	defer f.close()
	if err := w.copy(size, r, f.write); err != nil {
		return err
	}
	sum, err := f.end()
	if err != nil {
		return err
	}
	i.Size, i.Data, i.Block, i.Sum = size, pack.Ref{Layer: w.opts.Layer, Number: number}, block, sum
	w.files++
	w.bytes += size
	return nil
}

// copy passes the bytes of an entry to write, in pieces as large as the buffer.
func (w *dataWriter) copy(size int64, r io.Reader, write func([]byte) error) error {
	for written := int64(0); written < size; {
		if err := w.ctx.Err(); err != nil {
			return err
		}
		n, err := readFull(r, w.buffer[:min(size-written, int64(len(w.buffer)))])
		written += int64(n)
		if n > 0 {
			if err := write(w.buffer[:n]); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) && written == size {
			break
		}
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return bad(fmt.Errorf("data ends after %d of %d bytes: %w", written, size, err))
		}
	}
	// Where the entry has more data than its size says, r fails now.
	if n, err := r.Read(w.buffer[:1]); n > 0 || err != nil && !errors.Is(err, io.EOF) {
		return bad(fmt.Errorf("data does not end after %d bytes: %w", size, cmp.Or[error](err, errdefs.ErrOutOfRange)))
	}
	return nil
}

func (w *dataWriter) close() {
	if w.buffer != nil {
		putChunk(w.buffer)
		w.buffer = nil
	}
}

// drop forgets a file that the layer itself has replaced.
func (w *dataWriter) drop(number uint32) {
	f, ok := w.onNVM[number]
	if !ok {
		return
	}
	delete(w.onNVM, number)
	w.nvmBytes -= f.size
	if f.hole {
		w.holes--
	}
	if err := w.opts.NVM.Remove(number); err != nil {
		w.failNVM(fmt.Errorf("remove file %d on NVM: %w", number, err))
	}
}

func (w *dataWriter) failNVM(err error) {
	if w.nvmErr == nil {
		w.nvmErr = err
	}
}

// file is the data file that is being written.
type file struct {
	w       *dataWriter
	number  uint32
	written int64
	sum     uint32 // of what stands on NVM alone
	nvm     NVMFile
	toPack  bool
}

func (f *file) create(place Placement) {
	nvm, err := f.w.opts.NVM.Create(f.number, place == ToNVM)
	if err != nil {
		f.w.failNVM(fmt.Errorf("create file %d on NVM: %w", f.number, err))
		return
	}
	f.nvm, f.toPack = nvm, place == ToBoth
}

func (f *file) close() {
	if f.nvm != nil {
		f.nvm.Close()
	}
}

func (f *file) write(p []byte) error {
	if f.nvm != nil {
		if n, err := f.nvm.Write(p); err != nil || n < len(p) {
			if err == nil {
				err = io.ErrShortWrite
			}
			if err := f.leaveNVM(fmt.Errorf("write file %d on NVM: %w", f.number, err)); err != nil {
				return err
			}
		}
	}
	if f.toPack {
		if _, err := f.w.pack.Write(p); err != nil {
			return fmt.Errorf("write file %d of the pack: %w", f.number, err)
		}
	}
	if !f.toPack {
		f.sum = pack.Sum(f.sum, p)
	}
	f.written += int64(len(p))
	return nil
}

// leaveNVM goes on without NVM. What stands on NVM alone is copied to the pack.
func (f *file) leaveNVM(cause error) error {
	f.w.failNVM(cause)
	if !f.toPack {
		if err := f.copyBack(); err != nil {
			return fmt.Errorf("%w; %w", cause, err)
		}
		f.toPack = true
	}
	f.nvm.Close()
	f.nvm = nil
	if err := f.w.opts.NVM.Remove(f.number); err != nil {
		return fmt.Errorf("remove file %d on NVM: %w", f.number, err)
	}
	return nil
}

func (f *file) copyBack() error {
	buf := make([]byte, min(f.written, chunkSize))
	sum := uint32(0)
	for at := int64(0); at < f.written; {
		p := buf[:min(f.written-at, chunkSize)]
		if n, err := f.nvm.ReadAt(p, at); n < len(p) {
			return fmt.Errorf("read back file %d on NVM: %w", f.number, err)
		}
		sum = pack.Sum(sum, p)
		if _, err := f.w.pack.Write(p); err != nil {
			return fmt.Errorf("write file %d of the pack: %w", f.number, err)
		}
		at += int64(len(p))
	}
	if sum != f.sum {
		return fmt.Errorf("read back file %d on NVM: checksum is wrong: %w", f.number, errdefs.ErrDataLoss)
	}
	return nil
}

// end ends the file where it stands and returns the sum of its bytes.
func (f *file) end() (uint32, error) {
	if f.nvm != nil {
		nvm := f.nvm
		f.nvm = nil
		if err := nvm.Close(); err != nil {
			return 0, fmt.Errorf("close file %d on NVM: %w", f.number, err)
		}
		f.w.onNVM[f.number] = onNVM{f.written, !f.toPack}
		f.w.nvmBytes += f.written
	}
	if !f.toPack {
		if err := f.w.pack.Hole(f.sum); err != nil {
			return 0, fmt.Errorf("leave file %d out of the pack: %w", f.number, err)
		}
		f.w.holes++
	}
	sum, err := f.w.pack.End()
	if err != nil {
		return 0, fmt.Errorf("end file %d of the pack: %w", f.number, err)
	}
	return sum, nil
}
