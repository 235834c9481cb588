// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/snapshotter/unpack"
)

// A layer is unpacked while its blob arrives, and nothing of it can be had before it is verified.
func TestUnpackedWhileItArrives(t *testing.T) {
	b := newBench(t)
	s := b.open(nil)
	blob, diffID := layerOf(t, file{"a", large("a", 300_000)}, file{"b", large("b", 300_000)})
	first := make(chan string, 10)
	sp := spec(blob, diffID, unpack.ToPack)
	sp.Place = func(f unpack.File) unpack.Placement { first <- f.Path; return unpack.ToPack }
	id, fresh, err := s.Begin(t.Context(), sp)
	require.NoError(t, err)
	require.True(t, fresh)
	w, err := b.blobs.Writer(t.Context(), content.WithRef("default/1/layer-"+sp.Blob.String()), content.WithDescriptor(desc(blob)))
	require.NoError(t, err)
	half := len(blob) * 3 / 4
	_, err = w.Write(blob[:half])
	require.NoError(t, err)
	require.Equal(t, "a", <-first, "the first file is there before the blob is")
	l, err := s.Layer(id)
	require.NoError(t, err)
	require.Equal(t, Unpacking, l.State)
	_, err = w.Write(blob[half:])
	require.NoError(t, err)
	require.NoError(t, w.Commit(t.Context(), sp.Size, sp.Blob))
	l, err = s.Await(t.Context(), id)
	require.NoError(t, err)
	require.Equal(t, diffID, l.DiffID)
}

// A download that is cut short, replaced or too long is read anew, and what becomes of it is right.
func TestDownloadThatBeginsAnew(t *testing.T) {
	for name, spoil := range map[string]func(t *testing.T, b *bench, w content.Writer, ref string){
		"truncated": func(t *testing.T, _ *bench, w content.Writer, _ string) { require.NoError(t, w.Truncate(0)) },
		"replaced": func(t *testing.T, b *bench, w content.Writer, ref string) {
			require.NoError(t, w.Close())
			require.NoError(t, b.blobs.Abort(t.Context(), ref))
		},
		"too long": func(t *testing.T, b *bench, w content.Writer, ref string) {
			_, err := w.Write(make([]byte, 1<<20))
			require.NoError(t, err)
			require.NoError(t, w.Close())
			require.NoError(t, b.blobs.Abort(t.Context(), ref))
		},
	} {
		for _, to := range []unpack.Placement{unpack.ToPack, unpack.ToNVM} {
			t.Run(fmt.Sprint(name, " ", to), func(t *testing.T) {
				b := newBench(t)
				s := b.open(nil)
				data := large("a", 300_000)
				blob, diffID := layerOf(t, file{"a", data}, file{"b", large("b", 300_000)})
				sp := spec(blob, diffID, to)
				first := make(chan struct{}, 100)
				sp.Place = func(unpack.File) unpack.Placement { first <- struct{}{}; return to }
				id, _, err := s.Begin(t.Context(), sp)
				require.NoError(t, err)
				ref := "default/1/layer-" + sp.Blob.String()
				w, err := b.blobs.Writer(t.Context(), content.WithRef(ref), content.WithDescriptor(desc(blob)))
				require.NoError(t, err)
				_, err = w.Write(blob[:len(blob)*3/4])
				require.NoError(t, err)
				<-first
				spoil(t, b, w, ref)
				require.NoError(t, w.Close())
				w, err = b.blobs.Writer(t.Context(), content.WithRef(ref), content.WithDescriptor(desc(blob)))
				require.NoError(t, err)
				_, err = w.Write(blob)
				require.NoError(t, err)
				require.NoError(t, w.Commit(t.Context(), sp.Size, sp.Blob))
				l, err := s.Await(t.Context(), id)
				require.NoError(t, err)
				require.Equal(t, diffID, l.DiffID)
				snapshot := b.commit("top", "", id)
				s.Release(id)
				view, err := s.View(t.Context(), snapshot, "top")
				require.NoError(t, err)
				b.read(view, func(root string) {
					got, err := os.ReadFile(filepath.Join(root, "a"))
					require.NoError(t, err)
					require.True(t, bytes.Equal(data, got))
				})
				b.remove("top")
				b.gone(id)
			})
		}
	}
}

func TestCancelledPullLeavesNothing(t *testing.T) {
	b := newBench(t)
	s := b.open(nil)
	blob, diffID := layerOf(t, file{"a", large("a", 300_000)})
	id, _, err := s.Begin(t.Context(), spec(blob, diffID, unpack.ToNVM))
	require.NoError(t, err)
	s.Release(id)
	b.gone(id)
	entries, err := os.ReadDir(s.path("p"))
	require.NoError(t, err)
	require.Empty(t, entries)
}

func TestWrongBlobIsRefusedAndTheNextTrySucceeds(t *testing.T) {
	b := newBench(t)
	s := b.open(nil)
	blob, diffID := layerOf(t, file{"a", large("a", 9000)})
	b.blobs.write(t, blob)
	wrong := spec(blob, desc([]byte("x")).Digest, unpack.ToNVM)
	id, _, err := s.Begin(t.Context(), wrong)
	require.NoError(t, err)
	_, err = s.Await(t.Context(), id)
	require.ErrorContains(t, err, "diff ID")
	s.Release(id)
	b.gone(id)
	b.begin(spec(blob, diffID, unpack.ToNVM))
}

// An unpacking fails before anybody waits for it: nothing is going to be tried again, so that the failure is told.
func TestFailureBeforeTheWaitIsTold(t *testing.T) {
	b := newBench(t)
	s := b.open(nil)
	blob, _ := layerOf(t, file{"a", large("a", 9000)})
	b.blobs.write(t, blob)
	id, _, err := s.Begin(t.Context(), spec(blob, desc([]byte("x")).Digest, unpack.ToNVM))
	require.NoError(t, err)
	b.eventually("it has failed", func() bool { return s.Failure(id) != nil })
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	_, err = s.Await(ctx, id)
	require.ErrorContains(t, err, "diff ID")
	s.Release(id)
	b.gone(id)
}

func TestByContentAPI(t *testing.T) {
	b := newBench(t)
	b.blobs.hidden = true
	b.open(nil)
	blob, diffID := layerOf(t, file{"a", large("a", 9000)})
	b.blobs.write(t, blob)
	b.begin(spec(blob, diffID, unpack.ToPack))
}

// containerd's content root may be a path that means something else here.
func TestContentRootOfAnotherNamespace(t *testing.T) {
	for _, first := range []bool{true, false} {
		b := newBench(t)
		b.blobs.seenAs = t.TempDir()
		s := b.open(nil)
		blob, diffID := layerOf(t, file{"a", large("a", 9000)})
		if first {
			b.blobs.write(t, blob)
		}
		id, _, err := s.Begin(t.Context(), spec(blob, diffID, unpack.ToPack))
		require.NoError(t, err)
		if !first {
			b.blobs.write(t, blob)
			for range 3 { // whoever subscribes after the first is told by the next
				b.blobs.tell()
			}
		}
		b.eventually("it is read by the API", func() bool {
			b.blobs.tell()
			l, err := s.Layer(id)
			return err == nil && l.State.Valid()
		})
		s.Release(id)
	}
}
