// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/opencontainers/image-spec/identity"

	"github.com/nhybrid/nhybrid/integration/bench/result"
	"github.com/nhybrid/nhybrid/integration/rig"
)

// preparation is how long a container's snapshot takes, call by call, in milliseconds.
type preparation struct {
	Prepare []float64 `json:"prepare_ms"`
	Mounts  []float64 `json:"mounts_ms"`
	Remove  []float64 `json:"remove_ms"`
}

// warmUp are repetitions that are not counted.
const warmUp = 10

// prepare measures containers' snapshots of a warm image with both snapshotters in turn, as a client of containerd. So
// that the difference does not drown in containerd's own fsyncs, its metadata stand on NVM here, as do the snapshots of
// overlayfs and the writable directories of nhybrid. nhybrid's HDD is one.
func (b *bench) prepare(ctx context.Context, imageOf string) (_ map[string]*preparation, err error) {
	s, err := newStand(ctx, filepath.Join(b.dir, "p"), b.sizes)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	v, _ := variantByName(allNVM)
	o := b.rigOptions(s, v, 0)
	o.ContainerdRoot = filepath.Join(s.nvm.Mountpoint(), "containerd")
	o.ContainerdConfig = overlayConfig(filepath.Join(s.nvm.Mountpoint(), "overlayfs"))
	g, err := rig.Start(ctx, o)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, g.Close()) }()
	if err := g.Push(ctx, imageName, b.images[imageOf]); err != nil {
		return nil, err
	}
	names := []string{"overlayfs", "nhybrid"}
	for _, name := range names {
		if err := g.Pull(ctx, imageName, "--snapshotter", name); err != nil {
			return nil, err
		}
	}
	w, err := newWatcher(g)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	if err := w.await(ctx, settled); err != nil {
		return nil, err
	}
	if err := s.arm(); err != nil {
		return nil, err
	}

	c, err := g.Client()
	if err != nil {
		return nil, err
	}
	// Without a lease the garbage collector may take a snapshot between two calls.
	ctx, release, err := c.WithLease(g.Context(ctx))
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, release(context.WithoutCancel(ctx))) }()
	top, err := topOf(ctx, c, g.Ref(imageName))
	if err != nil {
		return nil, err
	}
	var all map[string]*preparation
	for i := range warmUp + b.options.repetitions {
		if i == 0 || i == warmUp {
			all = map[string]*preparation{names[0]: {}, names[1]: {}}
		}
		for j := range names {
			name := names[(i+j)%len(names)] // neither is always the first
			if err := all[name].once(ctx, c.SnapshotService(name), fmt.Sprintf("bench-%d", i), top); err != nil {
				return nil, fmt.Errorf("prepare with %s: %w", name, err)
			}
		}
	}
	return all, nil
}

func topOf(ctx context.Context, c *client.Client, ref string) (string, error) {
	img, err := c.GetImage(ctx, ref)
	if err != nil {
		return "", err
	}
	diffs, err := img.RootFS(ctx)
	if err != nil {
		return "", err
	}
	return identity.ChainID(diffs).String(), nil
}

func (p *preparation) once(ctx context.Context, sn snapshots.Snapshotter, key, parent string) error {
	start := time.Now()
	if _, err := sn.Prepare(ctx, key, parent); err != nil {
		return err
	}
	prepared := time.Now()
	if _, err := sn.Mounts(ctx, key); err != nil {
		return err
	}
	mounted := time.Now()
	if err := sn.Remove(ctx, key); err != nil {
		return err
	}
	p.Prepare = append(p.Prepare, prepared.Sub(start).Seconds()*1e3)
	p.Mounts = append(p.Mounts, mounted.Sub(prepared).Seconds()*1e3)
	p.Remove = append(p.Remove, time.Since(mounted).Seconds()*1e3)
	return nil
}

// both is what a container waits for: Prepare and Mounts.
func (p *preparation) both() []float64 {
	sum := make([]float64, len(p.Prepare))
	for i := range sum {
		sum[i] = p.Prepare[i] + p.Mounts[i]
	}
	return sum
}

// prepareFigures sets the median of the differences of neighbours, and what lies behind it.
func prepareFigures(all map[string]*preparation, set func(string, float64)) {
	ours, theirs := all["nhybrid"], all["overlayfs"]
	if ours == nil || theirs == nil {
		return
	}
	n, o := ours.both(), theirs.both()
	var differences []float64
	for i := range min(len(n), len(o)) {
		differences = append(differences, n[i]-o[i])
	}
	set("prepare_overhead_ms", result.Median(differences))
	set("prepare_overhead_p95_ms", result.Quantile(n, 0.95)-result.Quantile(o, 0.95))
	for name, p := range all {
		set("prepare_ms."+name, result.Median(p.Prepare))
		set("mounts_ms."+name, result.Median(p.Mounts))
		set("remove_ms."+name, result.Median(p.Remove))
	}
}
