// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scmlib_test

import (
	"bytes"
	"errors"
	"testing"

	"github.com/nhybrid/nhybrid/scmlib"
)

// A crash may leave the second record of a log without the first. The lane looks empty; its generation must change all the same, or the record is
// taken for part of the next transaction there, and brings old data back.
func TestStaleRecord(t *testing.T) {
	img := make([]byte, 64<<10)
	o := small
	o.Create = true
	r, err := scmlib.OpenImage(img, o)
	if err != nil {
		t.Fatal(err)
	}
	flag, err := scmlib.OffsetOf(r, &root[cells](r).Flag)
	if err != nil {
		t.Fatal(err)
	}
	lane, _ := scmlib.LaneAt(r, 0)
	rec := scmlib.AppendEntry(scmlib.BeginRecord(nil), scmlib.OpUndo, uint64(flag), 8, make([]byte, 8))
	salt := scmlib.UUIDSalt(r, 0)
	r.Close()
	gen := le64(img[lane:])
	scmlib.EndRecord(rec, gen, 1, 1, salt)
	copy(img[lane+64+384:], rec)

	if r, err = scmlib.OpenImage(img, small); err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	c := root[cells](r)
	c.Flag = 7
	if err := r.Persist(flag, 8); err != nil {
		t.Fatal(err)
	}
	var crashed []byte
	err = r.Update(func(tx *scmlib.Tx) error { // a record of 384 bytes, which ends where the stale one begins
		if err := tx.Add(c.Wide[:42]); err != nil {
			return err
		}
		crashed = bytes.Clone(img)
		return errNo
	})
	if !errors.Is(err, errNo) {
		t.Fatal(err)
	}
	if n := le64(crashed[lane+64:]) >> 32; n != 384 {
		t.Fatalf("the record in lane 0 has %d bytes: the test does not test", n)
	}
	again, err := scmlib.OpenImage(crashed, small)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if f := root[cells](again).Flag; f != 7 || again.Info().Recovered != 1 {
		t.Fatalf("flag is %d, %d transactions rolled back", f, again.Info().Recovered)
	}
}
