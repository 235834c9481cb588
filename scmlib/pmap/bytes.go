// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pmap

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"hash/crc32"
	"iter"

	"github.com/nhybrid/nhybrid/scmlib"
)

// bkey is a key of bytes: its first eight, which decide most comparisons, and where all of them are.
type bkey struct {
	prefix uint64
	blob   scmlib.Off // u64 length, then the bytes
}

// BytesTree is an ordered map from byte strings to byte strings, in the order of bytes.Compare.
type BytesTree struct{ core[bkey, scmlib.Off] }

// MaxBytes is the greatest length of a key or value of a BytesTree.
const MaxBytes = 1 << 30

// NewBytesTree binds a head to its region.
func NewBytesTree(r *scmlib.Region, head scmlib.Ptr[TreeHead]) *BytesTree {
	t := &BytesTree{core[bkey, scmlib.Off]{r: r, head: head}}
	t.order = func(a, b bkey) int {
		if c := cmp.Compare(a.prefix, b.prefix); c != 0 {
			return c
		}
		return bytes.Compare(blob(r, a.blob), blob(r, b.blob))
	}
	t.dup = func(tx *scmlib.Tx, k bkey) (bkey, error) {
		off, err := newBlob(tx, r, blob(r, k.blob))
		return bkey{k.prefix, off}, err
	}
	t.drop = func(tx *scmlib.Tx, k bkey) error { return tx.Free(k.blob) }
	return t
}

// blob is the bytes of a blob, in the region.
func blob(r *scmlib.Region, off scmlib.Off) []byte {
	n := *at[uint64](r, off)
	if n > MaxBytes {
		panic(&scmlib.PtrError{Off: off, Size: n})
	}
	return ptr[byte](off+8).Slice(r, int(n))
}

func newBlob(tx *scmlib.Tx, r *scmlib.Region, b []byte) (scmlib.Off, error) {
	if len(b) > MaxBytes {
		return 0, scmlib.ErrFull
	}
	off, err := tx.Alloc(8 + uint64(len(b)))
	if err != nil {
		return 0, err
	}
	*at[uint64](r, off) = uint64(len(b))
	copy(blob(r, off), b)
	return off, nil
}

func prefix(k []byte) uint64 {
	var b [8]byte
	copy(b[:], k)
	return binary.BigEndian.Uint64(b[:])
}

func (t *BytesTree) probe(k []byte) probe[bkey] {
	pre := prefix(k)
	return probe[bkey]{uint8(crc32.ChecksumIEEE(k)), func(s bkey) int {
		if s.prefix != pre {
			return cmp.Compare(s.prefix, pre)
		}
		return bytes.Compare(blob(t.r, s.blob), k)
	}}
}

// Get is a copy of the value of k, or nil.
func (t *BytesTree) Get(k []byte) []byte {
	p := t.probe(k)
	if v := t.get(&p); v != nil {
		return append([]byte{}, blob(t.r, *v)...)
	}
	return nil
}

// Put sets the value of k.
func (t *BytesTree) Put(tx *scmlib.Tx, k, v []byte) error {
	val, err := newBlob(tx, t.r, v)
	if err != nil {
		return err
	}
	p := t.probe(k)
	at, found, err := t.slot(tx, &p, func() (bkey, error) {
		off, err := newBlob(tx, t.r, k)
		return bkey{prefix(k), off}, err
	})
	if err != nil {
		return err
	}
	if found {
		if err := tx.Free(*at); err != nil {
			return err
		}
	}
	*at = val
	return nil
}

// Delete removes k and tells whether it was there.
func (t *BytesTree) Delete(tx *scmlib.Tx, k []byte) (bool, error) {
	p := t.probe(k)
	key, val, found, err := t.remove(tx, &p)
	if err != nil || !found {
		return found, err
	}
	if err := tx.Free(key.blob); err != nil {
		return true, err
	}
	return true, tx.Free(val)
}

// From lists the entries whose key is at least k, in order. The slices lie in the region: they are valid until the entry changes, and must not be written.
func (t *BytesTree) From(k []byte) iter.Seq2[[]byte, []byte] {
	return func(yield func(k, v []byte) bool) {
		p := t.probe(k)
		t.scan(&p, func(k bkey, v *scmlib.Off) bool { return yield(blob(t.r, k.blob), blob(t.r, *v)) })
	}
}

// Clear removes everything.
func (t *BytesTree) Clear(tx *scmlib.Tx) error {
	return t.clear(tx, func(k bkey, v *scmlib.Off) error {
		if err := tx.Free(k.blob); err != nil {
			return err
		}
		return tx.Free(*v)
	})
}
