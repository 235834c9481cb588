// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/cmd/internal/config"
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

func TestPinOfAGlobThatIsNotUTF8(t *testing.T) {
	socket := serve(t, &backend{hot: newHot(t)}, config.Default())
	code, _, errs := ctl(t, "--address", socket, "profile", "pin", image, "/n/bad\xff")
	require.Equal(t, exitUsage, code)
	require.Contains(t, errs, `pin: glob "/n/bad\xff" is not UTF-8; write ? for each byte that is not`)
	code, _, errs = ctl(t, "--address", socket, "profile", "pin", image, "/n/bad?")
	require.Zero(t, code, errs)
}
