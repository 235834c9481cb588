// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/oci"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/nhybrid/nhybrid/integration/bench/result"
	"github.com/nhybrid/nhybrid/scmlib/region"
	"github.com/nhybrid/nhybrid/scmlib/region/api"
)

// poolReady is how many regions wait, zeroed.
const poolReady = 8

// attachSize is the size of those regions.
func (o *options) attachSize() string {
	if o.quick {
		return "16m"
	}
	return "256m"
}

// attachRow is how long the creation of containers took, in milliseconds, round by round: what containerd, shim and runtime do until the first program can start.
type attachRow struct {
	With    []float64 `json:"with_ms"`
	Hook    []float64 `json:"hook_ms"` // that does nothing
	Without []float64 `json:"without_ms"`
}

// differences of each round to the container without a region.
func (a *attachRow) differences(to []float64) (ms []float64) {
	for i, v := range to {
		ms = append(ms, v-a.Without[i])
	}
	return ms
}

// attachCost creates containers with a region of 256 MiB from the pool, with a hook that does nothing, and without either, each first as often as the others.
func (b *bench) attachCost(ctx context.Context) error {
	s := b.stand
	ctx, c, err := s.client(ctx)
	if err != nil {
		return err
	}
	img, err := c.GetImage(ctx, s.rig.Ref(imageName))
	if err != nil {
		return err
	}
	none := func(context.Context, oci.Client, *containers.Container, *specs.Spec) error { return nil }
	idle := func(_ context.Context, _ oci.Client, _ *containers.Container, spec *specs.Spec) error {
		spec.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/bin/true", Args: []string{"true"}}}}
		return nil
	}
	device, err := s.device(b.options.attachSize())
	if err != nil {
		return err
	}
	kinds := []oci.SpecOpts{device, idle, none}
	row := &attachRow{}
	for i := range b.options.attachments {
		if i%poolReady == 0 {
			if err := s.poolFull(ctx); err != nil {
				return err
			}
		}
		var ms [3]float64
		for k := range kinds {
			which := (i/poolReady + k) % len(kinds)
			if ms[which], err = createContainer(ctx, c, img, fmt.Sprintf("a%d-%d", i, which), s.rig.Snapshotter, kinds[which]); err != nil {
				return err
			}
		}
		row.With, row.Hook, row.Without = append(row.With, ms[0]), append(row.Hook, ms[1]), append(row.Without, ms[2])
	}
	b.attach = row
	b.say("attach: %.2f ms over no region, %.2f ms of it are those of any hook", result.Median(row.differences(row.With)), result.Median(row.differences(row.Hook)))
	return nil
}

// device does to a container what the daemon's CDI specification says of a device: what runtimes do before the time that is measured.
func (s *stand) device(name string) (oci.SpecOpts, error) {
	var spec struct {
		Devices []struct {
			Name           string
			ContainerEdits struct {
				Env   []string
				Hooks []struct {
					HookName, Path string
					Args           []string
					Timeout        int
				}
			}
		}
	}
	b, err := os.ReadFile(s.spec)
	if err == nil {
		err = json.Unmarshal(b, &spec)
	}
	if err != nil {
		return nil, fmt.Errorf("read CDI specification %q: %w", s.spec, err)
	}
	for _, d := range spec.Devices {
		if d.Name != name || len(d.ContainerEdits.Hooks) != 1 || d.ContainerEdits.Hooks[0].HookName != "createRuntime" {
			continue
		}
		e := d.ContainerEdits
		return func(_ context.Context, _ oci.Client, _ *containers.Container, s *specs.Spec) error {
			s.Process.Env = append(s.Process.Env, e.Env...)
			h := e.Hooks[0]
			s.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: h.Path, Args: h.Args, Timeout: &h.Timeout}}}
			return nil
		}, nil
	}
	return nil, fmt.Errorf("CDI specification %q: no device %q with one createRuntime hook", s.spec, name)
}

func createContainer(ctx context.Context, c *client.Client, img client.Image, id, snapshotter string, more oci.SpecOpts) (ms float64, err error) {
	container, err := c.NewContainer(ctx, id, client.WithSnapshotter(snapshotter), client.WithNewSnapshot(id, img),
		client.WithNewSpec(oci.WithImageConfig(img), oci.WithProcessArgs("true"), more))
	if err != nil {
		return 0, fmt.Errorf("create container: %w", err)
	}
	defer func() { err = errors.Join(err, container.Delete(ctx, client.WithSnapshotCleanup)) }()
	began := time.Now()
	task, err := container.NewTask(ctx, cio.NullIO)
	took := time.Since(began)
	if err != nil {
		return 0, fmt.Errorf("create task: %w", err)
	}
	_, err = task.Delete(ctx, client.WithProcessKill)
	return float64(took.Nanoseconds()) / 1e6, err
}

// poolFull waits until the regions of removed containers are gone and the pool is full again.
func (s *stand) poolFull(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		var all region.Listing
		var space region.Space
		if _, err := api.Call(s.rig.RegionSocket(), region.OpList, region.Args{}, &all); err != nil {
			return err
		}
		if _, err := api.Call(s.rig.RegionSocket(), region.OpBooks, region.Args{}, &space); err != nil {
			return err
		}
		full := len(all.Regions) == 0
		for _, p := range space.Regions {
			full = full && p.Ready >= p.Want
		}
		if full {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the pool of regions does not fill: %d regions, %+v: %w", len(all.Regions), space.Regions, ctx.Err())
		case <-time.After(2 * time.Millisecond):
		}
	}
}
