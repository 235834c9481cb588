//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/integration/image"
	"github.com/nhybrid/nhybrid/integration/rig"
)

// attested is an index as BuildKit makes it: an image for another platform with a layer more, the image, and an attestation.
func attested(t *testing.T, img v1.Image) v1.ImageIndex {
	t.Helper()
	foreign, err := mutate.Append(img, mutate.Addendum{Layer: ofFiles(t, plain("foreign", []byte("x"))), MediaType: types.OCILayer})
	require.NoError(t, err)
	config, err := foreign.ConfigFile()
	require.NoError(t, err)
	config = config.DeepCopy()
	config.Architecture = "s390x"
	foreign, err = mutate.ConfigFile(foreign, config)
	require.NoError(t, err)
	statement := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	statement, err = mutate.Append(statement, mutate.Addendum{Layer: static.NewLayer([]byte("{}"), "application/vnd.in-toto+json")})
	require.NoError(t, err)
	host, err := img.ConfigFile()
	require.NoError(t, err)
	platform := func(os, architecture string) v1.Descriptor {
		return v1.Descriptor{Platform: &v1.Platform{OS: os, Architecture: architecture}}
	}
	return mutate.AppendManifests(mutate.IndexMediaType(empty.Index, types.OCIImageIndex),
		mutate.IndexAddendum{Add: foreign, Descriptor: platform("linux", "s390x")},
		mutate.IndexAddendum{Add: img, Descriptor: platform("linux", host.Architecture)},
		mutate.IndexAddendum{Add: statement, Descriptor: platform("unknown", "unknown")})
}

// Of an index the image is the manifest that is unpacked: neither an attestation (containerd issue 8243) nor that of another
// platform, whichever arrives last, and through an index of an index too.
func TestImageOfAnIndex(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{DaemonArgs: hot("--set", "hot.predict=off")})
	for repo, nest := range map[string]bool{"plain": false, "nested": true} {
		img, err := image.Busybox(ofFiles(t, plain("of", []byte(repo))))
		require.NoError(t, err)
		want, err := img.Digest()
		require.NoError(t, err)
		index := attested(t, img)
		if nest {
			index = mutate.AppendManifests(mutate.IndexMediaType(empty.Index, types.OCIImageIndex), mutate.IndexAddendum{Add: index})
		}
		to, err := name.ParseReference(r.Registry.Addr()+"/"+repo+":1", name.Insecure)
		require.NoError(t, err)
		require.NoError(t, remote.WriteIndex(to, index, remote.WithContext(ctx)))
		top, err := index.Digest()
		require.NoError(t, err)

		ref := r.Ref(repo + ":1")
		require.NoError(t, r.Pull(ctx, repo+":1", "--all-platforms"))
		run(t, r, repo+":1", "cat", "/of")
		for _, by := range []string{ref, top.String(), want.String()} {
			var answer struct {
				Digest, Image string
				Layers        []layer
			}
			ctl(t, r, &answer, "inspect", by)
			require.Equal(t, want.String(), answer.Digest, by)
			require.Equal(t, ref, answer.Image, by)
			require.Len(t, answer.Layers, 2, by)
			for _, l := range answer.Layers {
				require.NotEmpty(t, l.SnapshotID, by)
			}
			out, err := r.Nhybridctl(ctx, "why", by, "/of")
			require.NoError(t, err)
			require.Contains(t, out, "/of")
			p := awaitProfile(t, r, by, starts(1))
			require.Equal(t, want.String(), p.Profile.Image, by)
			require.Equal(t, r.Ref(repo), p.Profile.Repository, "with the port")
		}
		_, err = r.Nhybridctl(ctx, "profile", "push", "--plain-http", ref)
		require.NoError(t, err)
	}
}

// A container of another platform than the host's (by binfmt_misc, say) is committed on top of the image that it runs.
func TestCommitOfAnotherPlatform(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r, device := regionRig(t)
	img, err := image.Busybox()
	require.NoError(t, err)
	to, err := name.ParseReference(r.Registry.Addr()+"/both:1", name.Insecure)
	require.NoError(t, err)
	require.NoError(t, remote.WriteIndex(to, attested(t, img), remote.WithContext(ctx)))
	ref := r.Ref("both:1")
	require.NoError(t, r.Pull(ctx, "both:1"))
	require.NoError(t, r.Pull(ctx, "both:1", "--local", "--platform", "linux/s390x"))
	_, err = r.Ctr(ctx, "run", "-d", "--platform", "linux/s390x", "--cgroup", "/"+r.Namespace+"-web", "--device", device("1m"), ref, "web", "sleep", "1000")
	require.NoError(t, err)
	execute(t, r, "web", "sh", "-ec", "test -e /foreign; echo n >/new")
	_, err = r.Nhybridctl(ctx, "scm", "commit", "web", "committed:1")
	require.NoError(t, err)
	layers := layersOf(t, r, "committed:1")
	require.Len(t, layers, 4)
	require.Contains(t, layers[1], "foreign")
	require.Contains(t, layers[2], "new")
	endSleeper(t, r, "web")
}
