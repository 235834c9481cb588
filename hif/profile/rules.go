// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package profile

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/bmatcuk/doublestar/v4"
	"github.com/containerd/errdefs"
)

// Rule is what the operator says about the files that a glob matches.
type Rule struct {
	// Glob in the syntax of doublestar: *, **, ?, [class], {a,b}; relative to
	// the root of the image. A leading / is taken off when a rule is made.
	Glob string `json:"glob"`
	// Action is Pin, Exclude or Normal.
	Action Action `json:"action"`
}

// Action is the effect of a rule.
type Action string

// The actions.
const (
	Pin     Action = "pin"     // hot, whether starts use it or not
	Exclude Action = "exclude" // never hot
	Normal  Action = "normal"  // as starts use it: an exception to an earlier rule
)

// doublestar tries every combination of the alternatives of all braces: 22 pairs
// took half a second for one path. A rule may come with a profile from outside.
const (
	maxGlob         = 1024
	maxBraces       = 4
	maxAlternatives = 32
)

// NewRule checks a glob as it was typed.
func NewRule(glob string, action Action) (Rule, error) {
	r := Rule{strings.TrimLeft(glob, "/"), action}
	return r, r.check()
}

func (r Rule) check() error {
	switch {
	case r.Action != Pin && r.Action != Exclude && r.Action != Normal:
		return fmt.Errorf("rule for %.80q: no such action %.20q: %w", r.Glob, r.Action, errdefs.ErrInvalidArgument)
	case r.Glob == "" || len(r.Glob) > maxGlob:
		return fmt.Errorf("glob %.80q has %d bytes, want 1 to %d: %w", r.Glob, len(r.Glob), maxGlob, errdefs.ErrInvalidArgument)
	case strings.Count(r.Glob, "{") > maxBraces || strings.Count(r.Glob, ",") > maxAlternatives:
		return fmt.Errorf("glob %.80q has more than %d braces or %d alternatives; make several rules of it: %w", r.Glob, maxBraces, maxAlternatives, errdefs.ErrInvalidArgument)
	case !doublestar.ValidatePattern(r.Glob):
		return fmt.Errorf("glob %.80q is malformed: %w", r.Glob, errdefs.ErrInvalidArgument)
	}
	return nil
}

// Set adds a rule behind the others. Earlier rules with the same glob go. A
// Normal rule stays only where it makes a difference: where an earlier rule
// with another glob is left.
func (p *Profile) Set(r Rule, now time.Time) error {
	if err := r.check(); err != nil {
		return err
	}
	rules := slices.DeleteFunc(slices.Clone(p.Rules), func(o Rule) bool { return o.Glob == r.Glob })
	if r.Action != Normal || len(rules) > 0 {
		rules = append(rules, r)
	}
	if len(rules) > MaxRules {
		return fmt.Errorf("profile of %s has %d rules already: %w", p.Image, MaxRules, errdefs.ErrResourceExhausted)
	}
	p.Rules = rules
	p.Updated = now.UTC()
	return nil
}

// Action is what the rules say about a path.
func (p *Profile) Action(path Path) Action {
	for _, r := range slices.Backward(p.Rules) {
		if doublestar.MatchUnvalidated(r.Glob, string(path)) {
			return r.Action
		}
	}
	return Normal
}

// Hot is a file that belongs on the fast tier.
type Hot struct {
	File
	Pinned bool
}

// Hot lists the files that belong on the fast tier: those of the profile that
// are not excluded, in order, then those that are pinned only.
func (p *Profile) Hot(files Listing) []Hot {
	var hot []Hot
	known := make(map[Path]bool, len(p.Files))
	for _, f := range p.Files {
		known[f.Path] = true
		if a := p.Action(f.Path); a != Exclude {
			hot = append(hot, Hot{f, a == Pin})
		}
	}
	if !slices.ContainsFunc(p.Rules, func(r Rule) bool { return r.Action == Pin }) {
		return hot
	}
	for e := range files.All {
		if !known[e.Path] && p.Action(e.Path) == Pin {
			hot = append(hot, Hot{File{Path: e.Path, Layer: e.Layer, Size: e.Size, Digest: e.Digest, Kind: Read, Touched: -1}, true})
		}
	}
	return hot
}
