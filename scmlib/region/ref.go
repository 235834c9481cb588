// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package region

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/nhybrid/nhybrid/scmlib/region/stream"
)

// Kind is what a region belongs to.
type Kind string

// The kinds of regions.
const (
	Container Kind = "container"
	Volume    Kind = "volume"
	Snapshot  Kind = "snapshot"
)

// Ref names a region.
type Ref struct {
	Kind      Kind   `json:"kind"`
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
}

// String is the form that ParseRef reads, without the namespace.
func (r Ref) String() string {
	if r.Kind == Volume {
		return r.Name
	}
	return string(r.Kind) + "/" + r.Name
}

// ParseRef reads "NAME" (a volume), "container/ID" or "snapshot/NAME", of a namespace.
func ParseRef(namespace, s string) (Ref, error) {
	r := Ref{Volume, namespace, s}
	if kind, name, ok := strings.Cut(s, "/"); ok {
		r.Kind, r.Name = Kind(kind), name
	}
	return r, r.check()
}

// identifier is what containerd takes as a name: so it holds neither '/' nor '+', and is neither "." nor "..".
var identifier = regexp.MustCompile(`^[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*$`)

const maxIdentifier = 76

func checkIdentifier(what, s string) error {
	if len(s) > maxIdentifier || !identifier.MatchString(s) {
		return fmt.Errorf("%s %.100q: use letters, digits, and single '.', '-', '_' between them, at most %d: %w", what, s, maxIdentifier, errdefs.ErrInvalidArgument)
	}
	return nil
}

func (r Ref) check() error {
	switch r.Kind {
	case Container, Volume, Snapshot:
	default:
		return fmt.Errorf("region %.100q: it is NAME, container/ID or snapshot/NAME: %w", r.Kind+"/"+Kind(r.Name), errdefs.ErrInvalidArgument)
	}
	if err := checkIdentifier("namespace", r.Namespace); err != nil {
		return err
	}
	if err := checkIdentifier("name of "+string(r.Kind), r.Name); err != nil {
		return err
	}
	if r.Kind != Volume {
		return nil
	}
	// A volume is a CDI device beside those that are called by their size.
	if _, err := parseBytes(r.Name); err == nil || r.Name == "image" || r.Name == "all" {
		return fmt.Errorf("name of volume %q: it would be taken for a size or a keyword: %w", r.Name, errdefs.ErrInvalidArgument)
	}
	return nil
}

// key is the name of the region's directory.
func (r Ref) key() string { return string(r.Kind) + "+" + r.Namespace + "+" + r.Name }

func refOfKey(key string) (Ref, error) {
	f := strings.Split(key, "+")
	if len(f) != 3 {
		return Ref{}, fmt.Errorf("directory %.100q is not KIND+NAMESPACE+NAME: %w", key, errdefs.ErrInvalidArgument)
	}
	r := Ref{Kind(f[0]), f[1], f[2]}
	return r, r.check()
}

// ParseSize reads bytes, or a number with the suffix k, m, g or t (of 1024), as the size of a region.
func ParseSize(s string) (int64, error) {
	n, err := parseBytes(s)
	if err != nil {
		return 0, err
	}
	return n, stream.CheckSize(n)
}

func parseBytes(s string) (int64, error) {
	number, shift := strings.ToLower(s), 0
	for i, suffix := range []string{"k", "m", "g", "t"} {
		if n, ok := strings.CutSuffix(number, suffix); ok {
			number, shift = n, 10*(i+1)
			break
		}
	}
	n, err := strconv.ParseInt(number, 10, 64)
	if err != nil || n <= 0 || n > stream.MaxSize>>shift {
		return 0, fmt.Errorf("size %.40q: use bytes, or a number with k, m, g or t: %w", s, errdefs.ErrInvalidArgument)
	}
	return n << shift, nil
}

// FormatSize is the shortest form that ParseSize reads.
func FormatSize(n int64) string {
	for _, u := range []struct {
		shift  int
		suffix string
	}{{40, "t"}, {30, "g"}, {20, "m"}, {10, "k"}} {
		if n >= 1<<u.shift && n%(1<<u.shift) == 0 {
			return strconv.FormatInt(n>>u.shift, 10) + u.suffix
		}
	}
	return strconv.FormatInt(n, 10)
}
