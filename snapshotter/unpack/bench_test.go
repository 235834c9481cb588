// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// manyFiles is a blob of so many small files with names and a shape like those of a distribution: some 20 in a
// directory, four levels deep, one in 40 a symlink.
func manyFiles(b *testing.B, files int) []byte {
	var blob bytes.Buffer
	zw, err := gzip.NewWriterLevel(&blob, gzip.BestSpeed)
	must(b, err)
	w := tar.NewWriter(zw)
	put := func(h tar.Header, data string) {
		h.Mode, h.ModTime, h.Size = 0o755, time.Unix(1_700_000_000, 0), int64(len(data))
		must(b, w.WriteHeader(&h))
		_, err := io.WriteString(w, data)
		must(b, err)
	}
	for i, made := 0, 0; made < files; i++ {
		dir := fmt.Sprintf("usr/share-%02d/package-%d/module-%d", i%37, i%1009, i)
		put(tar.Header{Typeflag: tar.TypeDir, Name: dir + "/"}, "")
		for j := 0; j < 20 && made < files; j++ {
			name := fmt.Sprintf("%s/file-%02d-%x.conf", dir, j, (i*20+j)*2654435761%0xfffff)
			if j == 19 && i%2 == 0 {
				put(tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: "../file"}, "")
			} else {
				put(tar.Header{Typeflag: tar.TypeReg, Name: name}, "x")
			}
			made++
		}
	}
	must(b, w.Close())
	must(b, zw.Close())
	return blob.Bytes()
}

// cpu is the processor time of this process.
func cpu() time.Duration {
	var u unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// peak returns the largest resident memory of this process since it was called.
func peak(b *testing.B) func() float64 {
	runtime.GC()
	debug.FreeOSMemory()
	must(b, os.WriteFile("/proc/self/clear_refs", []byte("5"), 0))
	return func() float64 {
		status, err := os.ReadFile("/proc/self/status")
		must(b, err)
		_, rest, _ := strings.Cut(string(status), "VmHWM:")
		var kB float64
		_, err = fmt.Sscan(rest, &kB)
		must(b, err)
		return kB / 1000
	}
}

// BenchmarkManyFiles is what a layer of a million small files takes from its blob to the view of it.
func BenchmarkManyFiles(b *testing.B) {
	for _, files := range []int{100_000, 1_000_000} {
		blob := manyFiles(b, files)
		want := wantOf(blob, nil)
		b.Run(fmt.Sprintf("%d unpack", files), func(b *testing.B) {
			b.ReportAllocs()
			begin, most := cpu(), peak(b)
			for b.Loop() {
				unpackMany(b, blob, want, filepath.Join(b.TempDir(), "p"))
			}
			b.ReportMetric((cpu()-begin).Seconds()/float64(b.N), "cpu-s/op")
			b.ReportMetric(most(), "peak-MB")
		})
		path := filepath.Join(b.TempDir(), "p")
		unpackMany(b, blob, want, path)
		b.Run(fmt.Sprintf("%d view", files), func(b *testing.B) {
			b.ReportAllocs()
			begin, most := cpu(), peak(b)
			for b.Loop() {
				p, err := pack.Open(path)
				must(b, err)
				m, err := p.Meta(b.Context())
				must(b, err)
				_, err = pack.WriteView(b.Context(), pack.Chain{m}, map[uint64]uint32{1: p.Blocks()}, io.Discard)
				must(b, err)
				p.Close()
			}
			b.ReportMetric((cpu()-begin).Seconds()/float64(b.N), "cpu-s/op")
			b.ReportMetric(most(), "peak-MB")
		})
		os.Remove(path)
	}
}

func unpackMany(b *testing.B, blob []byte, want Want, path string) {
	w, err := pack.Create(path, pack.WriterOptions{})
	must(b, err)
	defer w.Close()
	m, _, err := Layer(b.Context(), io.NopCloser(bytes.NewReader(blob)), w, want, Options{Layer: 1})
	must(b, err)
	_, err = w.Finish(m, pack.Identity{Layer: 1})
	must(b, err)
}
