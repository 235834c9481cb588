// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package profile

import (
	"bytes"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// Store keeps the JSON of profiles by the digest of the image. It must be safe
// for concurrent use.
type Store interface {
	// Get returns the profile of an image, nil if there is none.
	Get(image digest.Digest) ([]byte, error)
	// Update replaces the profile of an image by what change makes of it; old is
	// nil if there is none, and a nil result deletes. change may be called again,
	// when another change came in between. An error of it leaves all as it was and
	// is returned.
	Update(image digest.Digest, change func(old []byte) ([]byte, error)) error
	// Each calls f for every profile until it returns an error. The data is
	// valid during the call only.
	Each(f func(image digest.Digest, data []byte) error) error
}

// Book is the profiles of a node. It is safe for concurrent use if its store is.
type Book struct {
	Store  Store
	Ageing Ageing
}

// Get returns the profile of an image, or [errdefs.ErrNotFound].
func (b *Book) Get(image digest.Digest) (p Profile, err error) {
	data, err := b.Store.Get(image)
	if err != nil {
		return p, err
	}
	if data == nil {
		return p, fmt.Errorf("no profile of image %s: %w", image, errdefs.ErrNotFound)
	}
	if p, err = Decode(bytes.NewReader(data)); err != nil {
		return p, fmt.Errorf("stored profile of image %s: %w", image, err)
	}
	return p, nil
}

// Record adds a start to the profile of an image, which it begins where there
// is none: from the latest of the same repository, or empty.
func (b *Book) Record(image Image, s Start, files Listing) (p Profile, err error) {
	err = b.begin(image, files, s.At, func(old Profile) (Profile, error) {
		p = Merge(old, s, b.Ageing)
		return p, nil
	})
	return p, err
}

// SetRule adds a rule of the operator to the profile of an image, see
// [Profile.Set]; like [Book.Record] it begins one.
func (b *Book) SetRule(image Image, r Rule, files Listing, now time.Time) (p Profile, err error) {
	err = b.begin(image, files, now, func(old Profile) (Profile, error) {
		p = old
		return p, p.Set(r, now)
	})
	return p, err
}

// Put stores a profile from outside, after [Fit]. The rules that are here stay;
// those of p come in only where there is no profile yet.
func (b *Book) Put(p Profile) error {
	return b.edit(p.Image, func(old *Profile) (*Profile, error) {
		if old != nil {
			p.Rules = old.Rules
		}
		return &p, nil
	})
}

// PutNew is Put for what was found while starts may have been recorded: it does
// not take their place. The error is [errdefs.ErrAlreadyExists] then.
func (b *Book) PutNew(p Profile) error {
	return b.edit(p.Image, func(old *Profile) (*Profile, error) {
		if old != nil && len(old.Files) > 0 {
			return nil, fmt.Errorf("there is a profile of image %s by now: %w", p.Image, errdefs.ErrAlreadyExists)
		}
		if old != nil {
			p.Rules = old.Rules
		}
		return &p, nil
	})
}

// Remove deletes the profile of an image; [errdefs.ErrNotFound] without one.
func (b *Book) Remove(image digest.Digest) error {
	return b.Store.Update(image, func(old []byte) ([]byte, error) {
		if old == nil {
			return nil, fmt.Errorf("no profile of image %s: %w", image, errdefs.ErrNotFound)
		}
		return nil, nil
	})
}

// Latest is the profile of a repository that was updated last, but for that of
// one image; [errdefs.ErrNotFound] if there is none.
func (b *Book) Latest(repository string, but digest.Digest) (Profile, error) {
	var latest *Profile
	// Decoding all of a thousand would take seconds.
	names := []byte(`"` + repository + `"`)
	err := b.Store.Each(func(image digest.Digest, data []byte) error {
		if image == but || !bytes.Contains(data, names) {
			return nil
		}
		p, err := Decode(bytes.NewReader(data))
		if err != nil {
			return nil //nolint:nilerr // nothing can be inherited from it; who asks for it is told
		}
		if p.Repository == repository && len(p.Files) > 0 && (latest == nil || p.Updated.After(latest.Updated)) {
			latest = &p
		}
		return nil
	})
	if err == nil && latest == nil {
		err = fmt.Errorf("no profile of repository %q: %w", repository, errdefs.ErrNotFound)
	}
	if err != nil {
		return Profile{}, err
	}
	return *latest, nil
}

// begin edits the profile of an image, or a first one.
func (b *Book) begin(image Image, files Listing, now time.Time, change func(Profile) (Profile, error)) error {
	// Looked up before, since a store has one transaction at a time. That
	// another profile of the repository may come in between does no harm.
	first := New(image, now)
	if _, err := b.Get(image.Digest); errdefs.IsNotFound(err) && image.Repository != "" {
		switch latest, err := b.Latest(image.Repository, image.Digest); {
		case err == nil:
			first = Inherit(latest, image, files)
			first.Created = now.UTC()
		case !errdefs.IsNotFound(err):
			return err
		}
	} else if err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	return b.edit(image.Digest, func(old *Profile) (*Profile, error) {
		if old == nil {
			old = &first
		}
		p, err := change(*old)
		return &p, err
	})
}

func (b *Book) edit(image digest.Digest, change func(*Profile) (*Profile, error)) error {
	return b.Store.Update(image, func(data []byte) ([]byte, error) {
		var old *Profile
		if data != nil {
			p, err := Decode(bytes.NewReader(data))
			if err != nil {
				return nil, fmt.Errorf("stored profile of image %s: %w", image, err)
			}
			old = &p
		}
		p, err := change(old)
		if err != nil {
			return nil, err
		}
		var out bytes.Buffer
		if err := Encode(&out, *p); err != nil {
			return nil, err
		}
		return out.Bytes(), nil
	})
}
