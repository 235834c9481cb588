//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"archive/tar"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"testing"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/integration/image"
	"github.com/nhybrid/nhybrid/integration/rig"
)

// shown is what nhybridctl profile show --json tells.
type shown struct {
	Info struct {
		Known         string
		Starts, Rules int64
		Incomplete    int64
		HotBytes      int64 `json:"hot_bytes"`
	}
	Profile struct {
		Image      string
		Repository string
		Inherited  string
		Files      []struct {
			Path, Kind string
			Starts     int64
			Touched    int64
			Ranges     []struct{ Offset, Length int64 }
		}
	}
}

func profileOf(t *testing.T, r *rig.Rig, name string) shown {
	t.Helper()
	var s shown
	ctl(t, r, &s, "profile", "show", name)
	return s
}

// paths are the files of a profile, sorted.
func (s *shown) paths() []string {
	all := []string{}
	for _, f := range s.Profile.Files {
		all = append(all, f.Path)
	}
	slices.Sort(all)
	return all
}

// awaitProfile waits until a profile is as it shall be.
func awaitProfile(t *testing.T, r *rig.Rig, name string, good func(shown) error) (s shown) {
	t.Helper()
	await(t, func(ctx context.Context) error {
		out, err := r.Nhybridctl(ctx, "profile", "show", "--json", name)
		if err != nil {
			return err
		}
		s = shown{}
		if err := json.Unmarshal([]byte(out), &s); err != nil {
			return err
		}
		return good(s)
	})
	return s
}

func starts(n int64) func(shown) error {
	return func(s shown) error {
		if s.Info.Known != "traced" || s.Info.Starts != n {
			return fmt.Errorf("known %q, %d starts, not %d", s.Info.Known, s.Info.Starts, n)
		}
		return nil
	}
}

// plain is a file of an image.
func plain(name string, data []byte) image.Entry {
	return image.Entry{Header: tar.Header{Name: name, Mode: 0o644}, Data: data}
}

// ofFiles makes a layer.
func ofFiles(t *testing.T, entries ...image.Entry) v1.Layer {
	t.Helper()
	l, err := image.Layer(entries)
	require.NoError(t, err)
	return l
}

// hot adds the settings under which starts end soon and files move at once to others.
func hot(args ...string) []string { return append(slices.Clone(quick), args...) }

// imageLayers are the digests of an image's blobs.
func imageLayers(ctx context.Context, img client.Image) (digests []string, err error) {
	m, err := images.Manifest(ctx, img.ContentStore(), img.Target(), img.Platform())
	for _, l := range m.Layers {
		digests = append(digests, l.Digest.String())
	}
	return digests, err
}
