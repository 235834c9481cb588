// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"math/big"
	"strconv"
	"strings"
	"time"
)

const (
	defaultTimeout = 5 * time.Second
	defaultPoll    = 50 * time.Millisecond
)

// units from the longest name to the shortest, so that the first suffix that fits is the right one.
var units = []struct {
	name  string
	bytes int64
}{
	{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"TiB", 1 << 40},
	{"kB", 1e3}, {"KB", 1e3}, {"MB", 1e6}, {"GB", 1e9}, {"TB", 1e12}, {"B", 1},
}

// ParseSize reads a number of bytes such as "4096", "1.5GiB" or "20 MB".
func ParseSize(s string) (int64, error) {
	number, factor := strings.TrimSpace(s), int64(1)
	for _, u := range units {
		if n, ok := strings.CutSuffix(number, u.name); ok {
			number, factor = strings.TrimSpace(n), u.bytes
			break
		}
	}
	if !plainNumber(number) {
		return 0, fmt.Errorf("size %q is not a number with a unit of kB, MB, GB, TB, KiB, MiB, GiB or TiB, such as \"2GiB\"", s)
	}
	// Exact: a float64 keeps no more than 53 bits of a number.
	v, ok := new(big.Rat).SetString(number)
	if !ok {
		return 0, fmt.Errorf("size %q is not a number", s)
	}
	v.Mul(v, new(big.Rat).SetInt64(factor))
	whole := new(big.Int).Quo(v.Num(), v.Denom())
	if !whole.IsInt64() {
		return 0, fmt.Errorf("size %q is too large", s)
	}
	return whole.Int64(), nil
}

// plainNumber keeps out what ParseFloat knows beyond digits and one point: signs, exponents, hexadecimal, Inf and NaN.
func plainNumber(s string) bool {
	return s != "" && strings.Trim(s, "0123456789.") == "" && strings.Count(s, ".") <= 1 && s != "."
}

// FormatSize writes n in the largest binary or decimal unit that keeps it exact.
func FormatSize(n int64) string {
	for _, u := range []struct {
		name  string
		bytes int64
	}{
		{"TiB", 1 << 40}, {"TB", 1e12}, {"GiB", 1 << 30}, {"GB", 1e9}, {"MiB", 1 << 20}, {"MB", 1e6}, {"KiB", 1 << 10}, {"kB", 1e3},
	} {
		if n != 0 && n%u.bytes == 0 {
			return strconv.FormatInt(n/u.bytes, 10) + u.name
		}
	}
	return strconv.FormatInt(n, 10)
}

// Space is an amount of a filesystem: bytes, or a share of its size where Percent is not 0.
type Space struct {
	Bytes   int64
	Percent float64
}

// Of gives the amount in bytes for a filesystem of total bytes.
func (s Space) Of(total int64) int64 {
	if s.Percent != 0 {
		return int64(float64(total) * s.Percent / 100)
	}
	return s.Bytes
}

// Inodes gives the same share of a filesystem's inodes as [Space.Of] gives of its bytes.
func (s Space) Inodes(total, inodes int64) int64 {
	if total <= 0 || inodes <= 0 {
		return 0
	}
	return int64(min(1, float64(s.Of(total))/float64(total)) * float64(inodes))
}

func (s Space) String() string {
	if s.Percent != 0 {
		return strconv.FormatFloat(s.Percent, 'f', -1, 64) + "%"
	}
	return FormatSize(s.Bytes)
}

// MarshalText implements encoding.TextMarshaler.
func (s Space) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *Space) UnmarshalText(b []byte) error {
	text := string(b)
	number, ok := strings.CutSuffix(strings.TrimSpace(text), "%")
	if !ok {
		n, err := ParseSize(text)
		if err != nil {
			return err
		}
		*s = Space{Bytes: n}
		return nil
	}
	number = strings.TrimSpace(number)
	p, err := strconv.ParseFloat(number, 64)
	if err != nil || !plainNumber(number) || p >= 100 {
		return fmt.Errorf("share %q is not a number from 0%% to below 100%%", text)
	}
	*s = Space{Percent: p}
	return nil
}

// Rate is bytes a second; 0 has a meaning of its own for each key.
type Rate int64

func (r Rate) String() string {
	if r == 0 {
		return "0"
	}
	return FormatSize(int64(r)) + "/s"
}

// MarshalText implements encoding.TextMarshaler.
func (r Rate) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (r *Rate) UnmarshalText(b []byte) error {
	n, err := ParseSize(strings.TrimSuffix(strings.TrimSpace(string(b)), "/s"))
	if err != nil {
		return fmt.Errorf("rate %q is not a size a second, such as \"50MB/s\"", b)
	}
	*r = Rate(n)
	return nil
}

// Duration is a time.Duration that is written as text.
type Duration time.Duration

func (d Duration) String() string { return time.Duration(d).String() }

// MarshalText implements encoding.TextMarshaler.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(strings.TrimSpace(string(b)))
	if err != nil || v < 0 {
		return fmt.Errorf("duration %q is not a number with a unit of ms, s, m or h, such as \"5s\"", b)
	}
	*d = Duration(v)
	return nil
}

// Item is one of a List.
type Item struct{ Name, Value string }

func (i Item) count() (int, error) {
	n, err := strconv.ParseUint(i.Value, 10, 31)
	return int(n), err
}

// List is written as text, "name=value, name=value". No name is there twice.
type List []Item

func (l List) String() string {
	var all []string
	for _, i := range l {
		all = append(all, i.Name+"="+i.Value)
	}
	return strings.Join(all, ", ")
}

// MarshalText implements encoding.TextMarshaler.
func (l List) MarshalText() ([]byte, error) { return []byte(l.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (l *List) UnmarshalText(b []byte) error {
	*l = nil
	if strings.TrimSpace(string(b)) == "" {
		return nil
	}
	seen := map[string]bool{}
	for item := range strings.SplitSeq(string(b), ",") {
		name, value, ok := strings.Cut(item, "=")
		name, value = strings.TrimSpace(name), strings.TrimSpace(value)
		if !ok || name == "" || value == "" || strings.Contains(value, "=") {
			return fmt.Errorf("%q is not name=value; give such pairs, separated by commas", strings.TrimSpace(item))
		}
		if seen[name] {
			return fmt.Errorf("%q is there twice", name)
		}
		seen[name] = true
		*l = append(*l, Item{name, value})
	}
	return nil
}
