// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package c_test

import (
	"errors"
	"fmt"
	"path/filepath"
	"testing"

	"github.com/nhybrid/nhybrid/scmlib"
)

// Each language frees in one transaction all that a region holds which the other has filled, and leaves it as full.
func TestFreeOnFullRegion(t *testing.T) {
	b := built(t, plain)
	for _, o := range []scmlib.Options{{Size: 64 << 10}, {Size: 256 << 10, Lanes: 2, LaneSize: 512}, {Size: 1 << 20}, {Size: 5 << 20}} {
		for _, n := range []uint64{32, 64, 1000, 20 << 10} {
			t.Run(fmt.Sprintf("%dk blocks %d", o.Size>>10, n), func(t *testing.T) {
				path := filepath.Join(scratch(t), "r")
				o.Create = true
				r := openGo(t, path, o)
				filled := fillGo(t, r, n)
				for range 2 {
					if err := r.Close(); err != nil {
						t.Fatal(err)
					}
					if out, want := tool(t, b, "full", path, fmt.Sprint(n)), fmt.Sprintf("%d blocks\n", filled); out != want {
						t.Fatalf("C fills it with %q, Go with %q", out, want)
					}
					r = openGo(t, path, scmlib.Options{})
					var offs []scmlib.Off
					r.Blocks(func(b scmlib.Block) bool { offs = append(offs, b.Off); return true })
					if len(offs) != filled {
						t.Fatalf("%d blocks, want %d", len(offs), filled)
					}
					if err := r.Update(func(tx *scmlib.Tx) error {
						for _, off := range offs {
							if err := tx.Free(off); err != nil {
								return err
							}
						}
						return nil
					}); err != nil {
						t.Fatal(err)
					}
					if again := fillGo(t, r, n); again != filled {
						t.Fatalf("%d blocks fit again, want %d", again, filled)
					}
				}
			})
		}
	}
}

// fillGo allocates until the region is full, in one transaction.
func fillGo(t *testing.T, r *scmlib.Region, n uint64) (count int) {
	t.Helper()
	if err := r.Update(func(tx *scmlib.Tx) error {
		for {
			if _, err := tx.Alloc(n); errors.Is(err, scmlib.ErrFull) {
				return nil
			} else if err != nil {
				return err
			}
			count++
		}
	}); err != nil {
		t.Fatal(err)
	}
	return count
}
