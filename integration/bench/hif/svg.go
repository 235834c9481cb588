// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"math"
	"strings"
)

// Measures of the picture, in pixels.
const (
	pictureWidth  = 860.0
	pictureHeight = 420.0
	marginLeft    = 64.0
	marginRight   = 20.0
	marginTop     = 54.0
	marginBottom  = 48.0
)

// axis maps values to pixels.
type axis struct{ from, to, max float64 }

func (a axis) at(v float64) float64 { return a.from + (a.to-a.from)*v/a.max }

// step is a round distance of lines that gives about n of them.
func (a axis) step(n float64) float64 {
	rough := a.max / n
	unit := math.Pow(10, math.Floor(math.Log10(rough)))
	for _, f := range []float64{1, 2, 5} {
		if f*unit >= rough {
			return f * unit
		}
	}
	return 10 * unit
}

// picture draws the space taken on NVM over time: nhybrid, and everything on NVM.
func picture(r *curveRow) []byte {
	var s, mb float64
	for _, c := range []curve{r.Hybrid, r.AllNVM} {
		for _, p := range c.Samples {
			s, mb = max(s, p.S), max(mb, float64(p.Bytes)/1e6)
		}
	}
	x := axis{marginLeft, pictureWidth - marginRight, max(s, 1)}
	y := axis{pictureHeight - marginBottom, marginTop, max(mb*1.08, 1)}
	var b bytes.Buffer
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %.0f %.0f" font-family="sans-serif" font-size="12">`+"\n", pictureWidth, pictureHeight)
	b.WriteString("<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n")
	text := func(x, y float64, attributes, format string, args ...any) {
		fmt.Fprintf(&b, `<text x="%.1f" y="%.1f" %s>`, x, y, attributes)
		_ = xml.EscapeText(&b, fmt.Appendf(nil, format, args...)) // a buffer takes everything
		b.WriteString("</text>\n")
	}
	line := func(x1, y1, x2, y2 float64, attributes string) {
		fmt.Fprintf(&b, `<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" %s/>`+"\n", x1, y1, x2, y2, attributes)
	}
	text(marginLeft, 20, `font-size="14"`, "NVM taken by image %s and its containers, MB", r.Image)
	for v, d := 0.0, y.step(6); v <= y.max; v += d {
		line(x.from, y.at(v), x.to, y.at(v), `stroke="#ddd"`)
		text(x.from-6, y.at(v)+4, `text-anchor="end"`, "%g", v)
	}
	for v, d := 0.0, x.step(10); v <= x.max; v += d {
		line(x.at(v), y.from, x.at(v), y.from+4, `stroke="#888"`)
		text(x.at(v), y.from+18, `text-anchor="middle"`, "%g", v)
	}
	text(x.to, y.from+36, `text-anchor="end"`, "seconds since the pull began, each line by its own clock")
	for _, m := range r.Hybrid.Marks {
		line(x.at(m.S), y.from, x.at(m.S), y.to, `stroke="#1f6f8b" stroke-dasharray="2 3" stroke-width="0.8"`)
		fmt.Fprintf(&b, `<text transform="translate(%.1f %.1f) rotate(90)" fill="#1f6f8b" font-size="10">`, x.at(m.S)+3, y.to+2)
		_ = xml.EscapeText(&b, []byte(m.What))
		b.WriteString("</text>\n")
	}
	for i, c := range []struct {
		name, colour string
		curve
	}{{"everything on NVM (overlayfs)", "#b3541e", r.AllNVM}, {"nhybrid", "#1f6f8b", r.Hybrid}} {
		var points strings.Builder
		for _, p := range c.Samples {
			fmt.Fprintf(&points, "%.1f,%.1f ", x.at(p.S), y.at(float64(p.Bytes)/1e6))
		}
		fmt.Fprintf(&b, `<polyline fill="none" stroke="%s" stroke-width="2" points="%s"/>`+"\n", c.colour, strings.TrimSpace(points.String()))
		if n := len(c.Samples); n > 0 && c.Samples[n-1].S < x.max { // nothing more was done, and so nothing changes
			last := y.at(float64(c.Samples[n-1].Bytes) / 1e6)
			line(x.at(c.Samples[n-1].S), last, x.to, last, fmt.Sprintf(`stroke="%s" stroke-width="1" stroke-dasharray="6 4"`, c.colour))
		}
		at := marginLeft + float64(i)*240
		line(at, 36, at+24, 36, fmt.Sprintf(`stroke="%s" stroke-width="2"`, c.colour))
		text(at+30, 40, "", "%s", c.name)
	}
	b.WriteString("</svg>\n")
	return b.Bytes()
}
