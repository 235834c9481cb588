// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package tier

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/placement"
)

func TestWriteOut(t *testing.T) {
	s := open(t)
	dir := s.Data(placement.HDD, "7")
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "sub"), 0o755))
	var want int64
	for i := range 2 * writeOutFiles {
		write(t, filepath.Join(dir, "sub", fmt.Sprint(i)), strings.Repeat("x", i))
		want += int64(i)
	}
	big := strings.Repeat("0123456789abcdef", writeOutBytes/4)
	write(t, filepath.Join(dir, "big"), big)
	want += int64(len(big))
	require.NoError(t, os.Symlink("/dev/zero", filepath.Join(dir, "link")))

	var got, most int64
	require.NoError(t, s.WriteOut(t.Context(), placement.HDD, "7", func(n int64) error {
		got, most = got+n, max(most, n)
		return nil
	}))
	require.Equal(t, want, got)
	require.LessOrEqual(t, most, int64(2*writeOutBytes), "too much was under way at once")

	stop := errors.New("stop")
	calls := 0
	require.ErrorIs(t, s.WriteOut(t.Context(), placement.HDD, "7", func(int64) error { calls++; return stop }), stop)
	require.Equal(t, 1, calls)
	require.NoError(t, s.WriteOut(t.Context(), placement.HDD, "8", nil), "a layer that is gone")
}
