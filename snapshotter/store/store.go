// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package store keeps the layers of images on two tiers (docs/store.md): packs
// on HDD, single files on NVM, and the views that containers mount. It owns the
// database, the life of each layer, syncing, recovery, and what is deleted.
//
// It knows containerd's metastore, since snapshots and layers share one
// database, and nothing else of containerd. What it needs to know of pulls and
// starts it is told through [Traffic].
//
// Durability: what a method reports as done survives the death of the daemon.
// It survives a power cut once the layer is [Durable].
//
// Locks, in this order: a layer's run lock, syncs.mu, Store.mu. The database is
// never asked for a write transaction with Store.mu held.
package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/placement/tier"
	"github.com/nhybrid/nhybrid/snapshotter/host"
)

// Blobs tells where the bytes of a layer come from.
type Blobs interface {
	// ContentRoot is the directory in which containerd keeps its blobs, "" if it is
	// not known or cannot be read from here.
	ContentRoot(ctx context.Context) string
	// Provider reads blobs of a namespace by containerd's API.
	Provider(ctx context.Context, namespace string) (content.Provider, error)
	// Subscribe returns a channel that is sent to after something has arrived in a
	// namespace, and a function that ends the subscription.
	Subscribe(namespace string) (<-chan struct{}, func())
	// Fetch opens a blob in the registry of an image that has it, in one of the
	// namespaces. image is that image, on failure the one that was tried; "" if no
	// image has the blob, which is ErrNotFound.
	Fetch(ctx context.Context, namespaces []string, blob ocispec.Descriptor) (r io.ReadCloser, image string, err error)
}

// Traffic tells what the devices are wanted for by others. Its methods must be quick.
type Traffic interface {
	// Pulling reports whether the layers of an image are arriving.
	Pulling() bool
	// Starting reports whether the start of a container is under way.
	Starting() bool
}

// Config is what a Store needs to know. Root and NVMRoot have no defaults.
type Config struct {
	Root    string // HDD tier, absolute
	NVMRoot string // NVM tier, absolute
	// State holds mount points, best on a tmpfs; default: run below Root.
	State string
	// Reserve tells how many bytes of an NVM filesystem of the given size
	// stay free of layers. nil keeps 5 %.
	Reserve func(total int64) int64
	// ReserveInodes tells how many inodes of an NVM filesystem of so many bytes and
	// inodes stay free of layers. nil keeps 5 %.
	ReserveInodes func(total, inodes int64) int64
	Workers       int     // of background work; default 2
	Unpacks       int     // layers unpacked at a time, those left out that wait for their downloads; default 4
	HDDRate       float64 // bytes/s at which the HDD takes packs; 0: as measured
	// MostBytes bounds the uncompressed bytes of one layer; 0: no bound but that of package unpack.
	MostBytes int64
	// MostMetadata bounds the memory for names and attributes of one layer; 0: likewise.
	MostMetadata int64
	WriteBack    bool // fill the holes of packs in the background
	// WriteBackRate bounds that, in bytes/s; 0 does not.
	WriteBackRate int64
	// Grace is how long a layer that no snapshot ever used is kept; default 10 minutes.
	Grace time.Duration
	// BootID tells boots of the machine apart; default: the kernel's.
	BootID  string
	Blobs   Blobs   // nil: no layer is unpacked, or unpacked anew
	Traffic Traffic // nil: none
}

// Store is the store of one pair of roots. All methods may be called from
// several goroutines at once.
type Store struct {
	config    Config
	features  host.Features
	Tiers     *tier.Store
	db        *database
	mirror    *mirror
	jobs      *jobs
	exec      *executor
	syncs     syncs
	flusher   *flusher
	Rates     *Rates
	Quota     *quotas
	views     *views
	metaCache metaCache

	ctx  context.Context
	stop context.CancelFunc
	wg   sync.WaitGroup

	mu sync.Mutex
	// nvmFailures counts the syncs of NVM that failed. Each concerns all layers of
	// which files were written since the sync before it, in whatever state.
	nvmFailures int
	layers      map[LayerID]*layer
	byBlob      map[string]LayerID // blob digest -> layer, those that are not damaged for good
	places      chan struct{}      // one for each unpacking that computes
	fetches     chan struct{}      // one for each blob that is fetched again
	onEvent     func(LayerID, Layer)
	closing     bool
}

// Open opens the store and takes up what an earlier run left to do. It returns
// before that work is done. changed, which may be nil, is called after the
// record of a layer has changed; it must not call the store.
//
// Errors: those of [tier.Open]; ErrFailedPrecondition for a database of another
// version; ErrUnavailable-classed errors where the kernel lacks something.
func Open(ctx context.Context, c Config, changed func(LayerID, Layer)) (_ *Store, err error) {
	if err := c.complete(); err != nil {
		return nil, err
	}
	s := &Store{config: c, layers: map[LayerID]*layer{}, byBlob: map[string]LayerID{}, places: make(chan struct{}, c.Unpacks), fetches: make(chan struct{}, fetches), onEvent: changed}
	s.ctx, s.stop = context.WithCancel(context.Background())
	if s.Tiers, err = tier.Open(c.Root, c.NVMRoot, c.State); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Tiers.Close())
		}
	}()
	if s.Tiers.SameFilesystem() {
		log.G(ctx).Warnf("root %q and nvm_root %q stand on one filesystem: placement has no effect; give NVM a filesystem of its own", c.Root, c.NVMRoot)
	}
	if err := s.makeDirs(); err != nil {
		return nil, err
	}
	if s.features, err = s.probe(ctx); err != nil {
		return nil, err
	}
	if err := s.restoreDatabase(ctx); err != nil {
		return nil, err
	}
	if s.db, err = openDatabase(ctx, s.Tiers.Root(placement.NVM)); err != nil {
		return nil, err
	}
	if _, total, err := s.Tiers.Space(placement.NVM); err == nil {
		if err := s.db.ballast(min(databaseBallast, total/4)); err != nil {
			log.G(ctx).WithError(err).Debug("cannot reserve space for the database")
		}
	}
	if s.Rates, err = loadRates(ctx, s.db, c.HDDRate); err != nil {
		return nil, errors.Join(err, s.db.close())
	}
	s.jobs = newJobs(c.Workers)
	s.Quota = newQuotas(ctx, s.Tiers)
	s.flusher = newFlusher(s.Rates)
	s.views = newViews(s)
	s.mirror = newMirror(s.db, s.path(databaseFile), func() bool { _, busy := s.Busy(); return busy })
	s.exec = newExecutor(s)
	if err := s.recover(ctx); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

func (c *Config) complete() error {
	if c.Workers == 0 {
		c.Workers = 2
	}
	if c.Unpacks == 0 {
		c.Unpacks = 4
	}
	if c.Grace == 0 {
		c.Grace = 10 * time.Minute
	}
	if c.Reserve == nil {
		c.Reserve = func(total int64) int64 { return total / 20 }
	}
	if c.ReserveInodes == nil {
		c.ReserveInodes = func(_, inodes int64) int64 { return inodes / 20 }
	}
	if c.State == "" {
		c.State = filepath.Join(c.Root, "run")
	}
	if c.BootID == "" {
		b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
		if err != nil {
			return fmt.Errorf("read the boot id: %w", err)
		}
		c.BootID = strings.TrimSpace(string(b))
	}
	return nil
}

// makeDirs makes the directories of the store, and refuses what is none.
func (s *Store) makeDirs() error {
	nvm := s.Tiers.Root(placement.NVM)
	for _, dir := range []string{
		s.path("p"), s.path("v"), filepath.Join(nvm, "v"), filepath.Join(nvm, "parts"),
		s.StatePath("v"), s.StatePath(idmappedDir), s.StatePath(unmappedDir), s.StatePath(emptyDir), s.StatePath("p"),
	} {
		if err := os.Mkdir(dir, 0o711); err != nil && !errors.Is(err, os.ErrExist) {
			return fmt.Errorf("create %q: %w", dir, err)
		}
		if st, err := os.Lstat(dir); err != nil || !st.IsDir() {
			return fmt.Errorf("%q is not a directory; remove it or choose another root: %w", dir, errdefs.ErrFailedPrecondition)
		}
	}
	if err := s.linkTrees(); err != nil {
		return fmt.Errorf("link the directories of views: %w", err)
	}
	return nil
}

// probe asks the kernel what it can do, once, by trial mounts on NVM, or on
// HDD where NVM has no room for them.
func (s *Store) probe(ctx context.Context) (f host.Features, err error) {
	image := host.Image()
	for _, t := range tier.Tiers {
		if f, err = host.Probe(s.Tiers.Root(t), image); err == nil {
			break
		}
		log.G(ctx).WithError(err).Debugf("trial mounts on %s", t)
	}
	if err != nil {
		return f, err
	}
	if err := f.Check(); err != nil {
		return f, err
	}
	log.G(ctx).WithField("features", fmt.Sprintf("%+v", f)).Debug("kernel probed")
	return f, nil
}

// path is a path below the HDD root.
func (s *Store) path(elem ...string) string {
	return filepath.Join(append([]string{s.Tiers.Root(placement.HDD)}, elem...)...)
}

// StatePath is a path below the state directory.
func (s *Store) StatePath(elem ...string) string {
	return filepath.Join(append([]string{s.Tiers.State()}, elem...)...)
}

// PackPath is where the pack of a layer stands.
func (s *Store) PackPath(id LayerID) string { return s.path("p", id.String()+".erofs") }

// Features is what the kernel can do.
func (s *Store) Features() host.Features { return s.features }

// Reserve is how many bytes stay free of layers on an NVM of the given size.
func (s *Store) Reserve(total int64) int64 { return s.config.Reserve(total) }

// DatabasePath is where the database of a tier stands: on NVM itself, on HDD its copy.
func (s *Store) DatabasePath(t placement.Tier) string {
	if t == placement.NVM {
		return s.db.path
	}
	return s.path(databaseFile)
}

// Busy reports whether a pull or a start is under way, and which.
func (s *Store) Busy() (reason string, busy bool) {
	switch t := s.config.Traffic; {
	case t == nil:
		return "", false
	case t.Pulling():
		return "a pull is being stored", true
	case t.Starting():
		return "a container is starting", true
	}
	return "", false
}

// TrafficChanged tells that a pull or a start is over: what waited for that goes on.
func (s *Store) TrafficChanged() { s.exec.resume() }

// FlushDatabase returns when the copy of the database on HDD has all changes
// that were made before the call.
func (s *Store) FlushDatabase(ctx context.Context) error { return s.mirror.flush(ctx) }

// Close ends the background work and closes the database. Nothing is unmounted
// and nothing deleted: containers go on. It may be called twice.
func (s *Store) Close() error {
	s.mu.Lock()
	if s.closing {
		s.mu.Unlock()
		return nil
	}
	s.closing = true
	s.mu.Unlock()
	s.stop()
	// Copy the database first: the rest may take long enough for the service
	// manager to kill the daemon.
	if err := s.db.copyTo(context.Background(), s.path(databaseFile)); err != nil {
		log.L.WithError(err).Warn("the copy of the database on HDD is out of date")
	}
	s.exec.close()
	s.wg.Wait()
	s.syncAll(context.Background()) // a machine that goes down in order loses nothing
	s.jobs.close()
	s.flusher.close()
	s.closePacks()
	s.Rates.save(context.Background())
	return errors.Join(s.mirror.close(), s.db.close(), s.Tiers.Close())
}

func descriptor(l Layer) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: l.MediaType, Digest: l.Blob, Size: l.Size}
}
