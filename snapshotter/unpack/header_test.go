// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"golang.org/x/sys/unix"
)

// readTar describes all that a reader of a tar returns. part is how much of the data is read, in halves.
func readTar(next func() (*tar.Header, error), data io.Reader, part int64) (out []string) {
	for n := 0; n < 1000; n++ {
		h, err := next()
		if err != nil {
			return append(out, err.Error())
		}
		line := fmt.Sprintf("%q %q %q %d %o %d %d %d %d %d %q", h.Typeflag, h.Name, h.Linkname, h.Size, h.Mode, h.Uid, h.Gid, h.ModTime.UnixNano(),
			h.Devmajor, h.Devminor, h.PAXRecords)
		b, err := io.ReadAll(io.LimitReader(data, h.Size*part/2+part/2)) // for 2 halves a byte more than there is
		out = append(out, fmt.Sprintf("%s: %x %v", line, b, err))
	}
	return out
}

func sameTar(t testing.TB, layer []byte) {
	t.Helper()
	for part := range int64(3) {
		theirs, ours := tar.NewReader(bytes.NewReader(layer)), newTarReader(bytes.NewReader(layer))
		want, got := readTar(theirs.Next, theirs, part), readTar(ours.Next, ours, part)
		for i := range max(len(want), len(got)) {
			if i >= len(want) || i >= len(got) || want[i] != got[i] {
				t.Fatalf("entry %d, %d halves of the data: %.300q, want %.300q", i, part, got[min(i, len(got)):min(i+1, len(got))], want[min(i, len(want)):min(i+1, len(want))])
			}
		}
	}
}

// TestTarReader holds our reader against archive/tar: on generated layers, whole and cut off, and on headers of each kind.
func TestTarReader(t *testing.T) {
	for seed := range uint64(300) {
		layer := newGenerator(t, seed).layer()
		sameTar(t, layer)
		for cut := 1; cut < len(layer); cut += 1 + len(layer)/7 {
			sameTar(t, layer[:cut])
		}
	}
	set := func(at int, value string) func([]byte) { return func(b []byte) { copy(b[at:], value) } }
	for what, change := range map[string]func([]byte){
		"plain":              func([]byte) {},
		"gnu":                set(257, "ustar  \x00"),
		"gnu, with a time":   func(b []byte) { copy(b[257:], "ustar  \x00"); copy(b[345:], "00000000017\x00") },
		"gnu, with a prefix": func(b []byte) { copy(b[257:], "ustar  \x00"); copy(b[345:], "prefix") },
		"star":               set(508, "tar\x00"),
		"v7":                 set(257, "\x00\x00\x00\x00\x00\x00\x00\x00"),
		"version":            set(263, "xx"),
		"prefix":             set(345, "pre/fix"),
		"long prefix":        set(345, strings.Repeat("p", 155)),
		"long name":          set(0, strings.Repeat("n", 100)),
		"not ASCII":          set(0, "\xff\xfe\x80"),
		"slash":              set(0, "slash/"),
		"old file":           set(156, "\x00"),
		"device":             func(b []byte) { b[156] = '3'; copy(b[329:], "0000007\x000000011\x00") },
		"spaces":             set(100, "   644 \x00"),
		"no NUL":             set(100, "00000644"),
		"space in a number":  set(100, "6 44\x00\x00\x00\x00"),
		"NUL in a number":    set(100, "6\x0044\x00\x00\x00\x00"),
		"no number":          set(100, "6x4\x00\x00\x00\x00\x00"),
		"digit 8":            set(100, "0000648\x00"),
		"negative":           set(108, "\xff\xff\xff\xff\xff\xff\xff\xfe"),
		"bad device":         set(329, "zzzzzzz\x00"),
		"link with a size":   func(b []byte) { b[156] = '2'; copy(b[157:], "target"); copy(b[124:], "00000000777\x00") },
		"directory, size":    func(b []byte) { b[156] = '5'; copy(b[124:], "00000001000\x00") },
		"contiguous":         set(156, "7"),
		"global":             set(156, "g"),
		"sparse":             set(156, "S"),
	} {
		head := rawHeader("file", tar.TypeReg, 5, change)
		for name, layer := range map[string][]byte{
			"":                 join(head, padded([]byte("12345")), rawHeader("next", tar.TypeReg, 0, nil), make([]byte, 1024)),
			", wrong checksum": join(head[:148], []byte("0000000\x00"), head[156:], padded([]byte("12345"))),
			", half a block":   join(rawHeader("first", tar.TypeReg, 700, nil), padded(make([]byte, 700)), head[:300]),
			", end in padding": join(head, []byte("1234567")),
			", one zero block": join(head, padded([]byte("12345")), make([]byte, 512), head),
		} {
			t.Run(what+name, func(t *testing.T) { sameTar(t, layer) })
		}
	}
	broken := newTarReader(io.MultiReader(bytes.NewReader(rawHeader("a", tar.TypeReg, 0, nil)), iotest.ErrReader(unix.EIO)))
	_, err := broken.Next()
	must(t, err)
	if _, err = broken.Next(); !errors.Is(err, unix.EIO) {
		t.Errorf("error is %v", err)
	}
}

// FuzzTarReader changes bytes of generated layers, mostly in headers.
func FuzzTarReader(f *testing.F) {
	f.Add(uint64(1), 100, byte(1), true)
	f.Fuzz(func(t *testing.T, seed uint64, at int, change byte, sum bool) {
		layer := newGenerator(t, seed).layer()
		layer[uint(at)%uint(len(layer))] ^= change
		if sum {
			checksums(layer)
		}
		sameTar(t, layer)
	})
}
