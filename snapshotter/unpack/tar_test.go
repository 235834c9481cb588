// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"fmt"
	"io"
	"testing"
)

// entry is one entry of a tar as it is written.
type entry struct {
	tar.Header
	data string
	raw  []byte // instead of all others
}

func tarOf(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, e := range entries {
		if e.raw != nil {
			must(t, tw.Flush())
			b.Write(e.raw)
			continue
		}
		h := e.Header
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if h.Typeflag == tar.TypeReg {
			h.Size = int64(len(e.data))
		}
		if err := tw.WriteHeader(&h); err != nil {
			t.Fatalf("%+v: %v", h, err)
		}
		_, err := io.WriteString(tw, e.data)
		must(t, err)
	}
	must(t, tw.Close())
	return b.Bytes()
}

// rawHeader is a ustar header with what tar.Writer would refuse.
func rawHeader(name string, typ byte, size int64, change func(block []byte)) []byte {
	b := make([]byte, 512)
	copy(b, name)
	copy(b[100:], "0000644\x00")
	copy(b[108:], "0000000\x00")
	copy(b[116:], "0000000\x00")
	octal(b[124:136], size)
	copy(b[136:], "00000000001\x00")
	b[156] = typ
	copy(b[257:], "ustar\x0000")
	if change != nil {
		change(b)
	}
	setChecksum(b)
	return b
}

func setChecksum(b []byte) {
	copy(b[148:], "        ")
	sum := 0
	for _, c := range b {
		sum += int(c)
	}
	copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
}

func octal(field []byte, v int64) {
	if s := fmt.Sprintf("%0*o\x00", len(field)-1, v); len(s) == len(field) {
		copy(field, s)
		return
	}
	clear(field)
	binary.BigEndian.PutUint64(field[len(field)-8:], uint64(v))
	field[0] |= 0x80
}

func padded(b []byte) []byte { return append(b, make([]byte, -len(b)&511)...) }

// paxRecords are the bytes of a PAX header's data.
func paxRecords(kv ...string) []byte {
	var b []byte
	for k := 0; k < len(kv); k += 2 {
		rec := " " + kv[k] + "=" + kv[k+1] + "\n"
		n := len(rec)
		for n != len(rec)+len(fmt.Sprint(n)) {
			n = len(rec) + len(fmt.Sprint(n))
		}
		b = append(b, fmt.Sprint(n)+rec...)
	}
	return b
}

// rawEntry is an entry with a PAX header in front, both as they are.
func rawEntry(name string, typ byte, data []byte, size int64, kv ...string) entry {
	var b []byte
	if len(kv) > 0 {
		r := paxRecords(kv...)
		b = append(rawHeader("pax", tar.TypeXHeader, int64(len(r)), nil), padded(r)...)
	}
	b = append(b, rawHeader(name, typ, size, nil)...)
	return entry{raw: append(b, padded(bytes.Clone(data))...)}
}

func gzipOf(t testing.TB, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := gzip.NewWriterLevel(&out, gzip.BestSpeed)
	must(t, err)
	_, err = w.Write(b)
	must(t, err)
	must(t, w.Close())
	return out.Bytes()
}
