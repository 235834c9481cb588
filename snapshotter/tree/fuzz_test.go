// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package tree

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/erofs/go-erofs"
	"golang.org/x/sys/unix"
)

// limited refuses more than it has room for: the size of a hole alone can ask for megabytes of indexes.
type limited struct {
	bytes.Buffer
	room int
}

func (l *limited) Write(p []byte) (int, error) {
	if l.Len()+len(p) > l.room {
		return 0, unix.EFBIG
	}
	return l.Buffer.Write(p)
}

// FuzzCapture gives the reader and the merge arbitrary bytes as the entries of up to three layers, past the checksum
// that keeps accidents out. What is accepted must come out as a tree that is in order and can be read.
func FuzzCapture(f *testing.F) {
	g := &gen{Rand: newRand(3), t: f, below: map[string]bool{}}
	if os.Getuid() == 0 {
		for range 12 { // three layers each
			var data []byte
			var ends [3]uint16
			for i := range ends {
				dir := f.TempDir()
				g.layer(dir)
				file, _ := captureTo(f, dir, fmt.Sprint(i), nil)
				l, err := openLayer(file)
				must(f, err)
				data = append(data, l.r.data[l.start:]...)
				ends[i] = uint16(len(data))
			}
			if len(data) < 1<<13 { // large ones make the fuzzer slow
				f.Add(data, ends[0], ends[1])
			}
		}
	}
	f.Add(new(synth).root().add(1, 0, "a", inode{mode: unix.S_IFREG, size: 5}).body, uint16(0), uint16(0))
	f.Fuzz(func(t *testing.T, data []byte, a, b uint16) {
		if len(data) > 1<<16 {
			return
		}
		var layers []*layer
		for _, end := range []int{min(int(a), len(data)), min(int(b), len(data)), len(data)} {
			begin := 0
			if len(layers) > 0 {
				begin = min(int([]uint16{a, b}[len(layers)-1]), end)
			}
			s := &synth{body: data[begin:end]}
			r := reader{data: data[begin:end]}
			for rec := (record{}); r.pos < len(r.data) && r.record(&rec) == nil; {
				s.count++
			}
			l, err := parseLayer(s.bytes(fmt.Sprint(len(layers))))
			must(t, err)
			l.index = len(layers)
			layers = append(layers, l)
		}
		// A layer that is malformed alone is left out, so that the rest is merged.
		var good []*layer
		for _, l := range layers {
			err := l.rewind()
			for err == nil && l.ok {
				err = l.next()
			}
			if err == nil {
				l.index = len(good)
				good = append(good, l)
			}
		}
		if len(good) == 0 {
			return
		}
		last, entries, deepest := "", int64(0), 0
		err := merge(context.Background(), good, visitor{enter: func(v *visible) error {
			path := strings.ReplaceAll(string(v.path), "/", "\x00")
			if entries++; entries > 1 && path <= last {
				t.Fatalf("%q comes after %q", path, last)
			}
			last = path
			deepest = max(deepest, v.rec.depth)
			return nil
		}})
		must(t, err)
		image := &limited{room: 1 << 22}
		s, err := writeLayers(context.Background(), good, image)
		if errors.Is(err, unix.EFBIG) {
			return
		}
		must(t, err)
		if s.Entries != entries || s.Bytes != int64(image.Len()) {
			t.Fatalf("%+v, want %d entries in %d bytes", s, entries, image.Len())
		}
		if deepest > 100 {
			return // go-erofs takes whole paths
		}
		if got := countErofs(t, image.Bytes()); got != entries {
			t.Fatalf("go-erofs finds %d entries, want %d", got, entries)
		}
	})
}

// countErofs counts the entries of an image.
func countErofs(t *testing.T, image []byte) int64 {
	img, err := erofs.Open(bytes.NewReader(image))
	must(t, err)
	count := int64(1)
	var visit func(path string)
	visit = func(path string) {
		dir, err := img.Open(path)
		must(t, err)
		defer dir.Close()
		entries, err := dir.(interface {
			ReadDir(int) ([]os.DirEntry, error)
		}).ReadDir(-1)
		must(t, err)
		for _, e := range entries {
			count++
			if _, err := e.Info(); err != nil {
				t.Fatalf("%q: %v", filepath.Join(path, e.Name()), err)
			}
			if e.IsDir() {
				visit(strings.TrimPrefix(path+"/"+e.Name(), "./"))
			}
		}
	}
	visit(".")
	return count
}

// FuzzFile gives the reader arbitrary bytes as a whole file.
func FuzzFile(f *testing.F) {
	good := new(synth).root().add(1, 0, "a", inode{mode: unix.S_IFREG, size: 5}).bytes("1")
	f.Add(good)
	f.Add(good[:20])
	f.Add(binary.LittleEndian.AppendUint16([]byte(captureMagic), 2))
	f.Fuzz(func(t *testing.T, data []byte) {
		if l, err := parseLayer(data); err == nil && (l.id == "" || l.start > len(l.r.data)) {
			t.Fatalf("accepted as %+v", l)
		}
		name := filepath.Join(t.TempDir(), "img")
		must(t, os.WriteFile(name, data, 0o600))
		if err := VerifyImage(name); err == nil {
			t.Fatal("arbitrary bytes are an image")
		}
	})
}
