//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/integration/image"
	"github.com/nhybrid/nhybrid/integration/rig"
)

// damageMetadata inverts a byte in the middle of the metadata of a pack.
func damageMetadata(t *testing.T, pack string) {
	t.Helper()
	f, err := os.OpenFile(pack, os.O_RDWR, 0)
	require.NoError(t, err)
	defer f.Close()
	info, err := f.Stat()
	require.NoError(t, err)
	var at [16]byte // offsets of the metadata and of the footer (docs/store.md)
	_, err = f.ReadAt(at[:], info.Size()-64)
	require.NoError(t, err)
	middle := int64(binary.LittleEndian.Uint64(at[:])+binary.LittleEndian.Uint64(at[8:])) / 2
	var b [1]byte
	_, err = f.ReadAt(b[:], middle)
	require.NoError(t, err)
	b[0] = ^b[0]
	_, err = f.WriteAt(b[:], middle)
	require.NoError(t, err)
}

// sharing pushes two images with a common base, pulls both, and returns the base: its number and its blob.
func sharing(t *testing.T, r *rig.Rig) (number, blob string) {
	t.Helper()
	ctx := soon(t)
	base, err := image.Busybox(ofFiles(t, plain("base", []byte("the same"))))
	require.NoError(t, err)
	for _, name := range []string{"a:1", "b:1"} {
		var img v1.Image
		img, err = mutate.AppendLayers(base, ofFiles(t, plain("own", []byte(name))))
		require.NoError(t, err)
		require.NoError(t, r.Push(ctx, name, img))
		require.NoError(t, r.Pull(ctx, name))
	}
	settled(t, r)
	number = inspect(t, r, "a:1")[1].Layer
	require.Equal(t, number, inspect(t, r, "b:1")[1].Layer)
	return number, blobs(t, base)[1]
}

// A layer is damaged whose blob containerd has thrown away, and others use the layer, so that neither pulling the image again
// nor removing it brings the blob back. While the registry does not answer, all that is asked names the layer, the cause and
// the command that cures; once it does, the layer is there again without anybody's doing.
func TestLostLayerHeals(t *testing.T) {
	t.Parallel()
	r := newRig(t, rig.Options{DaemonArgs: []string{"--set", "placement.policy=hdd"}})
	number, blob := sharing(t, r)
	forgetBlobs(t, r, blob)
	r.Link.SetDown(true)
	require.NoError(t, r.Daemon.Stop())
	reboot(t, r)
	damageMetadata(t, filepath.Join(r.HDD, "p", number+".erofs"))
	views, err := filepath.Glob(filepath.Join(r.NVM, "v", "*.erofs"))
	require.NoError(t, err)
	for _, v := range views { // else nobody has to read the metadata
		require.NoError(t, os.Remove(v))
	}
	require.NoError(t, r.Daemon.Start(soon(t)))
	await(t, reachable(r))

	command := "fetch it by hand: ctr -n " + r.Namespace + " content fetch " + r.Ref("") // a:1, or b:1
	broken := func(text string) {
		t.Helper()
		for _, words := range []string{"cannot be used", "metadata of layer " + number, command} {
			require.Contains(t, text, words)
		}
		require.Equal(t, 1, strings.Count(text, "fetch it by hand"), text)
		require.NotContains(t, text, "data loss")
	}
	_, err = r.RunContainer(soon(t), "a:1", "broken", "true")
	require.ErrorContains(t, err, "layer "+number+" cannot be used")
	require.ErrorContains(t, err, command)
	why, err := r.Nhybridctl(soon(t), "why", r.Ref("a:1"), "1")
	require.NoError(t, err)
	broken(why)
	require.Contains(t, why, r.Ref("a:1"))
	_, err = r.Nhybridctl(soon(t), "why", r.Ref("a:1"), "/base")
	require.ErrorContains(t, err, "layer "+number+", index 1 of the image, cannot be used")
	require.ErrorContains(t, err, command)
	inspected, err := r.Nhybridctl(soon(t), "inspect", r.Ref("a:1"))
	require.NoError(t, err)
	require.Contains(t, inspected, command)
	status, err := r.Nhybridctl(soon(t), "status")
	require.NoError(t, err)
	broken(status)
	require.Contains(t, status, "layer "+number+" of ")
	found := examine(t, r, filepath.Join(r.Dir, "containerd.toml"))
	require.True(t, slices.ContainsFunc(found, func(f finding) bool {
		return f.Level == "fail" && f.Area == "images" && strings.Contains(f.Text, "layer "+number+" of ") && strings.Contains(f.Cure, command)
	}), "%+v", troubles(found))

	r.Link.SetDown(false)
	await(t, func(ctx context.Context) error {
		if l := inspect(t, r, "a:1")[1]; l.Error != "" {
			return fmt.Errorf("layer %s: %s", l.Layer, l.Error)
		}
		return nil
	})
	require.True(t, inLog(r, "it is fetched again from the registry", r.Ref(""), blob))
	for _, name := range []string{"a:1", "b:1"} {
		require.Equal(t, "the same"+name, run(t, r, name, "cat", "/base", "/own"))
	}
	status, err = r.Nhybridctl(soon(t), "status")
	require.NoError(t, err)
	require.NotContains(t, status, "cannot be used")
	for _, f := range examine(t, r, filepath.Join(r.Dir, "containerd.toml")) {
		require.False(t, f.Area == "images" && f.Level == "fail", f.Text)
	}
	// It was not put where containerd has it collected.
	out, err := r.Ctr(soon(t), "content", "ls", "-q")
	require.NoError(t, err)
	require.NotContains(t, out, blob)
}
