// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package cri

import (
	"context"
	"testing"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// image is one of CRI's answer, as its types encode it.
func image(id string, tags, digests []string) []byte {
	b := protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), id)
	for _, t := range tags {
		b = protowire.AppendString(protowire.AppendTag(b, 2, protowire.BytesType), t)
	}
	for _, d := range digests {
		b = protowire.AppendString(protowire.AppendTag(b, 3, protowire.BytesType), d)
	}
	b = protowire.AppendVarint(protowire.AppendTag(b, 4, protowire.VarintType), 1234)                // size
	return protowire.AppendString(protowire.AppendTag(b, 6, protowire.BytesType), "somebody's name") // username
}

func answer(all ...[]byte) (b []byte) {
	for _, i := range all {
		b = protowire.AppendBytes(protowire.AppendTag(b, 1, protowire.BytesType), i)
	}
	return b
}

func TestForgotten(t *testing.T) {
	t.Parallel()
	known, err := names(answer(image("sha256:1", []string{"a.test/x:1", "a.test/x:2"}, []string{"a.test/x@sha256:9"}), image("sha256:2", nil, nil)))
	require.NoError(t, err)
	require.Len(t, known, 5)
	var missed []string
	for _, i := range forgotten([]images.Image{{Name: "a.test/x:1"}, {Name: "a.test/y:1"}, {Name: "sha256:1"}, {Name: "sha256:2"}, {Name: "sha256:3"}, {Name: "somebody's name"}}, known) {
		missed = append(missed, i.Name)
	}
	require.Equal(t, []string{"a.test/y:1", "sha256:3", "somebody's name"}, missed)
	known, err = names(nil)
	require.NoError(t, err)
	require.NotNil(t, known)
	_, err = names([]byte{0x0a, 0xff})
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
}

// answers is a connection to a CRI that answers one after the other.
type answers struct {
	grpc.ClientConnInterface
	all []any // error or []byte
}

func (a *answers) Invoke(_ context.Context, method string, _, reply any, _ ...grpc.CallOption) error {
	if method != listImages {
		return status.Error(codes.Unimplemented, method)
	}
	next := a.all[0]
	a.all = a.all[1:]
	switch next := next.(type) {
	case error:
		return next
	case []byte:
		return proto.Unmarshal(next, reply.(proto.Message))
	}
	return nil
}

func TestAwaitListed(t *testing.T) {
	t.Parallel()
	known, err := awaitListed(t.Context(), &answers{all: []any{
		status.Error(codes.Unavailable, "server is not initialized yet"), answer(image("sha256:1", nil, nil)),
	}})
	require.NoError(t, err)
	require.Equal(t, map[string]bool{"sha256:1": true}, known)
	known, err = awaitListed(t.Context(), &answers{all: []any{status.Error(codes.Unimplemented, "unknown service runtime.v1.ImageService")}})
	require.NoError(t, err)
	require.Nil(t, known, "there is no CRI")
	_, err = awaitListed(t.Context(), &answers{all: []any{status.Error(codes.PermissionDenied, "no")}})
	require.ErrorIs(t, err, errdefs.ErrPermissionDenied)
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = awaitListed(ended, &answers{all: []any{status.Error(codes.Unavailable, "dial")}})
	require.ErrorIs(t, err, context.Canceled)
}
