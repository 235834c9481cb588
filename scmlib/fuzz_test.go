// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scmlib_test

import (
	"bytes"
	"testing"

	"github.com/nhybrid/nhybrid/scmlib"
)

// FuzzHeader: no header, with right checksums, makes the library read or write outside the memory, or panic. A refused image is not changed.
func FuzzHeader(f *testing.F) {
	img, _ := flipImage()
	f.Add(img[:512], true)
	f.Add(img[:512], false)
	f.Add([]byte("SCMREGN1"), true)
	f.Fuzz(func(t *testing.T, head []byte, fix bool) {
		m := bytes.Clone(img)
		for _, c := range []int{0, 4096} {
			copy(m[c:c+512], head)
			if fix {
				scmlib.FixCRC(m[c : c+512])
			}
		}
		was := bytes.Clone(m)
		r, err := scmlib.OpenImage(m, scmlib.Options{})
		if err != nil {
			if !bytes.Equal(was, m) {
				t.Fatalf("refused, and changed: %v", err)
			}
			return
		}
		use(r)
	})
}

// FuzzLog: no log, with right checksums, does it either.
func FuzzLog(f *testing.F) {
	base, _ := flipImage()
	rec := func(op uint8, off, arg uint64, payload ...byte) []byte {
		return scmlib.AppendEntry(nil, op, off, arg, payload)
	}
	f.Add(rec(scmlib.OpUndo, 20544, 8, 1, 2, 3, 4, 5, 6, 7, 8), uint32(1), uint16(0))
	f.Add(rec(scmlib.OpUndo, 0, 8, 1, 2, 3, 4, 5, 6, 7, 8), uint32(1), uint16(0))
	f.Add(rec(scmlib.OpSet, 20480, 1), uint32(1), uint16(0))
	f.Add(rec(scmlib.OpLink, 20480, 16384), uint32(1), uint16(0))
	f.Add(rec(scmlib.OpLink, 1<<55, 1<<63), uint32(1), uint16(0))
	f.Add([]byte{1}, uint32(1<<31), uint16(7))
	f.Fuzz(func(t *testing.T, entries []byte, count uint32, cut uint16) {
		m := bytes.Clone(base)
		r, err := scmlib.OpenImage(bytes.Clone(base), scmlib.Options{})
		if err != nil {
			t.Fatal(err)
		}
		lane, _ := scmlib.LaneAt(r, 0)
		gen := le64(m[lane:])
		b := scmlib.BeginRecord(nil)
		b = append(b, entries[:min(len(entries), 900)]...)
		scmlib.EndRecord(b, gen, 0, count, scmlib.UUIDSalt(r, 0))
		copy(m[lane+64:], b[:max(0, len(b)-int(cut))])
		was := bytes.Clone(m)
		r, err = scmlib.OpenImage(m, scmlib.Options{})
		if err != nil {
			if !bytes.Equal(was, m) {
				t.Fatalf("refused, and changed: %v", err)
			}
			return
		}
		use(r)
	})
}

// FuzzTable: no chunk table and no bitmap does it.
func FuzzTable(f *testing.F) {
	base, _ := flipImage()
	f.Add([]byte{1, 3, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 1}, []byte{0xff, 1})
	f.Add([]byte{2, 0, 0, 0, 200}, []byte{})
	f.Fuzz(func(t *testing.T, table, bitmap []byte) {
		m := bytes.Clone(base)
		at, heap := le64(m[144:]), le64(m[152:])
		copy(m[at:at+16], table)
		copy(m[heap:heap+64], bitmap)
		if r, err := scmlib.OpenImage(m, scmlib.Options{}); err == nil {
			use(r)
		}
	})
}

// use does what a program does with a region that opened.
func use(r *scmlib.Region) {
	n := 0
	r.Blocks(func(scmlib.Block) bool { n++; return n < 10000 })
	_ = r.Update(func(tx *scmlib.Tx) error {
		for _, size := range []uint64{1, 100, 5000, 20000} {
			if off, err := tx.Alloc(size); err == nil {
				if b, err := r.Bytes(off, size); err == nil {
					b[size-1] = 1
				}
			}
		}
		return nil
	})
	_, _ = scmlib.Root[[10]uint64](r)
	r.Close()
}
