// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sync/errgroup"

	"github.com/nhybrid/nhybrid/integration/bench/lab"
	"github.com/nhybrid/nhybrid/integration/rig"
	"github.com/nhybrid/nhybrid/snapshotter/control"
)

// run is one pull, as measured. All times are seconds from the start of the pull command.
type run struct {
	key
	// Setting tells runs apart that cannot be compared: other programs, images or devices.
	Setting string    `json:"setting"`
	Begun   time.Time `json:"begun"`

	// ReturnS is when the pull command had ended.
	ReturnS float64 `json:"return_s"`
	// SyncedS is when the filesystems of both tiers had been synced, which began at ReturnS.
	SyncedS float64 `json:"synced_s"`
	// ReportedS is when nhybrid said that all layers are durable, their metadata included; 0 for overlayfs.
	ReportedS float64 `json:"reported_s,omitempty"`
	// SettledS is when nhybrid had nothing left to do: captures, syncs, the tree.
	SettledS float64 `json:"settled_s,omitempty"`

	// DataBytes are those of the files of all layers, NVMDataBytes of them on NVM when the pull returned.
	DataBytes    int64 `json:"data_bytes"`
	NVMDataBytes int64 `json:"nvm_data_bytes"`
	TreeBytes    int64 `json:"tree_bytes"`
	// NVMUsedBytes is by how much the pull filled the filesystem on NVM: blocks, directories and databases too.
	NVMUsedBytes int64 `json:"nvm_used_bytes"`

	Layers []layer `json:"layers"`
	// LDL is the index of the layer whose download ended last, as the link saw it.
	LDL int `json:"ldl"`

	// What the HDD was given to do until the pull returned, and until all was durable.
	HDDToReturn  lab.Counters `json:"hdd_to_return"`
	HDDToDurable lab.Counters `json:"hdd_to_durable"`
	// CPU seconds of the programs until all was durable.
	ContainerdCPUS float64 `json:"containerd_cpu_s"`
	DaemonCPUS     float64 `json:"daemon_cpu_s,omitempty"`

	// DaemonAfter is the daemon's memory when all was settled, DaemonIdle after a quiet time.
	DaemonAfter *lab.Memory `json:"daemon_after,omitempty"`
	DaemonIdle  *lab.Memory `json:"daemon_idle,omitempty"`
	// WriteBack is how the layers on NVM were copied to HDD later, nil where that was not measured.
	WriteBack *writeBack `json:"write_back,omitempty"`
}

// durable is when all that the pull wrote was on the devices and, with nhybrid, the daemon had found that out.
func (r run) durable() float64 { return max(r.SyncedS, r.ReportedS) }

// layer is one layer of a run.
type layer struct {
	Digest     string  `json:"digest"`
	Compressed int64   `json:"compressed"`
	Data       int64   `json:"data_bytes"`
	ArrivedS   float64 `json:"arrived_s"`
	Tier       string  `json:"tier,omitempty"`
	Reason     string  `json:"reason,omitempty"`
	Swings     int32   `json:"swings,omitempty"`
}

type writeBack struct {
	Bytes   int64   `json:"bytes"`
	Seconds float64 `json:"seconds"` // from the daemon's start with write-back on
}

// timeout bounds one run, in which something hangs.
const timeout = 10 * time.Minute

// once makes new devices, starts all programs on them, pulls the image and takes everything down.
func (b *bench) once(ctx context.Context, k key) (r run, err error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	v, _ := variantByName(k.Variant)
	dir := filepath.Join(b.dir, "r")
	s, err := newStand(ctx, dir, b.sizes)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	g, err := rig.Start(ctx, b.rigOptions(s, v, b.rates[k.Bandwidth]))
	if err != nil {
		return r, err
	}
	defer func() {
		b.keepLogs(g, k)
		if err != nil && ctx.Err() == nil && g.Daemon != nil {
			err = fmt.Errorf("%w\nthe end of the daemon's log:\n%s", err, g.Daemon.LogTail(3000))
		}
		err = errors.Join(err, g.Close())
	}()
	img := b.images[k.Image]
	if err := g.Push(ctx, imageName, img); err != nil {
		return r, err
	}
	r = run{key: k, Setting: b.setting, Begun: time.Now().UTC()}
	if err := b.measure(ctx, g, s, &r); err != nil {
		return r, err
	}
	if err := r.describe(ctx, g, s, v); err != nil {
		return r, err
	}
	if v.Policy != "" && k.Round <= b.options.afterRounds {
		err = b.afterwards(ctx, g, &r)
	}
	return r, err
}

const imageName = "bench/image:1"

func (b *bench) rigOptions(s *stand, v variant, rate float64) rig.Options {
	o := rig.Options{
		Dir: filepath.Join(s.dir, "g"), Bin: b.bin, RegistryDir: b.registryDir, Rate: rate,
		ContainerdRoot: filepath.Join(s.hdd.Mountpoint(), "containerd"), NoDaemon: v.Policy == "",
		ConcurrentUnpacks: v.Unpacks,
	}
	if v.Policy == "" {
		on := s.hdd.Mountpoint()
		if v.NVM {
			on = s.nvm.Mountpoint()
		}
		o.ContainerdConfig = overlayConfig(filepath.Join(on, "overlayfs"))
		return o
	}
	o.HDD, o.NVM = filepath.Join(s.hdd.Mountpoint(), "nhybrid"), filepath.Join(s.nvm.Mountpoint(), "nhybrid")
	// Writing back is work for later; it would only blur what the pull itself costs.
	o.DaemonConfig = fmt.Sprintf("[placement]\npolicy = '%s'\n[background]\nwrite_back = false\n", v.Policy)
	return o
}

func overlayConfig(root string) string {
	return fmt.Sprintf("[plugins.'io.containerd.snapshotter.v1.overlayfs']\n  root_path = '%s'\n", root)
}

// measure pulls the image.
func (b *bench) measure(ctx context.Context, g *rig.Rig, s *stand, r *run) (err error) {
	nvmBefore, err := lab.UsedBytes(s.nvm.Mountpoint())
	if err != nil {
		return err
	}
	if err := s.arm(); err != nil {
		return err
	}
	if b.options.dropCaches {
		if err := lab.DropCaches(); err != nil {
			return fmt.Errorf("drop caches: %w", err)
		}
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
	nvm, err := lab.UsedBytes(s.nvm.Mountpoint())
	if err != nil {
		return err
	}
	r.NVMUsedBytes = nvm - nvmBefore
	var durable observed
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
			if err := daemon.await(inGroup, allDurable(len(b.layers[r.Image]))); err != nil {
				return err
			}
			r.ReportedS = since()
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	if durable, err = b.look(g, s); err != nil {
		return err
	}
	if daemon != nil {
		// The tree comes last of all, and before it has been made its size is not known.
		if err := daemon.await(ctx, settled); err != nil {
			return err
		}
		r.SettledS = since()
	}
	r.HDDToReturn, r.HDDToDurable = atReturn.hdd.Minus(before.hdd), durable.hdd.Minus(before.hdd)
	r.ContainerdCPUS = (durable.containerd - before.containerd).Seconds()
	r.DaemonCPUS = (durable.daemon - before.daemon).Seconds()
	r.arrivals(b.layers[r.Image], g, seen, start)
	return nil
}

// observed is a look at the counters.
type observed struct {
	hdd                lab.Counters
	containerd, daemon time.Duration
}

func (b *bench) look(g *rig.Rig, s *stand) (o observed, err error) {
	if o.hdd, err = lab.CountersOf(s.hdd.Mountpoint()); err != nil {
		return o, err
	}
	if o.containerd, err = lab.CPUOf(g.Containerd.Pid()); err != nil || g.Daemon == nil {
		return o, err
	}
	o.daemon, err = lab.CPUOf(g.Daemon.Pid())
	return o, err
}

// arrivals takes from the link when each layer was there.
func (r *run) arrivals(layers []v1.Descriptor, g *rig.Rig, seen int, start time.Time) {
	requests := g.Link.Requests()[seen:]
	for i, l := range layers {
		d := layer{Digest: l.Digest.String(), Compressed: l.Size}
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

// describe finds out what stands where, after the clock has stopped.
func (r *run) describe(ctx context.Context, g *rig.Rig, s *stand, v variant) (err error) {
	if v.Policy == "" {
		on := s.hdd.Mountpoint()
		if v.NVM {
			on = s.nvm.Mountpoint()
		}
		if r.DataBytes, err = lab.FileBytes(filepath.Join(on, "overlayfs", "snapshots")); err != nil {
			return err
		}
		if v.NVM {
			r.NVMDataBytes = r.DataBytes
		}
		return nil
	}
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
		m.Tier, m.Reason, m.Swings = l.GetTier(), l.GetDecision().GetReason(), l.GetDecision().GetSwings()
		m.Data = max(l.GetNvmBytes(), l.GetHddBytes())
		r.DataBytes += m.Data
		r.NVMDataBytes += l.GetNvmBytes()
	}
	r.TreeBytes = answer.GetSnapshot().GetTreeBytes()
	return nil
}

// afterwards measures what the daemon does and keeps when nobody wants anything of it.
func (b *bench) afterwards(ctx context.Context, g *rig.Rig, r *run) (err error) {
	after, err := lab.MemoryOf(g.Daemon.Pid())
	if err != nil {
		return err
	}
	r.DaemonAfter = &after
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(b.options.idle):
	}
	idle, err := lab.MemoryOf(g.Daemon.Pid())
	if err != nil {
		return err
	}
	r.DaemonIdle = &idle
	if r.NVMDataBytes == 0 {
		return nil
	}

	if err := g.Daemon.Stop(); err != nil {
		return err
	}
	path := filepath.Join(g.Dir, "nhybrid.toml")
	config, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	on := strings.Replace(string(config), "write_back = false", "write_back = true", 1)
	if on == string(config) {
		return fmt.Errorf("%s: no \"write_back = false\" to change", path)
	}
	if err := os.WriteFile(path, []byte(on), 0o644); err != nil {
		return err
	}
	if err := g.Daemon.Start(ctx); err != nil {
		return err
	}
	start := time.Now()
	w, err := newWatcher(g)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	if err := w.awaitHome(ctx, g.Namespace); err != nil {
		return err
	}
	r.WriteBack = &writeBack{Bytes: r.NVMDataBytes, Seconds: time.Since(start).Seconds()}
	return nil
}

// keepLogs stores the logs of a run where the caller wants them.
func (b *bench) keepLogs(g *rig.Rig, k key) {
	if b.options.logs == "" {
		return
	}
	for _, p := range []*rig.Process{g.Daemon, g.Containerd} {
		if p == nil {
			continue
		}
		name := fmt.Sprintf("%d-%s-%s-%s-%s", k.Round, k.Image, k.Bandwidth, k.Variant, filepath.Base(p.LogPath()))
		if err := errors.Join(os.MkdirAll(b.options.logs, 0o755), os.WriteFile(filepath.Join(b.options.logs, name), []byte(p.Log()), 0o644)); err != nil {
			b.say("cannot keep log: %v", err)
		}
	}
}
