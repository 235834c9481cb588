// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"errors"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/sirupsen/logrus"
	"github.com/sirupsen/logrus/hooks/test"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/snapshotter/unpack"
)

// What containerd has collected before its turn came is no error, and other things are.
func TestCollectedIsNoError(t *testing.T) {
	b := newBench(t)
	s := b.open(nil)
	logged := test.NewLocal(log.L.Logger)
	defer log.L.Logger.ReplaceHooks(logrus.LevelHooks{})
	blob, diffID := layerOf(t, file{"a", large("a", 9000)})
	b.blobs.write(t, blob)
	l := b.begin(spec(blob, diffID, unpack.ToPack))
	id := b.commit("top", "", l.ID)
	s.Release(l.ID)
	b.remove("top")
	b.gone(l.ID)
	_, err := s.View(t.Context(), id, "top")
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	s.ViewLater(id, "top")
	errs := func() (all []string) {
		for _, e := range logged.AllEntries() {
			if e.Level <= logrus.WarnLevel {
				all = append(all, e.Message)
			}
		}
		return all
	}
	b.eventually("the view was tried", func() bool { return s.jobs.length() == 0 })
	require.Empty(t, errs())
	require.Error(t, s.jobs.do(t.Context(), "bad", func(context.Context) error { return errors.New("input/output error") }))
	require.Equal(t, []string{"background work failed"}, errs())
}
