// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"fmt"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// millionMeta is a layer of a million names: 100 files of 8 KiB in each of 10 000 directories. Its files are begun in w.
func millionMeta(b *testing.B, w *Writer) *Meta {
	m := &Meta{Layer: 1, Root: &Node{Inode: &Inode{Mode: unix.S_IFDIR | 0o755}}}
	for i := range 100 {
		up := &Node{Name: fmt.Sprintf("dir-%03d", i), Inode: &Inode{Mode: unix.S_IFDIR | 0o755}}
		m.Root.Children = append(m.Root.Children, up)
		for j := range 100 {
			dir := &Node{Name: fmt.Sprintf("package-%03d", j), Inode: &Inode{Mode: unix.S_IFDIR | 0o755}}
			up.Children = append(up.Children, dir)
			for k := range 100 {
				n, _, err := w.Begin(8192)
				noError(b, err)
				noError(b, w.Hole(0))
				_, err = w.End()
				noError(b, err)
				dir.Children = append(dir.Children, &Node{Name: fmt.Sprintf("some-file-%03d.py", k), Inode: &Inode{
					Mode: unix.S_IFREG | 0o644, Sec: 1 << 30, Size: 8192, Nlink: 1, Data: Ref{1, n},
				}})
			}
		}
	}
	return m
}

// BenchmarkFinish and BenchmarkMeta: the limit for a million names is 2 s and 300 MB for both together. B/op of Meta has
// what it returns in it.
func BenchmarkFinish(b *testing.B) {
	b.ReportAllocs()
	for range b.N {
		b.StopTimer()
		w, err := Create(filepath.Join(b.TempDir(), "p"), WriterOptions{})
		noError(b, err)
		m := millionMeta(b, w)
		b.StartTimer()
		_, err = w.Finish(m, Identity{Layer: 1})
		noError(b, err)
		b.StopTimer()
		w.Close()
		b.StartTimer()
	}
}

func BenchmarkMeta(b *testing.B) {
	w, err := Create(filepath.Join(b.TempDir(), "p"), WriterOptions{})
	noError(b, err)
	_, err = w.Finish(millionMeta(b, w), Identity{Layer: 1})
	noError(b, err)
	w.Close()
	b.ReportAllocs()
	for b.Loop() {
		p, err := Open(w.File().Name())
		noError(b, err)
		_, err = p.Meta(b.Context())
		noError(b, err)
		p.Close()
	}
}

// BenchmarkWrite is the rate at which data of files of 16 KiB go into a pack.
func BenchmarkWrite(b *testing.B) {
	w, err := Create(filepath.Join(b.TempDir(), "p"), WriterOptions{})
	noError(b, err)
	defer w.Close()
	data := make([]byte, 16<<10)
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for b.Loop() {
		_, _, err := w.Begin(int64(len(data)))
		noError(b, err)
		_, err = w.Write(data)
		noError(b, err)
		_, err = w.End()
		noError(b, err)
	}
}
