// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/control"
)

// errSeen ends top --once.
var errSeen = errors.New("one sample was enough")

func (a *app) top() *cobra.Command {
	var interval time.Duration
	var once bool
	c := &cobra.Command{
		Use: "top", Short: "Show starts, hits of NVM, migration and space, live", Args: cobra.NoArgs,
		Long: "Show, live, which starts are under way, from which tier files are opened, what migrates, and what occupies the tiers: on a\nterminal as one screen, else as one block a sample, with --json as one JSON object a line.",
		RunE: func(c *cobra.Command, _ []string) error {
			if interval < control.MinInterval || interval > control.MaxInterval {
				return usage(fmt.Sprintf("top: --interval must be from %s to %s", control.MinInterval, control.MaxInterval))
			}
			show := a.topBlock
			if a.json {
				show = a.topJSON
			} else if _, _, live := terminal(a.out); live && !once {
				screen := canvas{out: a.out}
				show = func(s *control.TopSample, r *rates) error {
					screen.width, screen.height, _ = terminal(a.out) // it may have been resized
					return a.topScreen(&screen, s, r)
				}
			}
			return a.with(func(client control.Client) error {
				stream, err := client.Top(c.Context(), &control.TopRequest{IntervalMilliseconds: interval.Milliseconds()})
				if err != nil {
					return err
				}
				var last *control.TopSample
				err = receive(c.Context(), stream, func(s *control.TopSample) error {
					r := ratesOf(last, s)
					last = s
					if err := show(s, r); err != nil {
						return err
					}
					if once {
						return errSeen
					}
					return nil
				})
				if errors.Is(err, errSeen) {
					return nil
				}
				return err
			})
		},
	}
	c.Flags().DurationVar(&interval, "interval", control.DefaultInterval, "time between two samples")
	c.Flags().BoolVar(&once, "once", false, "show one sample and end: totals only")
	return c
}

// rates is what happened from one sample to the next, a second.
type rates struct {
	Seconds float64 `json:"seconds"`
	NVM     float64 `json:"opens_nvm"`
	HDD     float64 `json:"opens_hdd"`
	// Share of the opens that NVM served, 0 to 1; null without opens.
	Hits     *float64 `json:"hit_ratio"`
	Migrated float64  `json:"bytes_migrated"`
}

// ratesOf is nil for the first sample.
func ratesOf(last, s *control.TopSample) *rates {
	if last == nil {
		return nil
	}
	r := &rates{Seconds: s.GetTime().AsTime().Sub(last.GetTime().AsTime()).Seconds()}
	if r.Seconds <= 0 { // the clock was set
		return nil
	}
	nvm, hdd := s.GetOpensNvm()-last.GetOpensNvm(), s.GetOpensHdd()-last.GetOpensHdd()
	r.NVM, r.HDD = float64(nvm)/r.Seconds, float64(hdd)/r.Seconds
	r.Hits = hits(nvm, hdd)
	r.Migrated = float64(done(s.GetMigration())-done(last.GetMigration())) / r.Seconds
	return r
}

func hits(nvm, hdd int64) *float64 {
	if nvm+hdd <= 0 {
		return nil
	}
	h := float64(nvm) / float64(nvm+hdd)
	return &h
}

func (a *app) topJSON(s *control.TopSample, r *rates) error {
	b, err := control.JSON(s)
	if err != nil {
		return err
	}
	e := json.NewEncoder(a.out)
	e.SetEscapeHTML(false)
	return e.Encode(map[string]any{"sample": json.RawMessage(b), "rates": r})
}

func (a *app) topBlock(s *control.TopSample, r *rates) error {
	if err := a.topLines(s, r); err != nil {
		return err
	}
	_, err := fmt.Fprintln(a.out)
	return err
}

func (a *app) topScreen(c *canvas, s *control.TopSample, r *rates) error {
	var text bytes.Buffer
	if err := (&app{out: &text, bytes: a.bytes}).topLines(s, r); err != nil {
		return err
	}
	lines := strings.Split(strings.TrimRight(text.String(), "\n"), "\n")
	for i, l := range lines {
		lines[i] = clip(l, c.width)
	}
	return c.draw(nil, lines)
}

func (a *app) topLines(s *control.TopSample, r *rates) error {
	total := func(n int64, rate func(*rates) float64) string {
		if r == nil {
			return strconv.FormatInt(n, 10)
		}
		return fmt.Sprintf("%d (%.1f/s)", n, rate(r))
	}
	opens := fmt.Sprintf("NVM %s, HDD %s, hit ratio %s", total(s.GetOpensNvm(), func(r *rates) float64 { return r.NVM }),
		total(s.GetOpensHdd(), func(r *rates) float64 { return r.HDD }), ratio(hits(s.GetOpensNvm(), s.GetOpensHdd())))
	if r != nil {
		opens += ", just now " + ratio(r.Hits)
	}
	trace := fmt.Sprintf("overflows %d, events lost %d", s.GetOverflows(), s.GetLost())
	if s.GetTraceError() != "" {
		trace = "off: " + control.Message(s.GetTraceError())
	}
	rows := [][]string{
		{"time", s.GetTime().AsTime().Format(time.RFC3339)},
		{"starts", fmt.Sprintf("%d under way, %d in all", len(s.GetStarts()), s.GetStartsTotal())},
		{"opens", opens},
		{"trace", trace},
		{"migration", a.topMigration(s.GetMigration(), r)},
	}
	for _, t := range s.GetTiers() {
		line := fmt.Sprintf("%s of %s free%s", a.size(t.GetFree()), a.size(t.GetTotal()), percent(t.GetFree(), t.GetTotal()))
		for _, k := range t.GetSpace() {
			line += fmt.Sprintf(", %s %s", k.GetKind(), a.size(k.GetBytes()))
		}
		rows = append(rows, []string{t.GetName(), line})
	}
	if err := a.table(rows); err != nil || len(s.GetStarts()) == 0 {
		return err
	}
	fmt.Fprintln(a.out)
	rows = [][]string{{"START OF", "NAMESPACE", "FILES", "FOR", "IMAGE"}}
	for _, o := range s.GetStarts() {
		rows = append(rows, []string{
			control.Printable(o.GetContainer()), o.GetNamespace(), strconv.FormatInt(o.GetFiles(), 10),
			s.GetTime().AsTime().Sub(o.GetSince().AsTime()).Round(100 * time.Millisecond).String(), orDash(o.GetImage()),
		})
	}
	return a.table(rows)
}

func ratio(h *float64) string {
	if h == nil {
		return "-"
	}
	return fmt.Sprintf("%.1f %%", 100**h)
}

func (a *app) topMigration(m *control.MigrationState, r *rates) string {
	if m == nil {
		return "-"
	}
	line := m.GetState()
	if m.GetNow() {
		line += ", without limits"
	}
	if r != nil {
		line += ", " + placement.FormatRate(r.Migrated)
	}
	var files int64
	for _, d := range m.GetDirections() {
		files += d.GetFilesLeft()
	}
	line += fmt.Sprintf(", %d files and %s left", files, a.size(left(m)))
	if m.GetPinnedBytes() > 0 {
		line += fmt.Sprintf(", %s unlinked but still open", a.size(m.GetPinnedBytes()))
	}
	if m.GetWhy() != "" {
		line += ": " + control.Message(m.GetWhy())
	}
	return line
}
