// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"archive/tar"
	"bufio"
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/errdefs"

	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

func heap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// written is a tar as it is being written.
func written(t *testing.T, write func(w io.Writer) error) io.Reader {
	r, w := io.Pipe()
	t.Cleanup(func() { r.Close() })
	go func() {
		b := bufio.NewWriterSize(w, 1<<20)
		err := write(b)
		if err == nil {
			err = b.Flush()
		}
		w.CloseWithError(err)
	}()
	return bufio.NewReaderSize(r, 1<<20)
}

func TestMillionFiles(t *testing.T) {
	if testing.Short() {
		t.Skip("takes seconds")
	}
	for name, c := range map[string]struct {
		n    int
		path func(k int) string
	}{
		"one directory": {1_000_000, func(k int) string { return fmt.Sprintf("usr/share/name-of-file-%d", k*7919%1_000_000) }},
		"many":          {200_000, func(k int) string { return fmt.Sprintf("usr/share/%d/name-of-file-%d", k%5000, k) }},
		"in reverse":    {200_000, func(k int) string { return fmt.Sprintf("usr/share/name-of-file-%07d", 1_000_000-k) }},
	} {
		t.Run(name, func(t *testing.T) {
			before := heap()
			a := newApplier(t.Context(), &memoryPack{}, Options{}.withDefaults())
			must(t, a.run(written(t, func(w io.Writer) error {
				b := rawHeader("", tar.TypeReg, 0, nil)
				for k := range c.n {
					clear(b[:100])
					copy(b, c.path(k))
					setChecksum(b)
					if _, err := w.Write(b); err != nil {
						return err
					}
				}
				return nil
			})))
			m, res := a.result()
			used := heap() - before
			t.Logf("%d MB, %d estimated", used>>20, a.cost>>20)
			if used > 300*int64(c.n) || res.Entries != int64(c.n) {
				t.Errorf("%d entries take %d MB", res.Entries, used>>20)
			}
			if used > a.cost {
				t.Errorf("the estimate of %d MB is too low", a.cost>>20)
			}
			runtime.KeepAlive(m)
		})
	}
}

func TestMetadataIsBounded(t *testing.T) {
	gib := func(header []byte) io.Reader {
		return io.MultiReader(bytes.NewReader(header), io.LimitReader(zeros{}, 1<<30))
	}
	long := strings.Repeat("v", 60_000)
	for name, c := range map[string]struct {
		tar  io.Reader
		says string
	}{
		"PAX header of 1 GiB":    {gib(rawHeader("x", tar.TypeXHeader, 1<<30, nil)), "read entry 1"},
		"global header of 1 GiB": {gib(rawHeader("g", tar.TypeXGlobalHeader, 1<<30, nil)), "read entry 1"},
		"name of 1 GiB":          {gib(rawHeader("L", tar.TypeGNULongName, 1<<30, nil)), "read entry 1"},
		"xattrs of 1 GiB": {written(t, func(w io.Writer) error {
			for k := range 20_000 {
				e := rawEntry(fmt.Sprint(k), tar.TypeReg, nil, 0, paxXattr+"user.a", long)
				if _, err := w.Write(e.raw); err != nil {
					return err
				}
			}
			return nil
		}), "more than 67108864 bytes"},
		"targets": {written(t, func(w io.Writer) error {
			for k := range 1 << 20 {
				e := rawEntry(fmt.Sprint(k), tar.TypeSymlink, nil, 0, "linkpath", long[:4000])
				if _, err := w.Write(e.raw); err != nil {
					return err
				}
			}
			return nil
		}), "more than 67108864 bytes"},
		"deep directories": {written(t, func(w io.Writer) error {
			for k := range 1 << 20 {
				e := rawEntry("x", tar.TypeReg, nil, 0, "path", fmt.Sprint(k)+strings.Repeat("/d", 2000))
				if _, err := w.Write(e.raw); err != nil {
					return err
				}
			}
			return nil
		}), "more than 67108864 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			before := heap()
			a := newApplier(t.Context(), &memoryPack{}, Options{MaxMetadata: 64 << 20}.withDefaults())
			err := a.run(c.tar)
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("error is %.300v", err)
			}
			if used := heap() - before; used > 80<<20 {
				t.Errorf("takes %d MB", used>>20)
			}
			runtime.KeepAlive(a)
		})
	}
	// PAX headers of one entry after the other are not kept.
	t.Run("1 GiB of PAX headers", func(t *testing.T) {
		before := heap()
		comment := strings.Repeat("c", 1<<19)
		a := newApplier(t.Context(), &memoryPack{}, Options{MaxMetadata: 64 << 20}.withDefaults())
		must(t, a.run(written(t, func(w io.Writer) error {
			for k := range 2048 {
				e := rawEntry("x", tar.TypeReg, nil, 0, "comment", comment, "path", fmt.Sprint(k), paxXattr+"user.a", "v")
				if _, err := w.Write(e.raw); err != nil {
					return err
				}
			}
			return nil
		})))
		if used := heap() - before; used > 80<<20 || a.entries != 2048 {
			t.Errorf("%d entries take %d MB", a.entries, used>>20)
		}
		runtime.KeepAlive(a)
	})
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// benchLayer is a layer like those of images: many small files, some large
// ones, compressed to about a third.
func benchLayer(b *testing.B) []byte {
	rnd := rand.New(rand.NewPCG(1, 2))
	words := make([]string, 4000)
	for k := range words {
		word := make([]byte, 3+rnd.IntN(9))
		for i := range word {
			word[i] = byte('a' + rnd.IntN(26))
		}
		words[k] = string(word)
	}
	var entries []entry
	for k := range 4000 {
		size := 200 + rnd.IntN(20_000)
		if k%100 == 0 {
			size = 2 << 20
		}
		var data strings.Builder
		for data.Len() < size {
			data.WriteString(words[rnd.IntN(len(words))])
		}
		entries = append(entries, reg(fmt.Sprintf("usr/lib/d%d/f%d", k/40, k), data.String()))
	}
	return tarOf(b, entries...)
}

// perCPU reports MB for each second and for each second of processor time; the
// latter does not depend on what else the machine does.
func perCPU(b *testing.B, size int) func() {
	b.SetBytes(int64(size))
	cpu := func() float64 {
		var u syscall.Rusage
		must(b, syscall.Getrusage(syscall.RUSAGE_SELF, &u))
		return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e9
	}
	before := cpu()
	return func() { b.ReportMetric(float64(size)*float64(b.N)/1e6/(cpu()-before), "MB/cpu-s") }
}

// BenchmarkLayer compares a pack with containerd's tree of files, both written
// to the same filesystem and not synced. MB/s are of the uncompressed tar.
func BenchmarkLayer(b *testing.B) {
	layer := benchLayer(b)
	blobs := map[string][]byte{"tar": layer, "gzip": gzipOf(b, layer), "zstd": zstdOf(b, layer)}
	for _, name := range []string{"tar", "gzip", "zstd"} {
		blob := blobs[name]
		b.Run("pack/"+name, func(b *testing.B) {
			defer perCPU(b, len(layer))()
			for b.Loop() {
				w, err := pack.Create(filepath.Join(b.TempDir(), "p"), pack.WriterOptions{})
				must(b, err)
				m, _, err := Layer(b.Context(), io.NopCloser(bytes.NewReader(blob)), w, wantOf(blob, nil), Options{Layer: 1})
				must(b, err)
				_, err = w.Finish(m, pack.Identity{Layer: 1})
				must(b, err)
				must(b, w.Abort())
			}
		})
		b.Run("containerd/"+name, func(b *testing.B) {
			defer perCPU(b, len(layer))()
			for b.Loop() {
				dir, err := os.MkdirTemp(b.TempDir(), "")
				must(b, err)
				d, err := compression.DecompressStream(bytes.NewReader(blob))
				must(b, err)
				_, err = archive.Apply(b.Context(), dir, d, archive.WithConvertWhiteout(archive.OverlayConvertWhiteout))
				must(b, err)
				must(b, d.Close())
				must(b, os.RemoveAll(dir))
			}
		})
	}
}
