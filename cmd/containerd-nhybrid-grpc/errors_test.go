// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/stretchr/testify/require"
)

func TestErrorsAreOneLine(t *testing.T) {
	require.NoError(t, oneLine(nil))
	for name, c := range map[string]struct {
		err  error
		is   error
		want string
	}{
		"class":          {fmt.Errorf("read: %w", errdefs.ErrNotFound), errdefs.ErrNotFound, "read: not found"},
		"class of cause": {fmt.Errorf("read: %w: %w", io.ErrUnexpectedEOF, errdefs.ErrInvalidArgument), errdefs.ErrInvalidArgument, "read: unexpected EOF: invalid argument"},
		"two of them": {fmt.Errorf("unpack: %w: %w", fmt.Errorf("read: %w: %w", io.EOF, errdefs.ErrDataLoss), errdefs.ErrInvalidArgument),
			errdefs.ErrDataLoss, "unpack: read: EOF: data loss: invalid argument"},
		"joined":   {errors.Join(fmt.Errorf("a: %w", errdefs.ErrUnavailable), errors.New("b")), errdefs.ErrUnavailable, "a: unavailable; b"},
		"no class": {errors.New("a"), errdefs.ErrUnknown, "a"},
	} {
		t.Run(name, func(t *testing.T) {
			got := errgrpc.ToNative(oneLine(errgrpc.ToGRPC(c.err)))
			require.ErrorIs(t, got, c.is)
			require.Contains(t, got.Error(), c.want)
			require.NotContains(t, got.Error(), "\n")
		})
	}
}
