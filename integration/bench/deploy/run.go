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

	"github.com/nhybrid/nhybrid/integration/bench/lab"
	"github.com/nhybrid/nhybrid/integration/rig"
)

// run is one pull, as measured. All times are seconds from the start of the pull command.
type run struct {
	key
	// Setting tells runs apart that cannot be compared: other programs, images or devices.
	Setting string    `json:"setting"`
	Begun   time.Time `json:"begun"`
	// LinkRate is what the link let through, measured before the first pull of the image over this link in the round.
	LinkRate lab.LinkRate `json:"link_rate"`

	// ReturnS is when the pull command had ended.
	ReturnS float64 `json:"return_s"`
	// SyncedS is when the filesystems of both tiers had been synced, which began at ReturnS.
	SyncedS float64 `json:"synced_s"`
	// ReportedS is when nhybrid said that all layers are durable, their metadata included; 0 for overlayfs.
	ReportedS float64 `json:"reported_s,omitempty"`
	// SettledS is when nhybrid had nothing left to do: captures, syncs, the tree.
	SettledS float64 `json:"settled_s,omitempty"`

	// CompressedBytes are those of the layers as downloaded, DataBytes those of the files in them.
	CompressedBytes int64 `json:"compressed_bytes"`
	DataBytes       int64 `json:"data_bytes"`
	// NVMUsedBytes is by how much the filesystem on NVM had been filled when all was durable: files, directories and
	// databases.
	NVMUsedBytes int64 `json:"nvm_used_bytes"`
	// NVMDataBytes are the bytes of files on NVM, ViewBytes those of nhybrid's tree.
	NVMDataBytes int64 `json:"nvm_data_bytes"`
	ViewBytes    int64 `json:"view_bytes"`

	Layers []layer `json:"layers"`
	// LDL is the index of the layer whose download ended last, as the link saw it.
	LDL int `json:"ldl"`

	// What the HDD was given to do until the pull returned, and until all was durable.
	HDDToReturn  lab.Counters `json:"hdd_to_return"`
	HDDToDurable lab.Counters `json:"hdd_to_durable"`
	// HDDSeeks is how often its head went elsewhere until all was durable.
	HDDSeeks int64 `json:"hdd_seeks"`
	// CPU seconds of the programs and of their children (igzip) until all was durable.
	ContainerdCPUS float64 `json:"containerd_cpu_s"`
	DaemonCPUS     float64 `json:"daemon_cpu_s,omitempty"`
	// DaemonWaitS are the seconds that threads of the daemon waited for one of the CPUs meanwhile.
	DaemonWaitS float64 `json:"daemon_wait_s,omitempty"`
	CPUs        int     `json:"cpus"`

	// DaemonSettled is the daemon's memory when all was settled, DaemonIdle after a quiet time; nil for overlayfs.
	DaemonSettled *lab.Memory `json:"daemon_settled,omitempty"`
	DaemonIdle    *lab.Memory `json:"daemon_idle,omitempty"`
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
	// What the daemon took the rates for when it placed the layer's files.
	HDDRate    float64 `json:"hdd_rate,omitempty"`
	UnpackRate float64 `json:"unpack_rate,omitempty"`
}

// timeout bounds one run, in which something hangs.
const timeout = 10 * time.Minute

// once makes new devices, starts all programs on them, pulls the image and takes everything down.
func (b *bench) once(ctx context.Context, k key) (r run, err error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	v, _ := variantByName(k.Variant)
	rate, err := linkRate(k.Link)
	if err != nil {
		return r, err
	}
	s, err := newStand(ctx, filepath.Join(b.dir, "r"), b.sizes)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	g, err := rig.Start(ctx, b.rigOptions(s, v, rate))
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
	if err := g.Push(ctx, imageName, b.images[k.Image]); err != nil {
		return r, err
	}
	r = run{key: k, Setting: b.settings[k.Image], Begun: time.Now().UTC()}
	if r.LinkRate, err = b.measureLink(ctx, g, k, rate); err != nil {
		return r, err
	}
	if err := b.measure(ctx, g, s, &r); err != nil {
		return r, err
	}
	if err := checkDecompression(g, v); err != nil {
		return r, err
	}
	if !v.Hybrid {
		if v.NVM {
			r.NVMDataBytes = r.DataBytes
		}
		return r, nil
	}
	if err := r.describe(ctx, g); err != nil {
		return r, err
	}
	if k.Round <= b.options.afterRounds {
		err = b.afterwards(ctx, g, &r)
	}
	return r, err
}

// measureLink measures once for all variants of an image, link and round.
func (b *bench) measureLink(ctx context.Context, g *rig.Rig, k key, rate float64) (lab.LinkRate, error) {
	k.Variant = ""
	if r, ok := b.links[k]; ok {
		return r, nil
	}
	r, err := lab.MeasureLink(ctx, g, imageName, b.layers[k.Image], rate)
	if err != nil {
		return r, err
	}
	if rate > 0 {
		b.say("link %s: %.3f of its rate with one connection, %.3f with three", k.Link, r.One/rate, r.Three/rate)
	}
	b.links[k] = r
	return r, nil
}

const imageName = "bench/image:1"

func (b *bench) rigOptions(s *stand, v variant, rate float64) rig.Options {
	o := rig.Options{
		Dir: filepath.Join(s.dir, "g"), Bin: b.bin, RegistryDir: b.registryDir, Rate: rate,
		ContainerdRoot: filepath.Join(s.hdd.Mountpoint(), "containerd"), NoDaemon: !v.Hybrid, ConcurrentUnpacks: 1,
		// containerd takes igzip or unpigz wherever they are in its PATH; by default it has neither.
		ContainerdEnv: []string{"CONTAINERD_DISABLE_PIGZ=true"},
	}
	if v.Best {
		o.ConcurrentUnpacks = unpacks
	} else {
		o.ContainerdEnv = append(o.ContainerdEnv, "CONTAINERD_DISABLE_IGZIP=true")
	}
	if !v.Hybrid {
		on := s.hdd.Mountpoint()
		if v.NVM {
			on = s.nvm.Mountpoint()
		}
		o.ContainerdConfig = overlayConfig(filepath.Join(on, "overlayfs"))
		return o
	}
	o.HDD, o.NVM = filepath.Join(s.hdd.Mountpoint(), "nhybrid"), filepath.Join(s.nvm.Mountpoint(), "nhybrid")
	if v.Policy != "" {
		o.DaemonConfig = fmt.Sprintf("[placement]\npolicy = '%s'\n", v.Policy)
	}
	// Writing back is work for later; it would only blur what the pull itself costs.
	o.DaemonConfig += "[background]\nwrite_back = false\n"
	return o
}

func overlayConfig(root string) string {
	return fmt.Sprintf("[plugins.'io.containerd.snapshotter.v1.overlayfs']\n  root_path = '%s'\n", root)
}

// checkDecompression makes sure that containerd has decompressed as the variant says. It writes which program it uses
// into its log of level debug.
func checkDecompression(g *rig.Rig, v variant) error {
	want := v.Best && !v.Hybrid // with nhybrid's differ containerd decompresses nothing
	if uses := strings.Contains(g.Containerd.Log(), "using igzip for decompression"); uses != want {
		return fmt.Errorf("variant %q: containerd uses igzip: %t, want %t", v.Name, uses, want)
	}
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
		name := fmt.Sprintf("%d-%s-%s-%s-%s", k.Round, k.Image, k.Link, k.Variant, filepath.Base(p.LogPath()))
		if err := errors.Join(os.MkdirAll(b.options.logs, 0o755), os.WriteFile(filepath.Join(b.options.logs, name), []byte(p.Log()), 0o644)); err != nil {
			b.say("cannot keep log: %v", err)
		}
	}
}
