// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/nhybrid/nhybrid/hif/profile"
	"github.com/nhybrid/nhybrid/snapshotter/control"
)

// heatOptions are the flags of inspect --files.
type heatOptions struct {
	depth int
	all   bool
	path  string
	sort  string
}

var heatSorts = []string{"path", "files", "size", "hot", "nvm"}

func (o heatOptions) check() error {
	switch {
	case o.depth < 0:
		return usage("inspect: --depth must not be negative")
	case o.all && o.path != "":
		return usage("inspect: --all and --path exclude each other")
	case o.path != "" && !strings.HasPrefix(o.path, "/"):
		return usage(fmt.Sprintf("inspect: --path %q is relative; give it as it is inside the image, from /", o.path))
	case !slices.Contains(heatSorts, o.sort):
		return usage(fmt.Sprintf("inspect: --sort %q is none of %s", o.sort, strings.Join(heatSorts, ", ")))
	}
	return nil
}

// heat is what files below a directory occupy, or one file.
type heat struct {
	Path  profile.Path `json:"path"` // absolute in the image
	Files int64        `json:"files"`
	Bytes int64        `json:"bytes"`
	// The bytes once more, by whether they belong on NVM and whether they stand there.
	HotNVM  int64 `json:"hot_nvm"`
	HotHDD  int64 `json:"hot_hdd"`
	ColdNVM int64 `json:"cold_nvm"`
	ColdHDD int64 `json:"cold_hdd"`

	file *control.ImageFile // nil for a directory
}

func (h *heat) hot() int64 { return h.HotNVM + h.HotHDD }
func (h *heat) nvm() int64 { return h.HotNVM + h.ColdNVM }

func (h *heat) add(f *control.ImageFile) {
	nvm := min(max(f.GetNvmBytes(), 0), f.GetSize())
	rest := f.GetSize() - nvm
	h.Files++
	h.Bytes += f.GetSize()
	switch {
	case !f.GetHot():
		h.ColdNVM += nvm
		h.ColdHDD += rest
	case f.GetTier() == "parts": // the rest of the file is not what makes it hot
		h.HotNVM += nvm
		h.ColdHDD += rest
	default:
		h.HotNVM += nvm
		h.HotHDD += rest
	}
}

// heatMap sums files up by directory.
type heatMap struct {
	base string // absolute and clean
	o    heatOptions
	dirs map[string]*heat
	rows []*heat
}

func newHeatMap(o heatOptions) *heatMap {
	m := &heatMap{base: path.Clean("/" + o.path), o: o, dirs: map[string]*heat{}}
	m.dir(m.base)
	return m
}

func (m *heatMap) dir(name string) *heat {
	h := m.dirs[name]
	if h == nil {
		h = &heat{Path: profile.Path(name)}
		m.dirs[name] = h
		m.rows = append(m.rows, h)
	}
	return h
}

func (m *heatMap) add(f *control.ImageFile) {
	name := "/" + string(f.GetPath())
	if m.o.all || m.o.path != "" && (name == m.base || path.Dir(name) == m.base) {
		h := &heat{Path: profile.Path(name), file: f}
		h.add(f)
		m.rows = append(m.rows, h)
	}
	m.dirs[m.base].add(f)
	below := strings.Trim(strings.TrimPrefix(name, m.base), "/")
	at := m.base
	for depth := 1; depth <= m.o.depth || m.o.all; depth++ {
		next, rest, more := strings.Cut(below, "/")
		if !more {
			return
		}
		at, below = path.Join(at, next), rest
		m.dir(at).add(f)
	}
}

// sorted puts the whole first.
func (m *heatMap) sorted() []*heat {
	key := map[string]func(*heat) int64{
		"files": func(h *heat) int64 { return h.Files }, "size": func(h *heat) int64 { return h.Bytes },
		"hot": (*heat).hot, "nvm": (*heat).nvm,
	}[m.o.sort]
	// A directory comes before what is in it, and that before its neighbours.
	byPath := func(h *heat) string { return strings.ReplaceAll(string(h.Path), "/", "\x00") }
	slices.SortStableFunc(m.rows[1:], func(x, y *heat) int {
		if key != nil {
			if c := cmp.Compare(key(y), key(x)); c != 0 {
				return c
			}
		}
		return cmp.Compare(byPath(x), byPath(y))
	})
	if len(m.rows) == 2 && m.rows[0].Path == m.rows[1].Path { // --path named a file
		return m.rows[1:]
	}
	return m.rows
}

func (a *app) printHeat(ctx context.Context, image string, o heatOptions) error {
	if err := o.check(); err != nil {
		return err
	}
	m := newHeatMap(o)
	err := a.with(func(client control.Client) error {
		stream, err := client.Files(ctx, &control.FilesRequest{Image: image, Namespace: a.namespace, Path: []byte(o.path)})
		if err != nil {
			return err
		}
		return receive(ctx, stream, func(b *control.FileBatch) error {
			for _, f := range b.GetFiles() {
				m.add(f)
			}
			return nil
		})
	})
	if err != nil {
		return err
	}
	if ctx.Err() != nil {
		return silent{} // half a map would be a wrong one
	}
	rows := m.sorted()
	if a.json {
		return a.printHeatJSON(image, rows)
	}
	table := [][]string{{"PATH", "FILES", "SIZE", "HOT", "NVM", "TIER", "WEIGHT", "HEAT"}}
	paint := colour(a.out)
	for _, h := range rows {
		name, files, tier, weight := control.Printable(string(h.Path)), strconv.FormatInt(h.Files, 10), "", ""
		if h.file != nil {
			files, tier, weight = "-", h.file.GetTier(), fmt.Sprintf("%.2f", h.file.GetWeight())
			if h.file.GetPinned() {
				weight += " pinned"
			}
		} else if h.Path != "/" {
			name += "/"
		}
		table = append(table, []string{name, files, a.size(h.Bytes), a.size(h.hot()), a.size(h.nvm()), tier, weight, h.bar(barWidth, paint)})
	}
	if !slices.ContainsFunc(rows, func(h *heat) bool { return h.file != nil }) { // columns of files only
		for i, r := range table {
			table[i] = append(r[:5:5], r[7])
		}
	}
	if err := a.table(table); err != nil {
		return err
	}
	var legend []string
	for _, b := range bands {
		legend = append(legend, b.draw(1, paint)+" "+b.name)
	}
	_, err = fmt.Fprintf(a.out, "\n%s\n", strings.Join(legend, "   "))
	return err
}

// bands are the parts of a bar: the letter for those who see no colours, and the colour (ECMA-48, SGR).
var bands = []band{
	{"#", "31", "hot, on NVM", func(h *heat) int64 { return h.HotNVM }},
	{"+", "33", "hot, on HDD only", func(h *heat) int64 { return h.HotHDD }},
	{"=", "36", "cold, on NVM", func(h *heat) int64 { return h.ColdNVM }},
	{".", "2", "cold, on HDD only", func(h *heat) int64 { return h.ColdHDD }},
}

type band struct {
	letter, sgr, name string
	of                func(*heat) int64
}

func (b band) draw(n int, paint bool) string {
	s := strings.Repeat(b.letter, n)
	if !paint || n == 0 {
		return s
	}
	return "\x1b[" + b.sgr + "m" + s + "\x1b[0m"
}

// bar shares width columns out among the bands, so that what there is at all has at least one.
func (h *heat) bar(width int, paint bool) string {
	cells := make([]int, len(bands))
	used := 0
	for i, b := range bands {
		if n := b.of(h); n > 0 {
			cells[i] = max(1, int(float64(width)*float64(n)/float64(h.Bytes)+0.5))
			used += cells[i]
		}
	}
	if used == 0 {
		return "[" + strings.Repeat(" ", width) + "]"
	}
	cells[slices.Index(cells, slices.Max(cells))] += width - used // what rounding left over, or took too much
	var s strings.Builder
	for i, b := range bands {
		s.WriteString(b.draw(cells[i], paint))
	}
	return "[" + s.String() + "]"
}

func (a *app) printHeatJSON(image string, rows []*heat) error {
	directories, files := []*heat{}, []json.RawMessage{}
	for _, h := range rows {
		if h.file == nil {
			directories = append(directories, h)
			continue
		}
		b, err := control.JSON(h.file)
		if err != nil {
			return err
		}
		files = append(files, b)
	}
	return a.printJSON(map[string]any{"image": image, "directories": directories, "files": files})
}
