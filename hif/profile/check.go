// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package profile

import (
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

func invalid(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}

// Check tells what is wrong with a path.
func (p Path) Check() error {
	switch s := string(p); {
	case s == "":
		return invalid("empty path")
	case len(s) > maxPath:
		return invalid("path %.40q… has %d bytes, more than %d", s, len(s), maxPath)
	case s[0] == '/':
		return invalid("path %.120q is absolute; paths are relative to the image's root", s)
	case strings.IndexByte(s, 0) >= 0:
		return invalid("path %.120q holds a zero byte", s)
	}
	for e := range strings.SplitSeq(string(p), "/") {
		switch {
		case e == "..":
			return invalid("path %.120q leads out by \"..\"", string(p))
		case e == "" || e == ".":
			return invalid("path %.120q is not clean", string(p))
		case len(e) > maxName:
			return invalid("path %.40q… has a name of %d bytes, more than %d", string(p), len(e), maxName)
		}
	}
	return nil
}

// Validate tells what is wrong with a profile, first thing first. It needs
// nothing but the profile.
func (p *Profile) Validate() error {
	if p.Schema < 1 || p.Schema > Schema {
		return invalid("schema %d is not known", p.Schema)
	}
	if err := checkDigest(p.Image); err != nil {
		return fmt.Errorf("image: %w", err)
	}
	if p.Inherited != "" {
		if err := checkDigest(p.Inherited); err != nil {
			return fmt.Errorf("inherited: %w", err)
		}
	}
	if len(p.Repository) > 512 || strings.ContainsFunc(p.Repository, func(r rune) bool { return r <= ' ' || r == 0x7f }) {
		return invalid("repository %.80q is no name", p.Repository)
	}
	if len(p.Layers) > MaxLayers {
		return invalid("%d layers, more than %d", len(p.Layers), MaxLayers)
	}
	for i, l := range p.Layers {
		if err := checkDigest(l); err != nil {
			return fmt.Errorf("layer %d: %w", i, err)
		}
	}
	if p.Starts < 0 || p.Starts > MaxStarts || p.Incomplete < 0 || p.Incomplete > MaxStarts {
		return invalid("%d and %d starts", p.Starts, p.Incomplete)
	}
	if y := p.Created.Year(); y < 0 || y > 9999 {
		return invalid("created in year %d", y)
	}
	if y := p.Updated.Year(); y < 0 || y > 9999 {
		return invalid("updated in year %d", y)
	}
	if len(p.Rules) > MaxRules {
		return invalid("%d rules, more than %d", len(p.Rules), MaxRules)
	}
	for i, r := range p.Rules {
		if err := r.check(); err != nil {
			return fmt.Errorf("rule %d: %w", i+1, err)
		}
	}
	return p.checkFiles()
}

func (p *Profile) checkFiles() error {
	if len(p.Files) > MaxFiles {
		return invalid("%d files, more than %d", len(p.Files), MaxFiles)
	}
	seen := make(map[Path]bool, len(p.Files))
	ranges := 0
	for i, f := range p.Files {
		err := f.check()
		switch {
		case err != nil:
		case f.Layer >= len(p.Layers):
			err = invalid("layer %d of %d", f.Layer, len(p.Layers))
		case f.Starts > p.Starts+p.Incomplete || f.LastStart > p.Starts:
			err = invalid("used in %d starts, last in the %dth, of %d and %d", f.Starts, f.LastStart, p.Starts, p.Incomplete)
		case seen[f.Path]:
			err = invalid("it is there twice")
		}
		if err != nil {
			return fmt.Errorf("file %d, %.120q: %w", i+1, string(f.Path), err)
		}
		seen[f.Path] = true
		if ranges += len(f.Ranges); ranges > maxTotal {
			return invalid("more than %d ranges", maxTotal)
		}
	}
	return nil
}

// check looks at a file by itself.
func (f *File) check() error {
	if err := f.Path.Check(); err != nil {
		return err
	}
	switch {
	case f.Layer < 0:
		return invalid("layer %d", f.Layer)
	case f.Size <= 0 || f.Size > maxSize:
		return invalid("size %d", f.Size)
	case f.Kind != Exec && f.Kind != Library && f.Kind != Read:
		return invalid("no such kind %.20q", string(f.Kind))
	case f.Starts < 0 || f.LastStart < 0:
		return invalid("%d starts, last in the %dth", f.Starts, f.LastStart)
	case !(f.Weight >= 0 && f.Weight <= 1):
		return invalid("weight %g", f.Weight)
	case f.Touched < -1 || f.Touched > f.Size:
		return invalid("%d bytes touched of %d", f.Touched, f.Size)
	case len(f.Ranges) > MaxRanges:
		return invalid("%d ranges, more than %d", len(f.Ranges), MaxRanges)
	}
	end := int64(0)
	for i, r := range f.Ranges {
		if r.Offset < end || r.Length <= 0 || r.Length > f.Size || r.Offset > f.Size-r.Length {
			return invalid("range %d is empty, out of order or outside the file", i+1)
		}
		end = r.Offset + r.Length
	}
	if f.Digest != "" {
		return checkDigest(f.Digest)
	}
	return nil
}

func checkDigest(d digest.Digest) error {
	if len(d) > 200 {
		return invalid("digest of %d bytes", len(d))
	}
	if err := d.Validate(); err != nil {
		return invalid("digest %q: %v", string(d), err)
	}
	return nil
}

// Problem is one file of a profile that its image does not have so.
type Problem struct {
	Path Path
	Why  string
}

// Fit holds a profile from outside against the image it is to serve. It
// returns the profile with the files that the image has, at their own layers,
// and what was left out. A profile of another image or of other layers is
// refused with [errdefs.ErrFailedPrecondition].
func Fit(p Profile, image Image, files Listing) (Profile, []Problem, error) {
	if p.Image != image.Digest {
		return Profile{}, nil, fmt.Errorf("profile is of image %s, not of %s: %w", p.Image, image.Digest, errdefs.ErrFailedPrecondition)
	}
	if len(p.Layers) != len(image.Layers) {
		return Profile{}, nil, fmt.Errorf("profile has %d layers, image %s has %d: %w", len(p.Layers), image.Digest, len(image.Layers), errdefs.ErrFailedPrecondition)
	}
	for i := range p.Layers {
		if p.Layers[i] != image.Layers[i] {
			return Profile{}, nil, fmt.Errorf("layer %d of the profile is %s, of image %s %s: %w", i, p.Layers[i], image.Digest, image.Layers[i], errdefs.ErrFailedPrecondition)
		}
	}
	var kept []File
	var problems []Problem
	for _, f := range p.Files {
		e, ok := files.Lookup(f.Path)
		why := ""
		switch {
		case !ok:
			why = "the image has no such regular file"
		case e.Layer != f.Layer:
			why = fmt.Sprintf("it is in layer %d, not %d", e.Layer, f.Layer)
		case e.Size != f.Size:
			why = fmt.Sprintf("it has %d bytes, not %d", e.Size, f.Size)
		case e.Digest != "" && f.Digest != "" && e.Digest != f.Digest:
			why = fmt.Sprintf("its content is %s, not %s", e.Digest, f.Digest)
		}
		if why != "" {
			problems = append(problems, Problem{f.Path, why})
			continue
		}
		kept = append(kept, f)
	}
	p.Files = kept
	return p, problems, nil
}
