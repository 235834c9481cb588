// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pull

import "context"

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
