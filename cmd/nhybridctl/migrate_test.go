// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/cmd/internal/config"
	"github.com/nhybrid/nhybrid/snapshotter/control"
)

// What the daemon names by numbers is not shown as a path of the image.
func TestMovingSaysWhatMoves(t *testing.T) {
	for _, x := range []struct{ current, direction, want string }{
		{"326", "home", "layer 326 (home)"},
		{"/12/0a/266", "up", "file 266 of layer 12 (up)"},
		{"/12/0a/266", "down", "file 266 of layer 12 (down)"},
		{"a\nb", "down", `"a\nb" (down)`},
	} {
		require.Equal(t, x.want, moving(x.current, x.direction), x.current)
	}
}

// Bytes are shown as they are; inodes are a line of their own where they are the scarcer.
func TestMigrateStatusShowsScarceInodes(t *testing.T) {
	show := func(m *control.MigrationState) string {
		var out bytes.Buffer
		require.NoError(t, (&app{out: &out}).printMigration(m))
		return out.String()
	}
	m := working()
	require.NotContains(t, show(m), "inodes")
	m.InodesUsed = 31000
	out := show(m)
	require.Contains(t, lineWith(t, out, "nvm "), "1.00 GB of 4.00 GB used (25.0 %); files leave from 3.60 GB")
	require.Equal(t, "inodes   31000 of 32768 used (94.6 %); files leave from 29491 until 26214, reserve 1638", lineWith(t, out, "inodes"))
}

func TestPinOfAGlobThatIsNotUTF8(t *testing.T) {
	socket := serve(t, &backend{hot: newHot(t)}, config.Default())
	code, _, errs := ctl(t, "--address", socket, "profile", "pin", image, "/n/bad\xff")
	require.Equal(t, exitUsage, code)
	require.Contains(t, errs, `pin: glob "/n/bad\xff" is not UTF-8; write ? for each byte that is not`)
	code, _, errs = ctl(t, "--address", socket, "profile", "pin", image, "/n/bad?")
	require.Zero(t, code, errs)
}
