// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package image

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Spec is an image in steps, one a layer, bottom first.
type Spec struct {
	Name   string
	Steps  []Step
	Config v1.Config
}

// Step makes one layer. Exactly one of the fields beside Then and History is set.
type Step struct {
	// Base is a minimal Debian with the packages beside (not nil, but may be empty): the first step of an image that has Packages or Run.
	Base []string
	// Packages are installed by apt-get, with what they depend on and without what they recommend.
	Packages []string
	// Then is a shell command after Packages, in the same layer: what the step of an original removes again.
	Then string `json:",omitempty"`
	// Extract are packages whose files alone are unpacked; nothing needs to be below.
	Extract []string
	// Run is a shell command in the chroot, without network.
	Run string
	// Files are literal entries.
	Files []Entry
	// Synthetic is one generated file.
	Synthetic *Synthetic
	// History is the step as the image's history tells it. "": a description of the step.
	History string
}

// Synthetic is a generated file of Uncompressed bytes that makes a layer of about Compressed bytes: noise, then zeros.
type Synthetic struct {
	Path         string
	Compressed   int64
	Uncompressed int64
}

// builderVersion is part of every cache key. It is raised when an equal step no longer gives an equal layer.
const builderVersion = "1"

// check says what is wrong with a spec.
func (s Spec) check() error {
	if len(s.Steps) == 0 {
		return fmt.Errorf("image %q: no steps", s.Name)
	}
	based := false
	for i, step := range s.Steps {
		kinds := 0
		for _, set := range []bool{
			step.Base != nil, step.Packages != nil, step.Extract != nil, step.Run != "", step.Files != nil, step.Synthetic != nil,
		} {
			if set {
				kinds++
			}
		}
		var err error
		switch {
		case kinds != 1:
			err = fmt.Errorf("%d kinds of content are set, must be one", kinds)
		case step.Base != nil && i > 0:
			err = errors.New("a Base must be the first step")
		case step.Then != "" && step.Packages == nil:
			err = errors.New("a Then must have Packages")
		case (step.Packages != nil || step.Run != "") && !based:
			err = errors.New("steps with Packages or Run need a Base below")
		case step.Synthetic != nil && (step.Synthetic.Uncompressed < 0 || step.Synthetic.Compressed < 0 || step.Synthetic.Path == ""):
			err = fmt.Errorf("Synthetic %+v: needs a path and sizes of 0 and more", *step.Synthetic)
		}
		if err != nil {
			return fmt.Errorf("image %q, step %d: %w", s.Name, i, err)
		}
		based = based || step.Base != nil
	}
	return nil
}

func (s Step) history() string {
	switch {
	case s.History != "":
		return s.History
	case s.Base != nil:
		return "debian " + strings.Join(s.Base, " ")
	case s.Packages != nil:
		return "apt-get install " + strings.Join(s.Packages, " ")
	case s.Extract != nil:
		return "dpkg-deb -x " + strings.Join(s.Extract, " ")
	case s.Run != "":
		return s.Run
	case s.Synthetic != nil:
		return fmt.Sprintf("file of %d bytes", s.Synthetic.Uncompressed)
	}
	return "files"
}

// key names the layer in the cache: by what it is made of and, where that matters, what lies below.
func (s Step) key(below []string) (string, error) {
	s.History = ""
	if s.Base != nil || s.Extract != nil || s.Files != nil || s.Synthetic != nil {
		below = nil
	}
	b, err := json.Marshal(struct {
		Version string
		Below   []string
		Step    Step
	}{builderVersion, below, s})
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:16]), nil
}
