// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/nhybrid/nhybrid/cmd/internal/config"
	"github.com/nhybrid/nhybrid/snapshotter/control"
)

const (
	image  = "docker.io/library/python:3"
	digest = "sha256:1111111111111111111111111111111111111111111111111111111111111111"
	base   = "sha256:2222222222222222222222222222222222222222222222222222222222222222"
	java   = "sha256:3333333333333333333333333333333333333333333333333333333333333333"
)

var moment = timestamppb.New(time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC))

// backend is a daemon with one image of three layers, of which the topmost is not unpacked.
type backend struct {
	*hot
	events []*control.Event
	// trouble is why the layer of snapshot 4 cannot be used.
	trouble string
	// warnings are beside the one of Status.
	warnings []string
}

func layers() []*control.Layer {
	return []*control.Layer{
		{
			Index: 0, Digest: base, ChainId: base, SnapshotId: "1", Compressed: 64_900_000, Uncompressed: 180_000_000, HddBytes: 181_000_000,
			Inodes: 9000, Tier: "hdd", State: "home", Durable: true, Layer: "7",
			Decision: &control.Decision{
				Tier: "hdd", Policy: "lass", Index: 0, Layers: 3, Ldl: 1, Downloading: 2, BytesLeft: 90_000_000, Admitted: true,
				Reason:  "layer 0 to HDD: it is stored while 2 other layers still download, 90.0 MB to go, so its storing costs the pull no time",
				NvmFree: 2_000_000_000, NvmReserve: 100_000_000, Time: moment,
			},
		},
		{
			Index: 1, Digest: java, ChainId: digest, SnapshotId: "2", Compressed: 80_700_000, Uncompressed: 214_000_000, NvmBytes: 15_000_000, HddBytes: 200_000_000,
			Inodes: 900, Tier: "hdd", State: "stored", Ldl: true, Layer: "8",
			Decision: &control.Decision{
				Tier: "nvm", Policy: "drain", Index: 1, Layers: 3, Ldl: 1, Admitted: true,
				Reason:  "layer 1 to NVM: 200 MB in 300 files to the pack (the disk keeps up); 10.0 MB in 12 files to NVM and the pack (hot by profile); 4.00 MB in 1 file to NVM alone (the disk would be late)",
				NvmFree: 2_000_000_000, NvmReserve: 100_000_000, HddBacklog: 1_000_000, HddRate: 140e6, Time: moment,
				Files: []*control.Share{
					{Place: "pack", Rule: "in-time", Files: 300, Bytes: 200_000_000},
					{Place: "both", Rule: "hot", HotBy: "hot by profile", Files: 12, Bytes: 10_000_000},
					{Place: "nvm", Rule: "late", Files: 1, Bytes: 4_000_000},
				},
			},
		},
		{Index: 2, Digest: digest, ChainId: java, Compressed: 168},
	}
}

func (b *backend) Status(context.Context) (*control.StatusResponse, error) {
	return &control.StatusResponse{
		Policy: "lass",
		Kernel: &control.Kernel{Release: "6.18.0", DataOnly: true, FileBacked: true, StackOk: true, Loop: true, IdMap: true, IndexOff: true},
		Tiers: []*control.Tier{
			{Name: "nvm", Root: "/mnt/nvm/nhybrid", Filesystem: "ext4", Device: "/dev/pmem0", Total: 4e9, Free: 3e9, Used: 1e9, Reserve: 2e8, Dax: true, Inodes: 32768, InodesFree: 31000},
			{Name: "hdd", Root: "/var/lib/nhybrid", Filesystem: "xfs", Device: "/dev/sda1", Total: 4e12, Free: 3e12, Used: 1e12, Quota: true},
		},
		Queues:     []*control.Queue{{Name: "unpack", Waiting: 2, Running: 1}, {Name: "sync", Failed: 1, LastError: "no space left on device"}},
		Containerd: &control.Containerd{Address: "/run/containerd/containerd.sock", Reachable: true, Version: "v2.4.2"},
		Active:     3, Committed: 12, Pulls: 1, NotDurable: 2,
		Warnings: append([]string{"starts are not traced, so that what images need is only guessed: fanotify is refused here; set hot.trace = false"}, b.warnings...),
	}, nil
}

func (b *backend) List(_ context.Context, r *control.ListRequest, send func(*control.Snapshot) error) error {
	for _, s := range []*control.Snapshot{
		{Id: "1", Key: "default/1/" + base, Namespace: "default", Name: base, Kind: "committed", Layer: "7", Tier: "hdd", NvmBytes: proto.Int64(0), HddBytes: proto.Int64(181_000_000), Inodes: proto.Int64(9000), State: "home", Durable: true, Images: []string{image}},
		{Id: "2", Key: "default/2/" + digest, Namespace: "default", Name: digest, Parent: "default/1/" + base, Kind: "committed", Layer: "8", Tier: "hdd", NvmBytes: proto.Int64(15_000_000), HddBytes: proto.Int64(200_000_000), Inodes: proto.Int64(900), State: "stored", ViewBytes: 5_400_000, Images: []string{image}, Created: moment, Labels: map[string]string{"b": "2", "a": "1"}},
		{Id: "3", Key: "k8s.io/3/web", Namespace: "k8s.io", Name: "web", Parent: "default/2/" + digest, Kind: "active", Tier: "nvm"},
		{Id: "4", Key: "default/4/" + java, Namespace: "default", Name: java, Kind: "committed", Layer: "9", Tier: "nvm", NvmBytes: proto.Int64(0), HddBytes: proto.Int64(0), Inodes: proto.Int64(0), State: "stored", Error: b.trouble},
	} {
		if r.GetNamespace() != "" && r.GetNamespace() != s.GetNamespace() {
			continue
		}
		if s.GetKind() == "active" && r.GetCount() {
			s.NvmBytes, s.HddBytes, s.Inodes = proto.Int64(4096), proto.Int64(0), proto.Int64(1)
		}
		if err := send(s); err != nil {
			return err
		}
	}
	return nil
}

func find(ref string) error {
	if ref == "unavailable" {
		return fmt.Errorf("containerd is away: %w", errdefs.ErrUnavailable)
	}
	if ref != image {
		return fmt.Errorf("image or snapshot %q: %w", ref, errdefs.ErrNotFound)
	}
	return nil
}

func (*backend) Inspect(_ context.Context, r *control.InspectRequest) (*control.InspectResponse, error) {
	if r.GetRef() == "web" {
		return &control.InspectResponse{Namespace: "k8s.io", Layers: layers()[:2], Snapshot: &control.Snapshot{
			Id: "3", Kind: "active", Name: "web", Tier: "nvm", NvmBytes: proto.Int64(4096), HddBytes: proto.Int64(0), Inodes: proto.Int64(1),
		}}, nil
	}
	return &control.InspectResponse{
		Image: image, Digest: digest, Namespace: "default", Layers: layers(),
		Snapshot: &control.Snapshot{
			Id: "2", Kind: "committed", Name: digest, NvmBytes: proto.Int64(15_000_000), HddBytes: proto.Int64(200_000_000), Inodes: proto.Int64(900),
		},
	}, find(r.GetRef())
}

func (*backend) Why(_ context.Context, r *control.WhyRequest) (*control.WhyResponse, error) {
	w := &control.WhyResponse{Image: image, Total: 3, Layers: layers()}
	switch {
	case len(r.GetPath()) > 0:
		w.Layers = w.Layers[1:2]
		w.File = &control.File{
			Path: r.GetPath(), Type: "file", Size: 6_800_000, LayerIndex: 1, Tier: "nvm", DataPath: []byte("/mnt/nvm/nhybrid/d/8/0b/11"),
			Reason: "when its layer was stored (policy drain) it went to NVM and the pack (hot by profile); it is hot (95 % of the starts use it)",
		}
	case r.GetLayer() != "":
		w.Layers = w.Layers[:1]
	}
	return w, find(r.GetImage())
}

func (*backend) Usage(context.Context, *control.UsageRequest) (*control.UsageResponse, error) {
	return &control.UsageResponse{
		Images: []*control.ImageUsage{{Name: image, Namespace: "default", Layers: 3, NvmOwn: 215_000_000, HddShared: 181_000_000}},
		Tiers: []*control.TierUsage{
			{Name: "nvm", Layers: 215_000_000, Uppers: 4096, Views: 5_400_000, Parts: 2_500_000, Metadata: 1_000_000, Free: 3e9, Total: 4e9},
			{Name: "hdd", Layers: 181_000_000, Metadata: 1_000_000, Orphans: 8192, Free: 3e12, Total: 4e12},
		},
		Orphans: []*control.Orphan{{Id: "9", Key: "default/9/built", HddBytes: 8192, Reason: "no image and no container refers to it; containerd's garbage collection decides"}},
	}, nil
}

func (b *backend) Watch(ctx context.Context, _ *control.WatchRequest, send func(*control.Event) error) error {
	for _, e := range b.events {
		if err := send(e); err != nil {
			return err
		}
	}
	<-ctx.Done()
	return ctx.Err()
}

// serve runs the real control server over b and gives its socket.
func serve(t *testing.T, b control.Backend, c config.Config) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "ctl") // t.TempDir may be longer than a socket's path may be
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	socket := filepath.Join(dir, "control.sock")
	toml, err := c.Marshal()
	require.NoError(t, err)
	server := control.NewServer(b, control.Info{Version: "v1.2.3", Revision: "abc", Address: c.Address, Config: toml})
	server.SetServing(true)
	l, err := control.Listen(socket)
	require.NoError(t, err)
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		server.Stop(ctx)
		require.NoError(t, <-done)
		_, err := net.Dial("unix", socket)
		require.Error(t, err)
	})
	return socket
}
