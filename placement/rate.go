// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package placement

import (
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// byteUnits and bitUnits are what a rate may end in; the bit units stand for an eighth of the bytes and are matched
// without regard to case, as tc writes "100mbit". Bytes are matched exactly: "mb/s" could mean either.
var (
	byteUnits = []struct {
		name  string
		bytes float64
	}{
		{"B", 1}, {"kB", 1e3}, {"KB", 1e3}, {"MB", 1e6}, {"GB", 1e9}, {"TB", 1e12},
		{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"TiB", 1 << 40},
	}
	bitUnits = []struct {
		name string
		bits float64
	}{{"bit", 1}, {"kbit", 1e3}, {"mbit", 1e6}, {"gbit", 1e9}, {"tbit", 1e12}}
)

// ParseRate reads a rate as a person writes it, "100Mbit", "1.5Gbit/s", "140MB/s", "64 MiB/s", and returns bytes per second, which are
// above 0 and finite. Errors are errdefs.ErrInvalidArgument.
func ParseRate(s string) (float64, error) {
	fail := func(why string) (float64, error) {
		return 0, fmt.Errorf("rate %q: %s; write it like 100Mbit, 1Gbit, 140MB/s or 1.3GB/s: %w", s, why, errdefs.ErrInvalidArgument)
	}
	t := strings.TrimSpace(s)
	cut := strings.IndexFunc(t, func(r rune) bool { return (r < '0' || r > '9') && r != '.' })
	if cut < 0 {
		return fail("the unit is missing")
	}
	v, err := strconv.ParseFloat(t[:cut], 64)
	if err != nil {
		return fail("it must begin with a number")
	}
	unit := strings.TrimSpace(t[cut:])
	factor := 0.0
	bare, perSecond := strings.CutSuffix(unit, "/s")
	for _, u := range bitUnits {
		if strings.EqualFold(bare, u.name) || (!perSecond && strings.EqualFold(unit, strings.TrimSuffix(u.name, "it")+"ps")) {
			factor = u.bits / 8
		}
	}
	if perSecond {
		for _, u := range byteUnits {
			if bare == u.name {
				factor = u.bytes
			}
		}
	}
	if factor == 0 {
		return fail(fmt.Sprintf("unknown unit %q", unit))
	}
	if v *= factor; !(v > 0) || math.IsInf(v, 0) {
		return fail("it must be above 0")
	}
	return v, nil
}

// FormatRate writes a rate in bytes per second with three digits: "12.5 MB/s".
func FormatRate(r float64) string { return decimal(r) + "/s" }

// FormatBytes writes a number of bytes with three digits and decimal units: "45.1 MB".
func FormatBytes(n int64) string { return decimal(float64(n)) }

func decimal(v float64) string {
	units := []string{"B", "kB", "MB", "GB", "TB", "PB", "EB"}
	i := 0
	for math.Abs(v) >= 999.5 && i < len(units)-1 {
		v /= 1000
		i++
	}
	digits := 2
	switch a := math.Abs(v); {
	case i == 0 || a >= 99.95:
		digits = 0
	case a >= 9.995:
		digits = 1
	}
	return strconv.FormatFloat(v, 'f', digits, 64) + " " + units[i]
}
