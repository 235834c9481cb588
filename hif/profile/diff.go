// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package profile

// Difference is what changed from one profile to another.
type Difference struct {
	Added, Removed []File
	Changed        []Change
	Same           int
}

// Change is one file that both profiles have, with different content or use.
type Change struct {
	Old, New File
	// Content: size, digest or layer differ; else only what starts did with it.
	Content bool
}

// Diff compares two profiles, in the order of the newer and, for what it does
// not have, of the older.
func Diff(from, to Profile) Difference {
	old := make(map[Path]File, len(from.Files))
	for _, f := range from.Files {
		old[f.Path] = f
	}
	var d Difference
	kept := map[Path]bool{}
	for _, g := range to.Files {
		f, ok := old[g.Path]
		kept[g.Path] = true
		switch content := ok && !f.same(Entry{Layer: g.Layer, Size: g.Size, Digest: g.Digest}, from.Layers, to.Layers); {
		case !ok:
			d.Added = append(d.Added, g)
		case content, f.Kind != g.Kind, f.Touched != g.Touched:
			d.Changed = append(d.Changed, Change{f, g, content})
		default:
			d.Same++
		}
	}
	for _, f := range from.Files {
		if !kept[f.Path] {
			d.Removed = append(d.Removed, f)
		}
	}
	return d
}

// Bytes is the size of files together.
func Bytes(files []File) (n int64) {
	for _, f := range files {
		n += f.Size
	}
	return n
}
