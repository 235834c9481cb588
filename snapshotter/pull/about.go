// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pull

import (
	"context"

	"github.com/containerd/containerd/v2/plugins"
)

// Address is the socket of the containerd that is watched.
func (w *Watcher) Address() string { return w.address }

// Version asks containerd for its version. The error is errdefs.ErrUnavailable while it is absent.
func (w *Watcher) Version(ctx context.Context) (string, error) {
	c, inner, cancel, err := w.begin(ctx, "default")
	if err != nil {
		return "", err
	}
	defer cancel()
	v, err := c.Version(inner)
	if err != nil {
		return "", w.classify(ctx, "ask containerd for its version", err)
	}
	return v.Version, nil
}

// ContentRoot is the directory in which containerd keeps its blobs, "" while it
// has not told. It is asked until it has answered.
func (w *Watcher) ContentRoot(ctx context.Context) string {
	w.mu.Lock()
	root := w.contentRoot
	w.mu.Unlock()
	if root != "" {
		return root
	}
	c, ctx, cancel, err := w.begin(ctx, "default")
	if err != nil {
		return ""
	}
	defer cancel()
	r, err := c.IntrospectionService().Plugins(ctx, "type=="+plugins.ContentPlugin.String())
	if err != nil {
		return ""
	}
	for _, p := range r.Plugins {
		if dir := p.Exports["root"]; dir != "" {
			w.mu.Lock()
			w.contentRoot = dir
			w.mu.Unlock()
			return dir
		}
	}
	return ""
}
