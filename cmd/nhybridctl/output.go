// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"golang.org/x/term"
	"google.golang.org/protobuf/proto"

	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/control"
)

// size writes a number of bytes as the user wants it.
func (a *app) size(n int64) string {
	if a.bytes {
		return strconv.FormatInt(n, 10)
	}
	return placement.FormatBytes(n)
}

// table writes rows in columns; the first row is the head.
func (a *app) table(rows [][]string) error {
	var b bytes.Buffer
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	for _, r := range rows {
		fmt.Fprintln(w, strings.Join(r, "\t"))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for line := range strings.Lines(b.String()) {
		if _, err := fmt.Fprintln(a.out, strings.TrimRight(line, " \n")); err != nil {
			return err
		}
	}
	return nil
}

func (a *app) printJSON(v any) error {
	e := json.NewEncoder(a.out)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

func (a *app) printMessage(m proto.Message) error {
	b, err := control.JSON(m)
	if err != nil {
		return err
	}
	return a.printJSON(json.RawMessage(b))
}

// printList writes messages as one array.
func printList[M proto.Message](a *app, all []M) error {
	list := make([]json.RawMessage, 0, len(all))
	for _, m := range all {
		b, err := control.JSON(m)
		if err != nil {
			return err
		}
		list = append(list, b)
	}
	return a.printJSON(list)
}

// colour tells if w takes colours, and the user wants them (https://no-color.org).
func colour(w io.Writer) bool {
	_, _, ok := terminal(w)
	return ok && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// terminal gives the size of w where it is a terminal.
func terminal(w io.Writer) (width, height int, ok bool) {
	f, ok := w.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return 0, 0, false
	}
	width, height, err := term.GetSize(int(f.Fd()))
	return width, height, err == nil
}

func sorted(s []string) []string {
	slices.Sort(s)
	return s
}
