// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// containerd-nhybrid-grpc serves the nhybrid snapshotter to containerd, as a
// proxy plugin over a unix socket, and its control API to nhybridctl.
package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/contrib/diffservice"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/log"
	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/cmd/internal/config"
	"github.com/nhybrid/nhybrid/internal/hosts"
	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter"
	"github.com/nhybrid/nhybrid/snapshotter/control"
	"github.com/nhybrid/nhybrid/snapshotter/cri"
	"github.com/nhybrid/nhybrid/snapshotter/host"
	"github.com/nhybrid/nhybrid/snapshotter/pull"
	"github.com/nhybrid/nhybrid/snapshotter/store"
)

// version is set by the build.
var version = "unknown"

func main() {
	cmd := &cobra.Command{
		Use:           "containerd-nhybrid-grpc",
		Short:         "containerd snapshotter that keeps images on two tiers, NVM and HDD",
		Version:       version,
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	load := config.Flags(cmd.Flags())
	cmd.RunE = func(*cobra.Command, []string) error {
		file, flags, err := load()
		if err != nil {
			return err
		}
		c, err := config.Load(file, os.Environ(), flags)
		if err != nil {
			return err
		}
		ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
		defer stop()
		return serve(ctx, c)
	}
	if err := cmd.Execute(); err != nil {
		fmt.Fprintln(os.Stderr, "containerd-nhybrid-grpc:", err)
		os.Exit(1)
	}
}

// registerProcessors makes programs known to containerd's applier, and tells which media types they take.
func registerProcessors(all map[string]config.StreamProcessor) func(mediaType string) bool {
	var accepted []string
	for _, name := range slices.Sorted(maps.Keys(all)) {
		p := all[name]
		diff.RegisterProcessor(diff.BinaryHandler(name, p.Returns, p.Accepts, p.Path, p.Args, p.Env))
		accepted = append(accepted, p.Accepts...)
	}
	return func(mediaType string) bool { return slices.Contains(accepted, mediaType) }
}

// serve runs the daemon until ctx ends.
func serve(ctx context.Context, c config.Config) (err error) {
	if err := log.SetLevel(c.LogLevel); err != nil {
		return err
	}
	if err := log.SetFormat(log.OutputFormat(c.LogFormat)); err != nil {
		return err
	}
	if unknown := config.UnknownEnv(os.Environ()); len(unknown) > 0 {
		log.G(ctx).Warnf("environment variables that mean nothing to nhybrid: %v", unknown)
	}
	// Garbage is mostly what merging a view leaves; give it back rather than grow.
	debug.SetGCPercent(30)

	passed, err := passedSockets(c.Address, c.ControlAddress, c.SCM.Address, c.MetricsAddress)
	if err != nil {
		return err
	}
	defer passed.close()
	// Both sockets first: one that is in use must stop us before we touch the store.
	snapshots, err := passed.listen(c.Address)
	if err != nil {
		return err
	}
	defer snapshots.Close()
	operator, err := passed.listen(c.ControlAddress)
	if err != nil {
		return err
	}
	defer operator.Close()
	failed := make(chan error, 3)
	start := func(what string, serve func(net.Listener) error, l net.Listener) {
		go func() {
			if err := serve(l); err != nil && ctx.Err() == nil {
				failed <- fmt.Errorf("serve %s on %q: %w", what, l.Addr(), err)
			}
		}()
	}
	srv := newEarly()
	defer srv.Stop()
	start("snapshots", srv.Serve, snapshots)

	policy, err := placement.ParsePolicy(c.Placement.Policy)
	if err != nil {
		return err
	}
	var upper placement.Tier
	if err := upper.UnmarshalText([]byte(c.Snapshot.UpperTier)); err != nil {
		return err
	}
	scm := &regions{stop: func() {}}
	watcher := pull.New(c.Containerd.Address, pull.WithTimeout(time.Duration(c.Containerd.Timeout)),
		pull.WithRegistries(hosts.New(c.Containerd.Hosts).Registries()))
	sn, err := snapshotter.New(ctx, snapshotter.Config{
		Store: store.Config{
			Root:          c.Root,
			NVMRoot:       c.NVMRoot,
			State:         c.State,
			Reserve:       func(total int64) int64 { return c.Placement.NVMReserve.Of(total) + scm.held(c, total) },
			ReserveInodes: c.Placement.NVMReserve.Inodes,
			HDDRate:       float64(c.Placement.HDDRate),
			Workers:       c.Background.Workers,
			Unpacks:       c.Unpack.Concurrency,
			MostBytes:     c.Unpack.MaxBytes.Bytes,
			MostMetadata:  c.Unpack.MaxMetadata.Bytes,
			WriteBack:     c.Background.WriteBack,
			WriteBackRate: int64(c.Background.WriteBackRate),
		},
		Policy:     policy,
		Poll:       time.Duration(c.Placement.PollInterval),
		UpperTier:  upper,
		Xino:       c.Snapshot.Xino,
		SyncRemove: c.Snapshot.SyncRemove,
		Downloads:  watcher,
		Processors: registerProcessors(c.StreamProcessors),
		Reach:      host.NewReach(c.Containerd.Address, c.State).Check,
		Hot:        hot(c.Hot, c.Root, hosts.New(c.Containerd.Hosts).For),
	})
	if err != nil {
		return errors.Join(err, watcher.Close())
	}
	defer func() { err = errors.Join(err, sn.Close(), watcher.Close()) }()

	following, stopFollowing := context.WithCancel(ctx)
	defer stopFollowing()
	go func() { _ = watcher.Run(following) }() // it ends with its context, by whose error

	scm.begin(ctx, c, passed, sn.PromisedNVM)
	defer scm.stop() // before the snapshotter, whose filesystem it is

	text, err := c.Marshal()
	if err != nil {
		return err
	}
	ctl := control.NewServer(withRegions{sn.Control(), scm}, control.Info{Version: version, Address: c.Address, Config: text})
	stopMetrics, err := serveMetrics(c.MetricsAddress, passed, sn, failed)
	if err != nil {
		return err
	}
	defer stopMetrics()
	scm.introduce(ctx)
	// No comparer: containerd's walking differ makes diffs as well as ours would.
	srv.open(snapshotservice.FromSnapshotter(sn), diffservice.FromApplierAndComparer(sn.Applier(), nil))
	start("control", ctl.Serve, operator)
	ctl.SetServing(true)
	if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
		log.G(ctx).WithError(err).Warn("could not tell systemd that the daemon is ready")
	}
	go cri.Remind(following, c.Containerd.Address)
	log.G(ctx).WithFields(log.Fields{"version": version, "address": c.Address, "policy": policy.Name()}).Info("ready")

	select {
	case err = <-failed:
	case <-ctx.Done():
		log.G(ctx).Info("stopping; containers go on")
	}
	_, _ = daemon.SdNotify(false, daemon.SdNotifyStopping)
	// A call that hangs must not keep the daemon from being replaced.
	waiting, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	ctl.Stop(waiting)
	stopped := make(chan struct{})
	// Regions first: a commit that is under way asks containerd, which asks us.
	go func() { scm.stop(); srv.GracefulStop(); close(stopped) }()
	select {
	case <-stopped:
	case <-waiting.Done():
		srv.Stop()
	}
	return err
}
