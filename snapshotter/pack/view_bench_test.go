// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// largeLayer has names and a shape like those of a distribution: some 20 files in
// a directory, four levels deep, one file in 50 a symlink.
func largeLayer(layer uint64, files int) *Meta {
	m := &Meta{Layer: layer, Root: &Node{Inode: &Inode{Mode: unix.S_IFDIR | 0o755}}}
	dirs := map[string]*Node{"": m.Root}
	var dir func(path string) *Node
	dir = func(path string) *Node {
		if d := dirs[path]; d != nil {
			return d
		}
		parent, base := filepath.Dir(path), filepath.Base(path)
		if parent == "." {
			parent = ""
		}
		d := &Node{Name: base, Inode: &Inode{Mode: unix.S_IFDIR | 0o755, Nlink: 1}}
		p := dir(parent)
		p.Children, dirs[path] = append(p.Children, d), d
		return d
	}
	for i := 0; int(m.Numbers) < files; i++ {
		d := dir(fmt.Sprintf("usr/share-%02d/package-%d/module-%d", i%37, i%1009, i))
		for j := 0; j < 20 && int(m.Numbers) < files; j++ {
			in := &Inode{Mode: unix.S_IFREG | 0o644, Nlink: 1, Sec: int64(i)}
			if m.Numbers++; j == 19 && i%2 == 0 {
				in.Mode, in.Inline = unix.S_IFLNK|0o777, "../file"
			} else {
				in.Size, in.Data, in.Block = 1000, Ref{layer, m.Numbers}, m.Numbers
			}
			d.Children = append(d.Children, &Node{Name: fmt.Sprintf("file-%02d-%x.conf", j, (i*20+j)*2654435761%0xfffff), Inode: in})
		}
	}
	for _, d := range dirs {
		slices.SortFunc(d.Children, func(a, b *Node) int { return strings.Compare(a.Name, b.Name) })
	}
	return m
}

// BenchmarkWriteView writes views of a layer of so many files alone, and below nine
// layers that change a tenth each.
func BenchmarkWriteView(b *testing.B) {
	for _, files := range []int{10_000, 1_000_000} {
		chain := Chain{largeLayer(1, files)}
		blocks := map[uint64]uint32{1: uint32(files + 1)}
		for i := range uint64(9) {
			chain = append(chain, largeLayer(i+2, files/10))
			blocks[i+2] = uint32(files + 1)
		}
		for _, n := range []int{1, 10} {
			b.Run(fmt.Sprintf("%d files, %d layers", files, n), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					s, err := WriteView(b.Context(), chain[:n], blocks, io.Discard)
					noError(b, err)
					b.ReportMetric(float64(s.Bytes)/float64(files), "bytes/file")
				}
			})
		}
		b.Run(fmt.Sprintf("%d files, entries", files), func(b *testing.B) {
			for b.Loop() {
				n := 0
				for _, err := range chain.Entries(b.Context()) {
					noError(b, err)
					n++
				}
				if n < files {
					b.Fatal(n)
				}
			}
		})
	}
}

// BenchmarkScan scans a directory of 100 000 files.
func BenchmarkScan(b *testing.B) {
	asRoot(b)
	dir := tmpfs(b)
	for i := range 100_000 {
		d := filepath.Join(dir, fmt.Sprintf("d%d/e%d", i/2000, i/20))
		if i%20 == 0 {
			noError(b, os.MkdirAll(d, 0o755))
		}
		noError(b, os.WriteFile(filepath.Join(d, fmt.Sprintf("file-%d", i)), []byte("x"), 0o644))
	}
	runtime.GC()
	b.ReportAllocs()
	for b.Loop() {
		_, _, _, err := Scan(context.Background(), dir, 1, nil)
		noError(b, err)
	}
}
