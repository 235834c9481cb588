// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sync/errgroup"

	"github.com/nhybrid/nhybrid/integration/bench/lab"
	"github.com/nhybrid/nhybrid/integration/link"
	"github.com/nhybrid/nhybrid/integration/rig"
	"github.com/nhybrid/nhybrid/snapshotter/control"
)

// measure pulls the image.
func (b *bench) measure(ctx context.Context, g *rig.Rig, s *stand, r *run) (err error) {
	if err := s.arm(); err != nil {
		return err
	}
	if err := lab.DropCaches(b.options.dropCaches); err != nil {
		return err
	}
	before, err := b.look(g, s)
	if err != nil {
		return err
	}
	var daemon *watcher
	if g.Daemon != nil {
		if daemon, err = newWatcher(g); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, daemon.close()) }()
	}
	pull, err := g.Command(ctx, "ctr", "images", "pull", "--plain-http", g.Ref(imageName))
	if err != nil {
		return err
	}
	var said strings.Builder
	pull.Stderr = &said
	seen := len(g.Link.Requests())

	start := time.Now()
	since := func() float64 { return time.Since(start).Seconds() }
	if err := pull.Run(); err != nil {
		return fmt.Errorf("pull: %w: %s", err, said.String())
	}
	r.ReturnS = since()
	atReturn, err := b.look(g, s)
	if err != nil {
		return err
	}
	group, inGroup := errgroup.WithContext(ctx)
	group.Go(func() (err error) {
		// Both at once, as two devices can.
		done := make(chan error, 1)
		go func() { done <- lab.SyncFS(s.nvm.Mountpoint()) }()
		err = errors.Join(lab.SyncFS(s.hdd.Mountpoint()), <-done)
		r.SyncedS = since()
		return err
	})
	if daemon != nil {
		group.Go(func() error {
			if err := daemon.awaitDurable(inGroup, len(b.layers[r.Image])); err != nil {
				return err
			}
			r.ReportedS = since()
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	durable, err := b.look(g, s)
	if err != nil {
		return err
	}
	if daemon != nil {
		// The tree comes last of all, and before it has been made its size is not known.
		if err := daemon.await(ctx, settled); err != nil {
			return err
		}
		r.SettledS = since()
		memory, err := lab.MemoryOf(g.Daemon.Pid())
		if err != nil {
			return err
		}
		r.DaemonSettled = &memory
	}
	r.NVMUsedBytes = durable.nvmUsed - before.nvmUsed
	r.HDDToReturn, r.HDDToDurable = atReturn.hdd.Minus(before.hdd), durable.hdd.Minus(before.hdd)
	r.HDDSeeks = durable.seeks - before.seeks
	r.ContainerdCPUS = (durable.containerd - before.containerd).Seconds()
	r.DaemonCPUS = (durable.daemon - before.daemon).Seconds()
	r.DaemonWaitS, r.CPUs = (durable.waited - before.waited).Seconds(), runtime.NumCPU()
	r.arrivals(b.layers[r.Image], b.data[r.Image], g.Link.Requests()[seen:], start)
	return nil
}

// observed is a look at the counters.
type observed struct {
	hdd                lab.Counters
	seeks              int64
	nvmUsed            int64
	containerd, daemon time.Duration
	waited             time.Duration // of the daemon for a CPU
}

func (b *bench) look(g *rig.Rig, s *stand) (o observed, err error) {
	if o.hdd, err = lab.CountersOf(s.hdd.Mountpoint()); err != nil {
		return o, err
	}
	model, err := s.hdd.Counters()
	if err != nil {
		return o, err
	}
	o.seeks = model.Seeks
	if o.nvmUsed, err = lab.UsedBytes(s.nvm.Mountpoint()); err != nil {
		return o, err
	}
	if o.containerd, err = lab.CPUOf(g.Containerd.Pid()); err != nil || g.Daemon == nil {
		return o, err
	}
	if _, o.waited, err = lab.Scheduled(g.Daemon.Pid()); err != nil {
		return o, err
	}
	o.daemon, err = lab.CPUOf(g.Daemon.Pid())
	return o, err
}

// arrivals takes from the link when each layer was there.
func (r *run) arrivals(layers []v1.Descriptor, data []int64, requests []link.Request, start time.Time) {
	for i, l := range layers {
		d := layer{Digest: l.Digest.String(), Compressed: l.Size, Data: data[i]}
		r.CompressedBytes += d.Compressed
		r.DataBytes += d.Data
		for _, q := range requests {
			if q.Digest == d.Digest && q.Method == "GET" && !q.End.IsZero() {
				d.ArrivedS = max(d.ArrivedS, q.End.Sub(start).Seconds())
			}
		}
		r.Layers = append(r.Layers, d)
		if d.ArrivedS > r.Layers[r.LDL].ArrivedS {
			r.LDL = i
		}
	}
}

// describe asks the daemon what stands where, after the clock has stopped.
func (r *run) describe(ctx context.Context, g *rig.Rig) (err error) {
	client, done, err := control.Dial(g.ControlSocket())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, done()) }()
	answer, err := client.Inspect(ctx, &control.InspectRequest{Ref: g.Ref(imageName), Namespace: g.Namespace})
	if err != nil {
		return fmt.Errorf("inspect image: %w", err)
	}
	for i, l := range answer.GetLayers() {
		if i >= len(r.Layers) {
			return fmt.Errorf("inspect image: the daemon tells of %d layers, the image has %d", len(answer.GetLayers()), len(r.Layers))
		}
		m := &r.Layers[i]
		m.HDDRate, m.UnpackRate = l.GetDecision().GetHddRate(), l.GetDecision().GetUnpackRate()
		m.Tier, m.Reason = l.GetTier(), l.GetDecision().GetReason()
		r.NVMDataBytes += l.GetNvmBytes()
	}
	r.ViewBytes = answer.GetSnapshot().GetViewBytes()
	return nil
}
