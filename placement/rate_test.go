// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package placement

import (
	"math"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
)

func TestParseRate(t *testing.T) {
	for s, want := range map[string]float64{
		"100Mbit": 12.5e6, "100mbit": 12.5e6, "1Gbit": 125e6, "1Gbit/s": 125e6, "1.5 Gbit/s": 187.5e6, "800kbit": 1e5, "8bit": 1, "100Mbps": 12.5e6,
		"1.3GB/s": 1.3e9, "140MB/s": 140e6, " 64 MiB/s ": 64 << 20, "1kB/s": 1000, "1KiB/s": 1024, "5B/s": 5, ".5MB/s": 5e5,
	} {
		got, err := ParseRate(s)
		if assert.NoError(t, err, s) {
			assert.InDelta(t, want, got, want*1e-12, s)
		}
	}
	for _, s := range []string{"", "100", "Mbit", "100MB", "100mb/s", "-1MB/s", "0MB/s", "1e3MB/s", "1.2.3MB/s", "NaNMB/s", "100 furlongs", "1Mbps/s", "1MB/s/s"} {
		_, err := ParseRate(s)
		if assert.Error(t, err, s) {
			assert.True(t, errdefs.IsInvalidArgument(err))
			assert.Contains(t, err.Error(), "140MB/s", "the message shows how to write it")
		}
	}
}

func TestFormat(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 999: "999 B", 1000: "1.00 kB", 9994: "9.99 kB", 9996: "10.0 kB", 45_123_456: "45.1 MB", 999_600: "1.00 MB", math.MaxInt64: "9.22 EB", -1500: "-1.50 kB"} {
		assert.Equal(t, want, FormatBytes(n))
	}
	assert.Equal(t, "12.5 MB/s", FormatRate(12.5e6))
}

func FuzzParseRate(f *testing.F) {
	for _, s := range []string{"100Mbit", "1.3GB/s", "9e999MB/s", "99999999999999999999999999999TB/s"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if v, err := ParseRate(s); err == nil && (!(v > 0) || math.IsInf(v, 0)) {
			t.Errorf("%q gives %v", s, v)
		}
	})
}
