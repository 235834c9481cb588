// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"fmt"
	"path/filepath"
	"strconv"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/placement/tier"
	"github.com/nhybrid/nhybrid/snapshotter/host"
)

// quotas limits the size of writable directories by project quotas, where the
// filesystem of their tier enforces them.
type quotas struct {
	tiers    *tier.Store
	enforced [2]bool // by tier
}

// newQuotas finds out by trial which tiers enforce quotas.
func newQuotas(ctx context.Context, t *tier.Store) *quotas {
	q := &quotas{tiers: t}
	for _, on := range tier.Tiers {
		err := host.TryProjectQuota(t.Root(on))
		q.enforced[on] = err == nil
		if err != nil && !errdefs.IsNotImplemented(err) {
			log.G(ctx).WithError(err).Warnf("cannot tell whether %s enforces project quotas", on)
		}
	}
	return q
}

// projectBase keeps our project ids away from those that people give out by
// hand, which start low.
const projectBase = 1 << 24

func project(id string) (uint32, error) {
	n, err := strconv.ParseUint(id, 10, 32)
	if err != nil || n >= 1<<32-projectBase {
		return 0, fmt.Errorf("snapshot id %q has no project id: %w", id, errdefs.ErrOutOfRange)
	}
	return projectBase + uint32(n), nil
}

// Limit bounds what may stand in a staging directory. A filesystem that
// enforces no quotas is no error: the hint is then ignored, which the log says.
func (q *quotas) Limit(id string, t placement.Tier, bytes int64) error {
	if !q.enforced[t] {
		log.L.WithField("id", id).Warnf("label containerd.io/snapshot/max-size is ignored: the filesystem of the %s root enforces no project quotas; mount ext4 or xfs with prjquota to have them", t)
		return nil
	}
	p, err := project(id)
	if err != nil {
		return err
	}
	// overlayfs moves what it copies up from work to fs, and a move between
	// projects is refused: both belong to one.
	for _, sub := range []string{"fs", "work"} {
		if err := host.SetProjectQuota(filepath.Join(q.tiers.Staging(t, id), sub), p, bytes); err != nil {
			return fmt.Errorf("limit snapshot id %s to %d bytes: %w", id, bytes, err)
		}
	}
	return nil
}

// Forget takes a limit away. Where there was none it does nothing.
func (q *quotas) Forget(id string) {
	p, err := project(id)
	if err != nil {
		return
	}
	for _, t := range tier.Tiers {
		if !q.enforced[t] {
			continue
		}
		if err := host.ForgetProjectQuota(q.tiers.Root(t), p); err != nil {
			log.L.WithError(err).WithField("id", id).Debug("cannot take a quota away")
		}
	}
}
