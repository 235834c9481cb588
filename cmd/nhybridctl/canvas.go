// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"strings"
)

// canvas is lines on a terminal that are drawn over in place.
type canvas struct {
	out           io.Writer
	width, height int
	drawn         int // lines above the cursor that are to be drawn over
}

// draw writes lines where those of the last call stood. Those that are over stand above them and are not drawn again.
func (c *canvas) draw(over, lines []string) error {
	var b strings.Builder
	if c.drawn > 0 {
		fmt.Fprintf(&b, "\x1b[%dA", c.drawn) // up to the first line
	}
	write(&b, over)
	if more := len(lines) - (c.height - 1); c.height > 1 && more > 0 { // nothing above the screen's edge can be drawn over
		lines = append(lines[:max(len(lines)-more-1, 0)], fmt.Sprintf("… and %d lines more", more+1))
	}
	write(&b, lines)
	c.drawn = len(lines)
	b.WriteString("\x1b[J")
	_, err := io.WriteString(c.out, b.String())
	return err
}

func write(b *strings.Builder, lines []string) {
	for _, l := range lines {
		b.WriteString("\x1b[2K" + l + "\n") // clear the line that stood there
	}
}

// clip cuts a line to a width, 0 for any: one that wraps would break the count of lines.
func clip(line string, width int) string {
	r := []rune(strings.TrimRight(line, " "))
	if width > 0 && len(r) > width {
		r = append(r[:max(width-1, 0)], '…')
	}
	return string(r)
}
