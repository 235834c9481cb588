// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scmlib_test

import (
	"fmt"

	"github.com/nhybrid/nhybrid/scmlib"
)

// maintenance are scenarios of what is done to a region that nobody has open: a crash leaves it as it was, or as it shall be.
func maintenance() []*scenario {
	bumped := []func(*world) error{
		update(nil, func(_ *scmlib.Region, c *cells, tx *scmlib.Tx) error { return bump(tx, c, 3, 0, 1, 2, 3, 4, 5, 6, 7) }),
	}
	const was, is = 64 << 10, 256 << 10
	return []*scenario{
		{name: "adopt", size: was, opts: small, setup: makeRoot[cells], ops: bumped,
			observe: func(r *scmlib.Region) (string, error) {
				s, err := seeCells(r)
				own := r.Info().Parent == ""
				return fmt.Sprint(s, own, scmlib.HostUSC(r) != 0), err
			},
			end: func(w *world) error { return scmlib.AdoptRegion(w.r) }},
		{name: "stamp", size: was, opts: small, setup: makeRoot[cells], ops: bumped,
			observe: func(r *scmlib.Region) (string, error) {
				s, err := seeCells(r)
				return fmt.Sprint(s, scmlib.HostUSC(r)), err
			},
			after: func(w *world) error {
				return scmlib.StampImage(w.img, w.tr, 7, [16]byte{1})
			}},
		{name: "grow", size: is, was: was, opts: small, ops: bumped,
			setup: func(r *scmlib.Region) error {
				err := makeRoot[cells](r)
				scmlib.Rubbish(r)
				return err
			},
			observe: func(r *scmlib.Region) (string, error) {
				s, err := seeCells(r)
				return fmt.Sprint(s, r.Info().Size), err
			},
			// The file that is larger, durably, is the medium of the enumeration from the beginning: what is behind the old end does not count before the header says so.
			end: func(w *world) error { return scmlib.GrowRegion(w.r, is, func() error { return nil }) }},
	}
}
