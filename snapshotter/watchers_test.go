// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/control"
)

// The decision that watchers are shown is the one that is recorded. A policy that
// places files one by one knows it when the last file is placed.
func TestWatchersSeeTheDecisionThatIsRecorded(t *testing.T) {
	for _, policy := range []string{"drain", "boundary=1"} {
		t.Run(policy, func(t *testing.T) {
			d := newDownloads(t, []entry{{name: "a", data: "a"}}, []entry{{name: "b", data: "b"}})
			s := start(t, t.TempDir(), d, func(c *Config) {
				var err error
				c.Policy, err = placement.ParsePolicy(policy)
				require.NoError(t, err)
			})
			events, cancel := s.pulls.watch.subscribe(nil)
			defer cancel()
			d.arrive(t, 0, 1)
			unpackImage(t, s, d)
			shown := map[int32]*control.Decision{}
			for e := range events {
				if e.GetType() == "decision" {
					l := e.GetLayers()[0]
					require.Nil(t, shown[l.GetIndex()], "a layer has one decision")
					shown[l.GetIndex()] = l.GetDecision()
					require.Equal(t, l.GetDecision().GetTier(), l.GetTier())
				}
				if e.GetType() == "done" {
					break
				}
			}
			require.Len(t, shown, 2)
			for i, l := range d.img.Layers {
				rec, ok := s.store.Find(l.Digest)
				require.True(t, ok)
				var kept control.Decision
				require.NoError(t, protojson.Unmarshal(rec.Decision, &kept))
				require.Equal(t, kept.GetTier(), shown[int32(i)].GetTier())
				require.Equal(t, kept.GetReason(), shown[int32(i)].GetReason())
			}
		})
	}
}
