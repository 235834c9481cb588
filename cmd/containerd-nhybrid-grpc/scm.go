// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/cmd/internal/config"
	"github.com/nhybrid/nhybrid/internal/hosts"
	"github.com/nhybrid/nhybrid/scmlib/region"
	"github.com/nhybrid/nhybrid/scmlib/region/api"
	"github.com/nhybrid/nhybrid/scmlib/region/ctrd"
	"github.com/nhybrid/nhybrid/scmlib/region/nri"
	"github.com/nhybrid/nhybrid/scmlib/region/registry"
	"github.com/nhybrid/nhybrid/snapshotter/control"
)

// regions serves persistent memory to containers, beside the snapshotter: whatever fails here is a warning, and images go on.
type regions struct {
	cdi  *region.CDI // nil: none is asked for
	nri  *nri.Plugin // nil: likewise
	stop func()
	// books is the store for who must not wait: it stays after the end.
	books atomic.Pointer[region.Store]

	mu      sync.Mutex
	store   *region.Store
	volumes *volumes
	failed  error // why none are served
	spec    error // why there is no CDI specification, or an old one
	client  *client.Client
}

// patience is how long the daemon waits for work that was told to end.
const patience = 10 * time.Second

// introduction is how long containerd may take to hear of the plugin of NRI before its other calls are answered: as long as it waits for a plugin itself.
const introduction = 2 * time.Second

// begin never fails: see warnings. layers tells what of NVM is promised to them.
func (r *regions) begin(ctx context.Context, c config.Config, passed sockets, layers func() int64) {
	if !c.SCM.Enabled && passed[c.SCM.Address] == nil {
		return
	}
	l, err := passed.listen(c.SCM.Address)
	if err != nil {
		r.fail(ctx, err)
		return
	}
	reason := errors.New("regions are turned off (scm.enabled)")
	if c.SCM.Enabled {
		if err := r.start(ctx, c, layers, l); err == nil {
			return
		} else {
			r.fail(ctx, err)
			reason = errors.New(api.NotServed + err.Error())
		}
	}
	// The socket may stand whatever we do: who asks is answered.
	running, cancel := context.WithCancel(ctx)
	var work sync.WaitGroup
	work.Go(func() {
		if err := region.Refusal(reason).Serve(running, l); err != nil && running.Err() == nil {
			log.G(ctx).WithError(err).Warn("regions")
		}
	})
	r.stop = sync.OnceFunc(func() { cancel(); work.Wait() })
}

// held is what layers have to leave to regions on an NVM of total bytes. It waits for nothing but a look at the books: see region.Options.Others.
func (r *regions) held(c config.Config, total int64) int64 {
	if !c.SCM.Enabled {
		return 0
	}
	if s := r.books.Load(); s != nil {
		return s.Held()
	}
	return c.SCM.Reserve.Of(total) // what regions have of it is not known
}

func (r *regions) fail(ctx context.Context, err error) {
	log.G(ctx).WithError(err).Error("regions are not served; images are not concerned")
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failed = err
}

func (r *regions) start(ctx context.Context, c config.Config, layers func() int64, l net.Listener) (err error) {
	connect := func() (*client.Client, error) { return r.containerd(c.Containerd.Address) }
	o, err := options(c)
	if err != nil {
		return err
	}
	o.Identify, o.Others = ctrd.Identify(connect), layers
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find own program: %w", err)
	}
	if c.SCM.CDISpec != "" {
		sizes := append(region.DefaultSizes(), slices.Collect(maps.Keys(o.Pool))...)
		slices.Sort(sizes)
		r.cdi = &region.CDI{Path: c.SCM.CDISpec, Hook: c.SCM.HookPath(self), Socket: c.SCM.Address, Sizes: slices.Compact(sizes), Kind: c.SCM.CDIKind}
		o.Volumes = func(names []string) { r.writeSpec(ctx, names) }
	}
	known, writeSpec := newVolumes(c.Root, filepath.Join(c.NVMRoot, "r")), o.Volumes
	o.Volumes = func(names []string) {
		known.told(ctx, names)
		if writeSpec != nil {
			writeSpec(names)
		}
	}
	spool, err := spool(c.Root)
	if err != nil {
		return err
	}
	store, err := region.Open(ctx, filepath.Join(c.NVMRoot, "r"), o)
	if err != nil {
		return err
	}
	srv := region.NewServer(store)
	srv.Handle(ctrd.OpCommit, ctrd.Handler(connect, store))
	registry.Handle(srv, store, registry.Remote{Spool: spool, Via: hosts.New(c.Containerd.Hosts).For})

	running, cancel := context.WithCancel(ctx)
	var work sync.WaitGroup
	work.Go(func() { ctrd.Watch(running, connect, store) })
	work.Go(func() {
		if err := srv.Serve(running, l); err != nil && running.Err() == nil {
			r.fail(ctx, err)
		}
	})
	plugin := nri.New(nri.Config{Socket: c.SCM.NRISocket, Hook: c.SCM.HookPath(self), Daemon: c.SCM.Address, Foresee: store.Foresee})
	r.mu.Lock()
	r.store = store
	r.volumes = known
	r.books.Store(store)
	if c.SCM.NRI {
		r.nri = plugin
		work.Go(func() { plugin.Run(running) })
	}
	r.mu.Unlock()
	r.stop = sync.OnceFunc(func() {
		cancel()
		done := make(chan struct{})
		go func() { work.Wait(); close(done) }()
		select {
		case <-done:
			if err := r.close(); err != nil {
				log.G(ctx).WithError(err).Warn("regions")
			}
		case <-time.After(patience): // the store's lock goes with the process
			log.G(ctx).Warn("work on a region does not end; the next start finishes or undoes it")
		}
	})
	return nil
}

// introduce waits until containerd knows of the plugin, or cannot know: a container that is created before would have no region, and nobody to refuse it.
func (r *regions) introduce(ctx context.Context) {
	r.mu.Lock()
	plugin := r.nri
	r.mu.Unlock()
	if plugin == nil {
		return
	}
	late := time.NewTimer(introduction)
	defer late.Stop()
	select {
	case <-plugin.Tried():
	case <-late.C: // containerd may be waiting for us with another plugin
	case <-ctx.Done():
	}
}

// options are those of the store, on the NVM that there is.
func options(c config.Config) (o region.Options, err error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(c.NVMRoot, &fs); err != nil {
		return o, fmt.Errorf("ask for the size of NVM at %q: %w", c.NVMRoot, err)
	}
	total := int64(fs.Blocks) * fs.Bsize
	o = region.Options{
		// Regions keep to the reserve as layers do: what it is there for is not theirs either.
		Limit: c.SCM.Limit.Of(total), Reserve: c.SCM.Reserve.Of(total), Headroom: c.Placement.NVMReserve.Of(total),
		Quota: region.Quota{Bytes: c.SCM.Quota.Of(total), Regions: c.SCM.Regions},
		Rate:  int64(c.SCM.Rate), Keep: c.SCM.Keep,
	}
	if o.Limit > 0 && o.Reserve > o.Limit {
		return o, fmt.Errorf("scm.reserve is %s of this NVM and scm.limit %s: what is kept for regions cannot be more than they may have", c.SCM.Reserve, c.SCM.Limit)
	}
	if o.Reserve > total-o.Headroom {
		return o, fmt.Errorf("scm.reserve is %s of this NVM and placement.nvm_reserve %s, together more than it has: nothing would be left for images", c.SCM.Reserve, c.Placement.NVMReserve)
	}
	if o.Quotas, err = c.SCM.QuotaOf(total); err != nil {
		return o, err
	}
	o.Pool, err = c.SCM.PoolOf()
	return o, err
}

// spool is where regions wait on their way to a registry: on the HDD, since /tmp is memory on many machines. What a crash has left is removed.
func spool(root string) (string, error) {
	dir := filepath.Join(root, "spool")
	if err := errors.Join(os.RemoveAll(dir), os.Mkdir(dir, 0o700)); err != nil {
		return "", fmt.Errorf("make directory for regions on their way: %w", err)
	}
	return dir, nil
}

// containerd gives the one client for regions. It connects at the first call, again whenever that is needed.
func (r *regions) containerd(address string) (*client.Client, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.client == nil {
		c, err := client.New(address)
		if err != nil {
			return nil, fmt.Errorf("connect to containerd at %q: %w", address, err)
		}
		r.client = c
	}
	return r.client, nil
}

func (r *regions) close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	err := r.store.Close()
	r.store = nil
	if r.client != nil {
		err = errors.Join(err, r.client.Close())
	}
	return err
}

// writeSpec keeps the specification as it was where the hook is missing: a device that cannot be brought is worse than none.
func (r *regions) writeSpec(ctx context.Context, volumes []string) {
	err := unix.Access(r.cdi.Hook, unix.X_OK)
	if err != nil {
		err = fmt.Errorf("%q cannot be run: %w; install it, or set scm.hook, or set scm.cdi_spec = \"\"", r.cdi.Hook, err)
	} else {
		err = r.cdi.Write(volumes)
	}
	if err != nil {
		log.G(ctx).WithError(err).Warn("containers cannot ask for regions")
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.spec = err
}

// warnings are for who looks after the daemon.
func (r *regions) warnings() (all []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.failed != nil {
		all = append(all, api.NotServed+r.failed.Error()+"; mend that, and restart the daemon: no container notices")
	}
	if r.spec != nil {
		all = append(all, fmt.Sprintf("containers cannot ask for regions: %v", r.spec))
	}
	if r.nri != nil {
		if err := r.nri.Failed(); err != nil {
			all = append(all, fmt.Sprintf("annotations of pods ask for regions in vain: %v", err))
		}
		if err := r.nri.Without(); err != nil {
			all = append(all, err.Error())
		}
	}
	if r.volumes != nil {
		all = append(all, r.volumes.warnings()...)
	}
	if r.store != nil {
		problems := r.store.Problems()
		for _, key := range slices.Sorted(maps.Keys(problems)) {
			all = append(all, problems[key].Error())
		}
	}
	return all
}

// withRegions adds what is to be said of regions to what the snapshotter says.
type withRegions struct {
	control.Backend
	regions *regions
}

// Status implements [control.Backend].
func (b withRegions) Status(ctx context.Context) (*control.StatusResponse, error) {
	s, err := b.Backend.Status(ctx)
	if err == nil {
		s.Warnings = append(s.Warnings, b.regions.warnings()...)
	}
	return s, err
}
