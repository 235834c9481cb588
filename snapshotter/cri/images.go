// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package cri has containerd's CRI look again at images that it has forgotten.
//
// When containerd starts, CRI asks the snapshotter of each image whether it is unpacked, once. Where that fails, since the daemon is away, CRI does not know the
// image until containerd is started again (CheckImages in internal/cri/server/images/check.go of containerd): the kubelet pulls it anew, does not start pods that
// may not pull, and neither collects nor evicts it. But CRI follows the events of images, and one of an image that is there makes it known.
package cri

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/containerd/platforms"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/types/known/emptypb"
)

const (
	// namespace is that of containerd in which CRI keeps all images.
	namespace = "k8s.io"
	// managed is the label by which CRI marks its images.
	managed = "io.cri-containerd.image"
	// listImages is a method of CRI. Of its answer only names are needed, so the message is taken apart here rather than by the module of its types.
	listImages = "/runtime.v1.ImageService/ListImages"
	// retry is how often containerd is asked whether its CRI has begun.
	retry = 500 * time.Millisecond
)

// Remind makes CRI of the containerd at address know the images that it has forgotten, as soon as it answers. It returns then, or when ctx ends.
func Remind(ctx context.Context, address string) {
	if err := remind(ctx, address); err != nil && ctx.Err() == nil {
		log.G(ctx).WithError(err).Warn("it is not known whether CRI has forgotten images; where crictl does not list what ctr -n k8s.io images does, restart containerd")
	}
}

func remind(ctx context.Context, address string) error {
	c, err := client.New(address)
	if err != nil {
		return fmt.Errorf("connect to containerd at %q: %w", address, err)
	}
	defer c.Close()
	ctx = namespaces.WithNamespace(ctx, namespace)
	conn, ok := c.Conn().(grpc.ClientConnInterface)
	if !ok {
		return fmt.Errorf("containerd's client has no connection of gRPC: %w", errdefs.ErrNotImplemented)
	}
	known, err := awaitListed(ctx, conn)
	if err != nil || known == nil {
		return err
	}
	all, err := c.ImageService().List(ctx)
	if err != nil {
		return fmt.Errorf("list images of containerd: %w", err)
	}
	var reminded int
	for _, i := range forgotten(all, known) {
		// What is not whole CRI does not take, and rightly.
		if whole, _, _, _, err := images.Check(ctx, c.ContentStore(), i.Target, platforms.Default()); err != nil || !whole {
			continue
		}
		if err := touch(ctx, c.ImageService(), i); err != nil && !errdefs.IsNotFound(err) { // removed since
			return err
		}
		reminded++
	}
	if reminded > 0 {
		log.G(ctx).WithField("images", reminded).Info("CRI had forgotten images, since containerd was started while the daemon was away; it was reminded of them")
	}
	return nil
}

// touch has containerd tell that an image was changed, and changes nothing: the label is set to what it is.
func touch(ctx context.Context, store images.Store, i images.Image) error {
	_, err := store.Update(ctx, images.Image{Name: i.Name, Labels: map[string]string{managed: i.Labels[managed]}}, "labels."+managed)
	if err != nil {
		return fmt.Errorf("remind CRI of image %q: %w", i.Name, err)
	}
	return nil
}

// forgotten are the images that CRI does not list.
func forgotten(all []images.Image, known map[string]bool) (missed []images.Image) {
	for _, i := range all {
		if !known[i.Name] {
			missed = append(missed, i)
		}
	}
	return missed
}

// awaitListed are the names of all images that CRI knows, once it has begun; nil where there is none.
func awaitListed(ctx context.Context, conn grpc.ClientConnInterface) (map[string]bool, error) {
	for {
		known, err := listed(ctx, conn)
		switch {
		case err == nil:
			return known, nil
		case errdefs.IsNotImplemented(err):
			return nil, nil
		case !errdefs.IsUnavailable(err):
			return nil, fmt.Errorf("list images of CRI: %w", err)
		}
		// There is no containerd, or its CRI has not begun ("server is not initialized yet") and may just now find no daemon.
		select {
		case <-time.After(retry):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func listed(ctx context.Context, conn grpc.ClientConnInterface) (map[string]bool, error) {
	var answer emptypb.Empty // which keeps all fields as unknown ones
	if err := conn.Invoke(ctx, listImages, &emptypb.Empty{}, &answer); err != nil {
		return nil, errgrpc.ToNative(err)
	}
	return names(answer.ProtoReflect().GetUnknown())
}

// names takes the ids, tags and digests of images out of a ListImagesResponse { repeated Image images = 1 },
// Image { string id = 1; repeated string repo_tags = 2, repo_digests = 3; … }.
func names(b []byte) (map[string]bool, error) {
	all := map[string]bool{}
	err := fields(b, func(n protowire.Number, image []byte) error {
		if n != 1 {
			return nil
		}
		return fields(image, func(n protowire.Number, name []byte) error {
			if n >= 1 && n <= 3 {
				all[string(name)] = true
			}
			return nil
		})
	})
	return all, err
}

// fields calls f with the fields of a message that are bytes.
func fields(b []byte, f func(protowire.Number, []byte) error) error {
	for len(b) > 0 {
		n, kind, size := protowire.ConsumeTag(b)
		if size < 0 {
			return errors.Join(protowire.ParseError(size), errdefs.ErrInvalidArgument)
		}
		b = b[size:]
		if kind == protowire.BytesType {
			v, size := protowire.ConsumeBytes(b)
			if size < 0 {
				return errors.Join(protowire.ParseError(size), errdefs.ErrInvalidArgument)
			}
			if err := f(n, v); err != nil {
				return err
			}
			b = b[size:]
			continue
		}
		if size = protowire.ConsumeFieldValue(n, kind, b); size < 0 {
			return errors.Join(protowire.ParseError(size), errdefs.ErrInvalidArgument)
		}
		b = b[size:]
	}
	return nil
}
