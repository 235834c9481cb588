// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/snapshotter/unpack"
)

// A registry that sends nothing, or nothing more, holds up its own pull and no other.
func TestDownloadsThatStandStillHoldUpNobody(t *testing.T) {
	for name, hidden := range map[string]bool{"files": false, "API": true} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.blobs.hidden = hidden
			s := b.open(func(c *Config) { c.Unpacks = 1 })
			slow, _ := layerOf(t, file{"slow", large("slow", 900_000)})
			late, _ := layerOf(t, file{"late", large("late", 300_000)})
			other, _ := layerOf(t, file{"other", large("other", 300_000)})
			w, err := b.blobs.Writer(t.Context(), content.WithRef("default/1/layer-"+desc(slow).Digest.String()), content.WithDescriptor(desc(slow)))
			require.NoError(t, err)
			_, err = w.Write(slow[:len(slow)/2])
			require.NoError(t, err)
			began := make(chan struct{}, 1)
			half := spec(slow, "", unpack.ToPack)
			half.Gate = func(context.Context) error { began <- struct{}{}; return nil }
			var waiting []LayerID
			for _, sp := range []Spec{half, spec(late, "", unpack.ToPack)} {
				id, _, err := s.Begin(t.Context(), sp)
				require.NoError(t, err)
				waiting = append(waiting, id)
			}
			<-began
			b.blobs.write(t, other)
			id, _, err := s.Begin(t.Context(), spec(other, "", unpack.ToPack))
			require.NoError(t, err)
			b.await(id)

			_, err = w.Write(slow[len(slow)/2:])
			require.NoError(t, err)
			require.NoError(t, w.Commit(t.Context(), int64(len(slow)), desc(slow).Digest))
			b.blobs.write(t, late)
			b.blobs.tell()
			for _, id := range waiting {
				b.await(id)
			}
			b.eventually("places are free", func() bool { return len(s.places) == 0 })
		})
	}
}
