// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package profile

import (
	"slices"

	"github.com/nhybrid/nhybrid/hif/trace"
)

// FromTrace makes a start of a trace. layer gives the place in the image of a
// layer by the id it has on this node; files of other layers, such as those of
// a committed container below this one, are left out and counted.
func FromTrace(tr trace.Trace, layer func(id string) (int, bool)) (s Start, foreign int) {
	s = Start{At: tr.Began.Add(tr.Duration), Complete: tr.Complete}
	for _, f := range tr.Files {
		i, ok := layer(f.Layer)
		if !ok || f.Size <= 0 || Path(f.Path).Check() != nil {
			foreign++
			continue
		}
		u := Use{Entry: Entry{Path: Path(f.Path), Layer: i, Size: f.Size}, Kind: Kind(f.Kind), Touched: f.Touched}
		for _, r := range f.Ranges {
			u.Ranges = append(u.Ranges, Range(r))
		}
		u.Ranges = slices.Clip(u.Ranges)
		s.Files = append(s.Files, u)
	}
	return s, foreign
}
