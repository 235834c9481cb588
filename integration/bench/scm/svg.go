// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scm

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"math"
)

// panel is one figure of the picture: rates as bars, on a scale of powers of ten.
type panel struct {
	title string
	bars  []bar
}

type bar struct {
	name, colour string
	rate         float64 // a second
}

var colours = map[place]string{
	onHost: "#1f6f8b", inMapping: "#2ca58d", inVolume: "#c98a1b", inStorage: "#b3541e", inDRAM: "#8a8a8a", onMemory: "#6b4fa0", onFiles: "#a04f86",
}

// panels are the paper's figures, in the language in which all are measured; those with rivals show Go too.
func (b *bench) panels() (all []panel) {
	for _, f := range []struct {
		workload, title string
		both            bool
	}{
		{"update", "Figure 4: updates of 4 bytes", false}, {"copy", "Figure 5: STREAM copy", false},
		{"btree", "Figure 6: B-tree inserts", false}, {"", "Figure 7: Redis SET", false},
		{"tx10", "Figure 8: transactions of 10 updates", true}, {"btree-tx", "Figure 9: B-tree insert transactions", true},
	} {
		p := panel{title: f.title}
		t, workload := b.micros, f.workload
		if workload == "" {
			t, workload = b.redis, "set"
		}
		for _, s := range t {
			if s.Workload == workload && (f.both || s.Language == "C") {
				p.bars = append(p.bars, bar{s.Contender, colours[s.Place], 1e9 / s.median()})
			}
		}
		if len(p.bars) > 0 {
			all = append(all, p)
		}
	}
	return all
}

// picture draws the panels, two in a row.
func (b *bench) picture() []byte {
	const width, left, row, gap = 440.0, 130.0, 15.0, 46.0
	all := b.panels()
	var out bytes.Buffer
	text := func(x, y float64, attributes, format string, args ...any) {
		fmt.Fprintf(&out, `<text x="%.1f" y="%.1f" %s>`, x, y, attributes)
		_ = xml.EscapeText(&out, fmt.Appendf(nil, format, args...)) // a buffer takes everything
		out.WriteString("</text>\n")
	}
	var tops []float64
	top := 30.0
	for i := 0; i < len(all); i += 2 {
		n := len(all[i].bars)
		if i+1 < len(all) {
			n = max(n, len(all[i+1].bars))
		}
		tops = append(tops, top)
		top += float64(n)*row + gap
	}
	fmt.Fprintf(&out, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %.0f %.0f" font-family="sans-serif" font-size="10">`+"\n", 2*width, top)
	out.WriteString("<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n")
	text(10, 16, `font-size="12"`, "Operations a second; each panel has a logarithmic scale of its own. Memory is emulated: tmpfs, and ext4 over it")
	for i, p := range all {
		x0, y0 := float64(i%2)*width, tops[i/2]+14
		text(x0+10, y0, `font-size="12" font-weight="bold"`, "%s", p.title)
		lo, hi := math.Inf(1), 0.0
		for _, c := range p.bars {
			lo, hi = min(lo, c.rate), max(hi, c.rate)
		}
		low, high := math.Floor(math.Log10(lo)-0.3), math.Log10(hi)
		for k, c := range p.bars {
			y := y0 + 6 + float64(k)*row
			w := (width - left - 80) * (math.Log10(c.rate) - low) / (high - low)
			fmt.Fprintf(&out, `<rect x="%.1f" y="%.1f" width="%.1f" height="%.1f" fill="%s"/>`+"\n", x0+left, y, w, row-4, c.colour)
			text(x0+left-5, y+9, `text-anchor="end"`, "%s", c.name)
			text(x0+left+w+4, y+9, "", "%s", perSecond(c.rate))
		}
	}
	out.WriteString("</svg>\n")
	return out.Bytes()
}
