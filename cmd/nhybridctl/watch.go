// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nhybrid/nhybrid/snapshotter/control"
)

// errOver ends a watch that was to last for one pull.
var errOver = errors.New("the pull is over")

func (a *app) watch() *cobra.Command {
	var once bool
	c := &cobra.Command{
		Use: "watch [IMAGE]", Short: "Show pulls while they run: layers, progress and tiers", Args: cobra.MaximumNArgs(1),
		Long: "Show pulls while they run: on a terminal as a live view, else as one line an event, with --json as one JSON object a line.",
		RunE: func(c *cobra.Command, args []string) error {
			request := &control.WatchRequest{Namespace: a.namespace}
			if len(args) == 1 {
				request.Image = args[0]
			}
			show := a.eventLine
			width, height, live := terminal(a.out)
			if a.json {
				show = a.eventJSON
			} else if live {
				show = (&screen{canvas: canvas{out: a.out, width: width, height: height}, view: newView(a.size)}).event
			}
			return a.with(func(client control.Client) error {
				stream, err := client.Watch(c.Context(), request)
				if err != nil {
					return err
				}
				failed := false
				err = receive(c.Context(), stream, func(e *control.Event) error {
					if err := show(e); err != nil {
						return err
					}
					failed = e.GetType() == "failed"
					if once && (failed || e.GetType() == "done") {
						return errOver
					}
					return nil
				})
				switch {
				case errors.Is(err, errOver) && failed:
					return silent{}
				case errors.Is(err, errOver):
					return nil
				}
				return err
			})
		},
	}
	c.Flags().BoolVar(&once, "once", false, "end with the first pull that ends; exit code 1 if it failed")
	return c
}

func (a *app) eventJSON(e *control.Event) error {
	b, err := control.JSON(e)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(a.out, "%s\n", b)
	return err
}

// eventLine writes one line for people and grep; plain progress would be too many of them.
func (a *app) eventLine(e *control.Event) error {
	if e.GetType() == "progress" {
		return nil
	}
	told := false // the daemon's message on a decision is its reason
	line := fmt.Sprintf("%s %s %s", e.GetTime().AsTime().Format(time.RFC3339), e.GetType(), pullName(e))
	if e.GetType() == "pull" {
		var size int64
		for _, l := range e.GetLayers() {
			size += l.GetSize()
		}
		line += fmt.Sprintf(": %d layers, %s", len(e.GetLayers()), a.size(size))
	} else {
		for _, l := range e.GetLayers() {
			line += fmt.Sprintf(": layer %d to %s", l.GetIndex(), strings.ToUpper(orDash(l.GetTier())))
			if l.GetDecision() != nil {
				line += ", " + l.GetDecision().Cause()
				told = told || l.GetDecision().GetReason() == e.GetMessage()
			}
		}
	}
	if e.GetMessage() != "" && !told {
		line += ": " + control.Message(e.GetMessage())
	}
	_, err := fmt.Fprintln(a.out, line)
	return err
}

func pullName(e *control.Event) string {
	if e.GetImage() != "" {
		return e.GetImage()
	}
	return "pull " + e.GetPull()
}

// view is what is known of the pulls, as the events have told.
type view struct {
	size  func(int64) string
	order []string
	pulls map[string]*pullView
}

type pullView struct {
	name, end string
	layers    []*control.LayerProgress
}

func newView(size func(int64) string) *view { return &view{size: size, pulls: map[string]*pullView{}} }

// maxLayers is above what any image has (overlayfs takes 500 at most); an index beyond it is not believed.
const maxLayers = 1024

func (v *view) apply(e *control.Event) {
	p := v.pulls[e.GetPull()]
	if p == nil {
		p = &pullView{}
		v.pulls[e.GetPull()] = p
		v.order = append(v.order, e.GetPull())
	}
	if p.name == "" || e.GetImage() != "" {
		p.name = pullName(e)
	}
	for _, l := range e.GetLayers() {
		i := int(l.GetIndex())
		if i < 0 || i >= maxLayers {
			continue
		}
		for len(p.layers) <= i {
			p.layers = append(p.layers, &control.LayerProgress{Index: int32(len(p.layers)), State: "waiting"})
		}
		if l.GetDecision() == nil {
			l.Decision = p.layers[i].GetDecision() // decided once, shown for good
		}
		p.layers[i] = l
	}
	switch e.GetType() {
	case "done":
		p.end = "done"
	case "failed":
		p.end = strings.TrimSuffix("failed: "+control.Message(e.GetMessage()), ": ")
	}
}

// takeEnded moves the pulls that are over into a view of their own.
func (v *view) takeEnded() *view {
	ended := newView(v.size)
	var running []string
	for _, id := range v.order {
		if v.pulls[id].end == "" {
			running = append(running, id)
			continue
		}
		ended.order = append(ended.order, id)
		ended.pulls[id] = v.pulls[id]
		delete(v.pulls, id)
	}
	v.order = running
	return ended
}

const barWidth = 24

func (v *view) lines(width int) []string {
	var out []string
	add := func(format string, args ...any) {
		out = append(out, clip(fmt.Sprintf(format, args...), width))
	}
	for _, id := range v.order {
		p := v.pulls[id]
		head := p.name
		if p.end != "" {
			head += "  " + p.end
		}
		add("%s", head)
		for _, l := range p.layers {
			add("  %3d %-19s %s %17s  %-11s %-4s %s", l.GetIndex(), control.Short(l.GetDigest()), bar(l),
				v.size(min(l.GetOffset(), l.GetSize()))+"/"+v.size(l.GetSize()), l.GetState(), orDash(l.GetTier()), l.GetDecision().Cause())
		}
	}
	return out
}

func bar(l *control.LayerProgress) string {
	full := 0
	switch {
	case l.GetState() == "downloaded" || l.GetState() == "storing" || l.GetState() == "stored" || l.GetState() == "present":
		full = barWidth
	case l.GetSize() > 0:
		full = int(float64(barWidth) * min(1, max(0, float64(l.GetOffset())/float64(l.GetSize()))))
	}
	return "[" + strings.Repeat("=", full) + strings.Repeat(" ", barWidth-full) + "]"
}

// screen redraws a view in place.
type screen struct {
	canvas
	view *view
}

func (s *screen) event(e *control.Event) error {
	s.view.apply(e)
	var ended []string
	if e.GetType() == "done" || e.GetType() == "failed" {
		// What is over is drawn for the last time, above what still runs.
		ended = s.view.takeEnded().lines(s.width)
	}
	return s.draw(ended, s.view.lines(s.width))
}
