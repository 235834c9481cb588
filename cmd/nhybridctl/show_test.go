// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/snapshotter/control"
)

// longError is an error as it comes from deep inside the daemon: a path of 4 KB, newlines and a class that each hand added.
func longError() string {
	err := fmt.Errorf("open \"/%s\": %w", strings.Repeat("d/", 2047), unix.ENAMETOOLONG)
	for _, doing := range []string{"pack directory", "work on\nlayer 7"} {
		err = fmt.Errorf("%s: %w: %w", doing, err, errdefs.ErrDataLoss)
	}
	return err.Error()
}

const shortError = `work on layer 7: pack directory: open "/d/d/`

// An error that was passed on by several hands is one short line of a table.
func TestErrorsInTablesAreShort(t *testing.T) {
	var out bytes.Buffer
	a := &app{out: &out}
	require.NoError(t, a.printStatus(&control.StatusResponse{
		Queues: []*control.Queue{{Name: "background", Failed: 1, LastError: longError()}},
	}, moment.AsTime()))
	line := lineWith(t, out.String(), "queue background")
	require.Contains(t, line, "1 failed: "+shortError)
	require.True(t, strings.HasSuffix(line, `/d/": file name too long: data loss`), line)
	require.Equal(t, 1, strings.Count(line, "data loss"), line)
	require.Less(t, len(line), 320)

	l := &control.Layer{SnapshotId: "1", Error: longError()}
	require.Contains(t, l.Sentence(1), "cannot be used: "+shortError)
	require.Less(t, len(l.Sentence(1)), 320)
}

// lineWith is the one line of a text that holds a word.
func lineWith(t *testing.T, text, word string) (found string) {
	t.Helper()
	for line := range strings.Lines(text) {
		if strings.Contains(line, word) {
			require.Empty(t, found, "more than one line with %q: %s", word, text)
			found = strings.TrimSuffix(line, "\n")
		}
	}
	require.NotEmpty(t, found, "no line with %q: %s", word, text)
	return found
}
