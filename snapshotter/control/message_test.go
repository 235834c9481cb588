// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package control

import (
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

func TestMessage(t *testing.T) {
	err := fmt.Errorf("footer is cut off: %w", errdefs.ErrDataLoss)
	for _, doing := range []string{"read pack", "make view", "prepare\nsnapshot"} {
		err = fmt.Errorf("%s: %w: %w", doing, err, errdefs.ErrDataLoss)
	}
	require.Equal(t, "prepare snapshot: make view: read pack: footer is cut off: data loss", ErrorMessage(err))
	require.Equal(t, "policy \"x\" is none", ErrorMessage(fmt.Errorf("policy \"x\" is none: %w", errdefs.ErrInvalidArgument)))
	require.Equal(t, "a not found, b not found", Message("a not found,\tb  not found"))

	path := "/" + strings.Repeat("d/", 2047)
	have := Message(fmt.Sprintf("open %q: file name too long", path))
	require.Less(t, len(have), 220)
	require.True(t, strings.HasPrefix(have, `open "/d/d/`), have)
	require.True(t, strings.HasSuffix(have, `/d/": file name too long`), have)
	require.NotContains(t, Message(strings.Repeat("é", 2000)), "\ufffd")
	require.NotPanics(t, func() { Message(strings.Repeat("\xff", 2000)) })
}
