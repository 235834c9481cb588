// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"bytes"
	"errors"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/nhybrid/nhybrid/hif/profile"
)

// Of images that are gone the latest profiles of each repository are kept, since
// the next version inherits from them, and so many in all.
const (
	keepOfRepository = 3
	keepInAll        = 1000
)

// remembered is what decides whether a profile is kept.
type remembered struct {
	image      digest.Digest
	repository string
	updated    time.Time
}

// forgettable picks the profiles of images that are gone which nobody will miss.
func forgettable(gone []remembered) (drop []digest.Digest) {
	slices.SortFunc(gone, func(a, b remembered) int { return b.updated.Compare(a.updated) })
	of := map[string]int{}
	kept := 0
	for _, r := range gone {
		of[r.repository]++
		if of[r.repository] > keepOfRepository || kept >= keepInAll {
			drop = append(drop, r.image)
			continue
		}
		kept++
	}
	return drop
}

// forget drops profiles of images that are not among those here.
func (m *Manager) forget(here map[digest.Digest]bool) error {
	var drop []digest.Digest
	err := m.predictions.Store.Each(func(image digest.Digest, _ []byte) error {
		if !here[image] {
			drop = append(drop, image)
		}
		return nil
	})
	for _, image := range drop {
		m.forgetPrediction(image)
	}
	var gone []remembered
	err = errors.Join(err, m.book.Store.Each(func(image digest.Digest, data []byte) error {
		if here[image] {
			return nil
		}
		p, err := profile.Decode(bytes.NewReader(data))
		if err != nil {
			return nil //nolint:nilerr // shown to who asks for it
		}
		gone = append(gone, remembered{image, p.Repository, p.Updated})
		return nil
	}))
	for _, image := range forgettable(gone) {
		if e := m.book.Remove(image); e != nil && !errdefs.IsNotFound(e) {
			err = errors.Join(err, e)
		}
		err = errors.Join(err, m.setOrigin(image, Nothing))
	}
	return err
}
