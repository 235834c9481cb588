// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scmlib

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
)

// FromEnv opens the region that the environment names: SCM_REGION and SCM_MODE; see docs/scm.md. SCM_SIZE is taken if o.Size is 0.
// o.Mode must be Auto, or agree with SCM_MODE.
func FromEnv(o Options) (*Region, error) { return fromEnv(os.Getenv, o) }

func fromEnv(getenv func(string) string, o Options) (*Region, error) {
	mode, err := ParseMode(getenv("SCM_MODE"))
	if err != nil {
		return nil, err
	}
	if o.Mode != Auto && mode != Auto && o.Mode != mode {
		return nil, fmt.Errorf("%w: the program asks for mode %s, SCM_MODE says %s", ErrNoRegion, o.Mode, mode)
	}
	if mode != Auto {
		o.Mode = mode
	}
	if s := getenv("SCM_SIZE"); s != "" && o.Size == 0 {
		if o.Size, err = parseSize(s); err != nil {
			return nil, fmt.Errorf("SCM_SIZE: %w", err)
		}
	}
	if o.Mode == DRAM {
		return Open("", o)
	}
	if p := getenv("SCM_REGION"); p != "" {
		return Open(p, o)
	}
	paths := []string{"/dev/scm/region", "/scm/region"}
	switch o.Mode {
	case Volume:
		paths = paths[1:]
	case Storage:
		paths = []string{"/var/lib/scm/region"}
	}
	for _, p := range paths {
		if _, err := os.Stat(p); !errors.Is(err, fs.ErrNotExist) {
			return Open(p, o)
		}
	}
	return nil, fmt.Errorf("%w: SCM_REGION is not set, and there is no %s: was the container started with a region (--device nhybrid.io/scm=…), "+
		"is the volume mounted, does SCM_MODE name the right place?", ErrNoRegion, strings.Join(paths, ", no "))
}

// ParseMode reads a value of SCM_MODE. "" is Auto.
func ParseMode(s string) (Mode, error) {
	for m := Auto; m <= DRAM; m++ {
		if s == m.String() || s == "" {
			return m, nil
		}
	}
	return Auto, fmt.Errorf("%w: SCM_MODE=%q: use mapping, volume, storage or dram", ErrNoRegion, s)
}

func parseSize(s string) (int64, error) {
	shift := 0
	if i := strings.IndexAny(s, "kKmMgGtT"); i > 0 && i == len(s)-1 {
		shift = 10 * (1 + strings.IndexByte("kmgt", s[i]|0x20))
		s = s[:i]
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n <= 0 || n > maxSize>>shift {
		return 0, fmt.Errorf("%w: %q is not a size", ErrSize, s)
	}
	return n << shift, nil
}
