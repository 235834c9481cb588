// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package profile

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// Schema is the version of the format that this package writes, and the
// highest that it reads. docs/hif.md describes it.
const Schema = 1

// Bounds of what [Decode] takes. The largest image of our tables has 60 000
// files, of which a start uses some thousands.
const (
	MaxBytes  = 32 << 20 // of JSON
	MaxFiles  = 200_000
	MaxLayers = 512
	MaxRanges = 512 // of one file
	MaxRules  = 1000
	MaxStarts = 1 << 40

	maxPath  = 4095
	maxName  = 255
	maxSize  = 1 << 53   // a JSON number that every reader keeps exactly
	maxTotal = 1_000_000 // ranges over all files
)

// Path is the path of a file in an image: slash-separated, relative to the
// root, no empty, "." or ".." element. Its bytes may be no UTF-8; such a path
// is {"base64": "…"} in JSON.
type Path string

type rawPath struct {
	Base64 []byte `json:"base64"`
}

// MarshalJSON implements [json.Marshaler].
func (p Path) MarshalJSON() ([]byte, error) {
	if utf8.ValidString(string(p)) {
		return json.Marshal(string(p))
	}
	return json.Marshal(rawPath{[]byte(p)})
}

// UnmarshalJSON implements [json.Unmarshaler].
func (p *Path) UnmarshalJSON(data []byte) error {
	var s string
	if len(data) > 0 && data[0] == '{' {
		var raw rawPath
		dec := json.NewDecoder(bytes.NewReader(data))
		dec.DisallowUnknownFields()
		if err := dec.Decode(&raw); err != nil {
			return err
		}
		if utf8.Valid(raw.Base64) {
			return fmt.Errorf("path %.80q is UTF-8 and needs no base64", base64.StdEncoding.EncodeToString(raw.Base64))
		}
		s = string(raw.Base64)
	} else if err := json.Unmarshal(data, &s); err != nil {
		return err
	}
	*p = Path(s)
	return nil
}

// Encode writes a profile as JSON. What it writes, [Decode] reads.
func Encode(w io.Writer, p Profile) error {
	p.Schema = Schema
	if p.Files == nil {
		p.Files = []File{}
	}
	if p.Layers == nil {
		p.Layers = []digest.Digest{}
	}
	if err := p.Validate(); err != nil {
		return fmt.Errorf("encode profile: %w", err)
	}
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(p); err != nil {
		return fmt.Errorf("encode profile of %s: %w", p.Image, err)
	}
	return nil
}

// Decode reads a profile from a source that is not trusted. It takes no more
// than [MaxBytes], stops at the first entry beyond a bound or that is
// malformed. All its allocations together stay below eight times [MaxBytes]
// (measured: 220 MB for 30 MB that hold 200 000 files).
// Unknown fields are refused: a later format has a later schema number. Errors
// are [errdefs.ErrInvalidArgument], or ErrNotImplemented for a schema of the
// future. Whether the files exist is for [Fit] to say.
func Decode(r io.Reader) (Profile, error) {
	limited := &io.LimitedReader{R: r, N: MaxBytes + 1}
	p, err := decode(json.NewDecoder(&dense{r: limited}))
	switch {
	case limited.N <= 0:
		return Profile{}, fmt.Errorf("decode profile: more than %d MiB: %w", MaxBytes>>20, errdefs.ErrInvalidArgument)
	case err == nil:
		return p, nil
	case errdefs.IsNotImplemented(err), errdefs.IsInvalidArgument(err):
		return Profile{}, fmt.Errorf("decode profile: %w", err)
	default:
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return Profile{}, fmt.Errorf("decode profile: %w: %w", err, errdefs.ErrInvalidArgument)
	}
}

// dense refuses long runs of white space: json.Decoder looks for the next token
// from the beginning of a run each time it has read more, so that its time
// grows with the square of the run.
type dense struct {
	r     io.Reader
	blank int
}

const maxBlank = 8 << 10

func (d *dense) Read(p []byte) (int, error) {
	n, err := d.r.Read(p)
	for _, c := range p[:n] {
		if c != ' ' && c != '\t' && c != '\n' && c != '\r' {
			d.blank = 0
		} else if d.blank++; d.blank > maxBlank {
			return 0, fmt.Errorf("more than %d bytes of white space in a row", maxBlank)
		}
	}
	return n, err
}

var fields = []string{"schema", "image", "repository", "inherited", "layers", "starts", "incompleteStarts", "created", "updated", "rules", "files"}

// header is a profile without its files, which are read one by one.
type header struct {
	Profile
	Files json.RawMessage `json:"files"` // hides Profile.Files; stays empty
}

func decode(dec *json.Decoder) (Profile, error) {
	if err := expect(dec, json.Delim('{')); err != nil {
		return Profile{}, err
	}
	// The schema comes first, so that a profile of the future is told as such
	// and not by the field that is new in it.
	if err := expect(dec, "schema"); err != nil {
		return Profile{}, fmt.Errorf("not a profile: %w", err)
	}
	var p Profile
	if err := dec.Decode(&p.Schema); err != nil {
		return Profile{}, err
	}
	if p.Schema > Schema {
		return Profile{}, fmt.Errorf("schema %d is newer than %d, the newest known here: upgrade nhybrid or export with an older one: %w", p.Schema, Schema, errdefs.ErrNotImplemented)
	}
	seen := map[string]bool{"schema": true}
	var files []File
	rest := []byte(`{`)
	for dec.More() {
		tok, err := dec.Token()
		if err != nil {
			return Profile{}, err
		}
		key, _ := tok.(string)
		// encoding/json takes names in any case; here there is one spelling.
		if !slices.Contains(fields, key) {
			return Profile{}, fmt.Errorf("unknown field %.40q", key)
		}
		if seen[key] {
			return Profile{}, fmt.Errorf("field %.40q comes twice", key)
		}
		seen[key] = true
		if key == "files" {
			if files, err = decodeFiles(dec); err != nil {
				return Profile{}, err
			}
			continue
		}
		var value json.RawMessage
		if err := dec.Decode(&value); err != nil {
			return Profile{}, err
		}
		if len(value) > 1<<20 && key != "rules" {
			return Profile{}, fmt.Errorf("field %.40q has %d bytes", key, len(value))
		}
		name, err := json.Marshal(key)
		if err != nil {
			return Profile{}, err
		}
		if len(rest) > 1 {
			rest = append(rest, ',')
		}
		rest = append(append(append(rest, name...), ':'), value...)
	}
	if err := expect(dec, json.Delim('}')); err != nil {
		return Profile{}, err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return Profile{}, fmt.Errorf("more data behind the profile")
	}
	for _, key := range []string{"image", "layers", "starts", "created", "updated", "files"} {
		if !seen[key] {
			return Profile{}, fmt.Errorf("field %q is missing", key)
		}
	}
	h := header{Profile: p}
	strict := json.NewDecoder(bytes.NewReader(append(rest, '}')))
	strict.DisallowUnknownFields()
	if err := strict.Decode(&h); err != nil {
		return Profile{}, err
	}
	h.Profile.Files = files
	return h.Profile, h.Profile.Validate()
}

func decodeFiles(dec *json.Decoder) ([]File, error) {
	if err := expect(dec, json.Delim('[')); err != nil {
		return nil, fmt.Errorf("files: %w", err)
	}
	dec.DisallowUnknownFields()
	var files []File
	for dec.More() {
		if len(files) == MaxFiles {
			return nil, fmt.Errorf("more than %d files", MaxFiles)
		}
		var f File
		if err := dec.Decode(&f); err != nil {
			return nil, fmt.Errorf("file %d: %w", len(files)+1, err)
		}
		// Here, not at the end: what is refused needs no room.
		if err := f.check(); err != nil {
			return nil, fmt.Errorf("file %d: %w", len(files)+1, err)
		}
		files = append(files, f)
	}
	return files, expect(dec, json.Delim(']'))
}

func expect(dec *json.Decoder, want json.Token) error {
	tok, err := dec.Token()
	if err != nil {
		return err
	}
	if tok != want {
		return fmt.Errorf("at byte %d: want %v", dec.InputOffset(), want)
	}
	return nil
}
