// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build integration

package integration

import (
	"archive/tar"
	"encoding/base64"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/integration/image"
	"github.com/nhybrid/nhybrid/integration/rig"
)

// Layers of a type that needs a stream processor, as encrypted ones do, between others that do not: containerd's applier
// writes them, whether in the daemon or in containerd, and what it has written stays.
func TestStreamProcessors(t *testing.T) {
	t.Parallel()
	const mediaType = "application/vnd.oci.image.layer.v1.tar+base64"
	const config = "[stream_processors.base64]\naccepts = ['" + mediaType + "']\nreturns = 'application/vnd.oci.image.layer.v1.tar'\npath = 'base64'\nargs = ['-d']\n"
	encoded := func(data []byte) raw {
		return raw{blob: []byte(base64.StdEncoding.EncodeToString(data)), plain: data, mediaType: mediaType}
	}
	below := ofFiles(t, image.Entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: "own/", Mode: 0o1750, Uid: 5, Gid: 6}}, plain("own/below", []byte("b")), plain("own/gone", []byte("g")))
	data := tarred(t, plain("own/deep/above", []byte("a")), plain("own/.wh.gone", nil), plain("own/deep/hidden", []byte("h")), plain("large", make([]byte, 100<<10)))
	more := tarred(t, plain("own/deep/more", []byte("m")), plain("own/deep/.wh.hidden", nil))
	foreign, second := encoded(data), encoded(more)
	top := ofFiles(t, plain("own/top", []byte("t")))

	for name, o := range map[string]rig.Options{
		"by the daemon":                      {DaemonConfig: config},
		"by containerd":                      {NoDiffer: true, ContainerdConfig: config},
		"by the daemon, of the diff service": {DiffService: true, DaemonConfig: config},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := soon(t)
			r := newRig(t, o)
			_, err := r.PushBusybox(ctx, "app:1", below, foreign, second, top)
			require.NoError(t, err)
			var local []string
			if o.DiffService {
				local = []string{"--local"}
			}
			require.NoError(t, r.Pull(ctx, "app:1", local...))
			show := []string{"sh", "-c", "stat -c '%u:%g %a %n' /own /own/deep; ls /own /own/deep; cat /own/deep/above /own/below /own/top; wc -c </large"}
			const want = "5:6 1750 /own\n0:0 755 /own/deep\n/own:\nbelow\ndeep\ntop\n\n/own/deep:\nabove\nmore\nabt102400"
			require.Equal(t, want, run(t, r, "app:1", show...))
			settled(t, r)
			require.NoError(t, r.Daemon.Restart(ctx))
			require.Equal(t, want, run(t, r, "app:1", show...))
			out, err := r.Nhybridctl(ctx, "ls")
			require.NoError(t, err)
			require.NotContains(t, out, "unusable")
			require.NotContains(t, out, "cannot be used")
			removeImage(t, r, "app:1")
			awaitEmpty(t, r)
		})
	}
	t.Run("without a program", func(t *testing.T) {
		t.Parallel()
		ctx := soon(t)
		r := newRig(t, rig.Options{})
		_, err := r.PushBusybox(ctx, "app:1", below, foreign, second, top)
		require.NoError(t, err)
		require.ErrorContains(t, r.Pull(ctx, "app:1"), `layers of type "`+mediaType+`" need a program: name it under [stream_processors]`)
		awaitEmpty(t, r)
	})
}
