// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package result is the common form of what benchmarks write: figures, how they came about, and the raw runs.
package result

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Result is the content of out/NAME.json.
type Result struct {
	Name    string    `json:"name"`
	Written time.Time `json:"written"`
	// Command is the command line that repeats the measurement, quoted for a shell.
	Command string  `json:"command"`
	Machine Machine `json:"machine"`
	// Versions by program.
	Versions map[string]string `json:"versions"`
	// Settings of the emulated devices, and of whatever else bears on the figures.
	Settings map[string]any `json:"settings,omitempty"`
	// Figures have their unit at the end of the key, ratios and fractions have none.
	Figures map[string]float64 `json:"figures"`
	// Targets of some figures.
	Targets []Target `json:"targets,omitempty"`
	// Tables for people, made of the same runs.
	Tables []Table `json:"tables,omitempty"`
	// Notes say what was not measured, and why.
	Notes []string `json:"notes,omitempty"`
	Runs  any      `json:"runs"`
}

// Target is the most that a figure should be or, where Least is set, the least.
type Target struct {
	Figure string  `json:"figure"`
	Most   float64 `json:"most"`
	What   string  `json:"what"`
	Least  float64 `json:"least,omitempty"`
}

func (t Target) met(v float64) bool {
	if t.Least != 0 {
		return v >= t.Least
	}
	return v <= t.Most
}

func (t Target) String() string {
	if t.Least != 0 {
		return "at least " + Number(t.Least)
	}
	return "at most " + Number(t.Most)
}

// Table has as many cells in each row as in its head.
type Table struct {
	Title string     `json:"title"`
	Head  []string   `json:"head"`
	Rows  [][]string `json:"rows"`
}

// Set stores a figure unless it is not a number: what was not measured has no key.
func (r *Result) Set(key string, value float64) {
	if math.IsNaN(value) || math.IsInf(value, 0) {
		return
	}
	if r.Figures == nil {
		r.Figures = map[string]float64{}
	}
	r.Figures[key] = value
}

// Write writes the result to dir/NAME.json, whole or not at all.
func (r *Result) Write(dir string) (path string, err error) {
	r.Written = time.Now().UTC().Truncate(time.Second)
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return "", fmt.Errorf("write result %q: %w", r.Name, err)
	}
	path = filepath.Join(dir, r.Name+".json")
	tmp := path + ".tmp"
	if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(tmp, append(b, '\n'), 0o644)); err != nil {
		return "", fmt.Errorf("write result %q: %w", r.Name, err)
	}
	return path, os.Rename(tmp, path)
}

// Read reads what Write has written.
func Read(path string) (*Result, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read result: %w", err)
	}
	r := &Result{}
	if err := json.Unmarshal(b, r); err != nil {
		return nil, fmt.Errorf("read result %q: %w", path, err)
	}
	if r.Name == "" {
		return nil, fmt.Errorf("read result %q: it has no name; is it the result of a benchmark?", path)
	}
	return r, nil
}

// Markdown renders everything but the raw runs.
func (r *Result) Markdown(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "## %s\n\n`%s`, %s  \n%s  \n", r.Name, r.Command, r.Written.Format("2006-01-02 15:04 MST"), r.Machine)
	var versions []string
	for program, v := range r.Versions {
		versions = append(versions, program+" "+v)
	}
	slices.Sort(versions)
	fmt.Fprintf(&b, "%s\n", strings.Join(versions, ", "))
	if len(r.Targets) > 0 {
		t := Table{Title: "Targets", Head: []string{"figure", "measured", "target", "met"}}
		for _, g := range r.Targets {
			measured, met := "not measured", ""
			if v, ok := r.Figures[g.Figure]; ok {
				measured, met = Number(v), "no"
				if g.met(v) {
					met = "yes"
				}
			}
			t.Rows = append(t.Rows, []string{g.What + " (`" + g.Figure + "`)", measured, g.String(), met})
		}
		t.markdown(&b)
	}
	for _, t := range r.Tables {
		if len(t.Rows) > 0 {
			t.markdown(&b)
		}
	}
	t := Table{Title: "All figures", Head: []string{"figure", "value"}}
	for key, v := range r.Figures {
		t.Rows = append(t.Rows, []string{"`" + key + "`", Number(v)})
	}
	slices.SortFunc(t.Rows, func(a, b []string) int { return strings.Compare(a[0], b[0]) })
	t.markdown(&b)
	for _, n := range r.Notes {
		fmt.Fprintf(&b, "\n- %s", n)
	}
	b.WriteString("\n")
	_, err := io.WriteString(w, b.String())
	return err
}

func (t Table) markdown(b *strings.Builder) {
	fmt.Fprintf(b, "\n### %s\n\n| %s |\n|%s\n", t.Title, strings.Join(t.Head, " | "), strings.Repeat(" --- |", len(t.Head)))
	for _, row := range t.Rows {
		fmt.Fprintf(b, "| %s |\n", strings.Join(row, " | "))
	}
}

// Number writes a figure with four digits.
func Number(v float64) string {
	a := math.Abs(v)
	switch {
	case math.IsNaN(v):
		return "-"
	case v == math.Trunc(v) && a < 1e6, a >= 1000:
		return fmt.Sprintf("%.0f", v)
	case a >= 100:
		return fmt.Sprintf("%.1f", v)
	case a >= 10:
		return fmt.Sprintf("%.2f", v)
	}
	return fmt.Sprintf("%.3f", v)
}
