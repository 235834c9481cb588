// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package profile says what the cold start of an image needs: which files, in
// what order, how much of each, learned from its starts.
//
// Profiles are values; merging, inheriting and comparing are pure functions.
// Paths are tied to layers by the layers' digests, so that a profile means the
// same on every node. One that comes from outside is untrusted: see [Decode].
package profile

import (
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
)

// Kind is what a start uses a file for.
type Kind string

// The kinds, see package trace.
const (
	Exec    Kind = "exec"
	Library Kind = "library"
	Read    Kind = "read"
)

// Profile is what starts of one image have needed.
type Profile struct {
	// Schema is the version of the format, [Schema].
	Schema int `json:"schema"`
	// Image is the digest of the image's manifest (of one platform).
	Image digest.Digest `json:"image"`
	// Repository is where the image came from, without tag; may be empty.
	Repository string `json:"repository,omitempty"`
	// Inherited is the image whose profile this one began as, if any.
	Inherited digest.Digest `json:"inherited,omitempty"`
	// Layers are the digests of the uncompressed layers, lowest first.
	Layers []digest.Digest `json:"layers"`
	// Starts that were observed to the end, and starts of which events were
	// lost: what those did not show proves nothing.
	Starts     int       `json:"starts"`
	Incomplete int       `json:"incompleteStarts,omitempty"`
	Created    time.Time `json:"created"`
	Updated    time.Time `json:"updated"`
	// Rules of the operator, the last that matches counts. They are kept on
	// the node and never taken from a registry.
	Rules []Rule `json:"rules,omitempty"`
	// Files in the order of first use.
	Files []File `json:"files"`
}

// Complete tells whether at least one start was observed to the end.
func (p *Profile) Complete() bool { return p.Starts > 0 }

// File is one file that starts have used.
type File struct {
	Path  Path  `json:"path"`
	Layer int   `json:"layer"` // index into Layers
	Size  int64 `json:"size"`  // bytes
	// Digest of the content, if known.
	Digest digest.Digest `json:"digest,omitempty"`
	Kind   Kind          `json:"kind"`
	// Starts in which the file was used, and the number of the last of them,
	// counting complete starts from 1; 0: none of this image yet.
	Starts    int `json:"starts"`
	LastStart int `json:"lastStart"`
	// Weight is the share of starts that used the file, late ones counting
	// more; 0 to 1. See [Ageing].
	Weight float64 `json:"weight"`
	// Touched is the most that a start brought into the page cache, in bytes;
	// -1 unknown. Ranges says which parts, where that is less than the file.
	Touched int64   `json:"touched"`
	Ranges  []Range `json:"ranges,omitempty"`
}

// Range is a part of a file, in bytes.
type Range struct {
	Offset int64 `json:"offset"`
	Length int64 `json:"length"`
}

// Image is what a profile must fit.
type Image struct {
	Digest     digest.Digest
	Repository string
	Layers     []digest.Digest
}

// Entry is a regular, non-empty file of an image, as its containers see it.
type Entry struct {
	Path   Path
	Layer  int // index into the image's layers: the one that holds the data
	Size   int64
	Digest digest.Digest // may be empty
}

// Listing is the files of an image. Lookup and All know only regular files
// that are not empty, by their own path: no directories, links or devices, and
// no path that leads through a link.
type Listing interface {
	Lookup(Path) (Entry, bool)
	All(func(Entry) bool)
}

// Start is what one start of an image used.
type Start struct {
	At       time.Time
	Complete bool
	Files    []Use // in the order of first use
}

// Use is the use of one file in one start.
type Use struct {
	Entry
	Kind    Kind
	Touched int64
	Ranges  []Range
}

// New is the empty profile of an image.
func New(image Image, now time.Time) Profile {
	return Profile{Schema: Schema, Image: image.Digest, Repository: image.Repository,
		Layers: slices.Clone(image.Layers), Created: now.UTC(), Updated: now.UTC()}
}
