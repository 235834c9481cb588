// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build integration

package image

import (
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"github.com/stretchr/testify/require"
)

// TestBuildDebianImage uses the common cache: the base layer takes half a minute to make.
func TestBuildDebianImage(t *testing.T) {
	b, err := NewBuilder("")
	require.NoError(t, err)
	b.Log = t.Logf
	spec := Spec{
		Name: "test",
		Steps: []Step{
			{Base: []string{}},
			{Packages: []string{"file"}},
			{Run: "rm -r /usr/share/doc/file; file --version >/var/version; echo nhybrid >/etc/hostname"},
			{Files: []Entry{file("etc/motd", 0o644, []byte("hello\n"))}, History: "COPY motd"},
			{Run: "grep hello /etc/motd && echo seen >/var/seen"},
			{Synthetic: &Synthetic{"/opt/data", 10_000, 20_000}},
		},
		Config: v1.Config{Cmd: []string{"/usr/bin/file", "/bin/sh"}},
	}
	img, err := b.Build(t.Context(), spec)
	require.NoError(t, err)
	require.NoError(t, validate.Image(img))
	layers, err := img.Layers()
	require.NoError(t, err)
	require.Len(t, layers, 6)

	base := contents(t, layers[0])
	require.Contains(t, base, "usr/bin/apt")
	for name := range base {
		require.False(t, strings.HasPrefix(name, "etc/apt/sources.list.d/") && !strings.HasSuffix(name, "/"), name)
	}
	require.NotContains(t, base, "etc/apt/sources.list")
	require.NotContains(t, base, "etc/apt/apt.conf.d/99mmdebstrap")

	packages := contents(t, layers[1])
	require.Contains(t, packages, "usr/bin/file")
	for name := range packages {
		require.False(t, strings.HasSuffix(name, ".deb") || strings.HasPrefix(name, "var/lib/apt/lists/") || strings.HasPrefix(name, "proc/"), name)
		require.NotContains(t, name, ".wh..wh..opq", "nothing was replaced as a whole")
	}
	command := contents(t, layers[2])
	require.Contains(t, command, "usr/share/doc/.wh.file")
	require.True(t, strings.HasPrefix(string(command["var/version"].Data), "file-5"))
	require.Equal(t, "seen\n", string(contents(t, layers[4])["var/seen"].Data))

	config, err := img.ConfigFile()
	require.NoError(t, err)
	require.Equal(t, "COPY motd", config.History[3].CreatedBy)

	// Once more, from the cache alone.
	b.Log = func(format string, args ...any) { t.Errorf("made again: "+format, args...) }
	again, err := b.Build(t.Context(), spec)
	require.NoError(t, err)
	first, err := img.Digest()
	require.NoError(t, err)
	second, err := again.Digest()
	require.NoError(t, err)
	require.Equal(t, first, second)

	b.Log = nil
	spec.Steps[2].Run = "echo broken >&2; exit 3"
	_, err = b.Build(t.Context(), spec)
	require.ErrorContains(t, err, "step 2")
	require.ErrorContains(t, err, "broken")
}

func TestExtractNeedsNoBase(t *testing.T) {
	b, err := NewBuilder(t.TempDir())
	require.NoError(t, err)
	img, err := b.Build(t.Context(), Spec{Name: "busybox", Steps: []Step{{Extract: []string{"busybox-static"}}}})
	require.NoError(t, err)
	layers, err := img.Layers()
	require.NoError(t, err)
	require.Contains(t, contents(t, layers[0]), "bin/busybox")
}
