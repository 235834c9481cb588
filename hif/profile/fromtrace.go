// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package profile

import (
	"regexp"
	"slices"

	"github.com/nhybrid/nhybrid/hif/trace"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

var soName = regexp.MustCompile(`\.so(\.[0-9][^/]*)?$`)

// FromTrace makes a start of a trace. find names a data file of the image; files
// that it does not know, such as those of a committed container below this one,
// are left out and counted. A file that was read and has the name of a shared
// object is a library: the trace sees numbers in place of names.
func FromTrace(tr trace.Trace, find func(pack.Ref) (Entry, bool)) (s Start, foreign int) {
	s = Start{At: tr.Began.Add(tr.Duration), Complete: tr.Complete}
	for _, f := range tr.Files {
		e, ok := find(f.Ref)
		if !ok || e.Size != f.Size || f.Size <= 0 || e.Path.Check() != nil {
			foreign++
			continue
		}
		u := Use{Entry: e, Kind: Kind(f.Kind), Touched: f.Touched}
		if u.Kind == Read && soName.MatchString(string(e.Path)) {
			u.Kind = Library
		}
		for _, r := range f.Ranges {
			u.Ranges = append(u.Ranges, Range(r))
		}
		u.Ranges = slices.Clip(u.Ranges)
		s.Files = append(s.Files, u)
	}
	return s, foreign
}
