// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/placement/tier"
)

const (
	databaseFile = "nhybrid.db"
	// schemaVersion is the layout of our own buckets. containerd's metastore
	// keeps a version of its own in the same file.
	schemaVersion = 2
)

var (
	bucketOwn       = []byte("nhybrid")
	bucketSnapshots = []byte("snapshots") // snapshot id -> Snapshot
	bucketLayers    = []byte("layers")    // layer id -> Layer; its sequence gives the ids
	bucketRemoved   = []byte("removed")   // snapshot id of which files may still stand
	keySchema       = []byte("schema")

	// By digest of an image: JSON of package profile, the same from static
	// analysis, and where a profile came from if not from starts here.
	BucketProfiles    = []byte("profiles")
	BucketPredictions = []byte("predictions")
	BucketOrigins     = []byte("profile-origins")

	// containerd's metastore (core/snapshots/storage), whose sequence gives the ids.
	bucketMetastore     = []byte("v1")
	bucketMetaSnapshots = []byte("snapshots")
	bucketMetaParents   = []byte("parents")
)

// database is containerd's snapshot metastore and our own buckets in one bolt
// file on NVM, where an fsync costs microseconds.
type database struct {
	path string
	// writing is held by the transaction that writes, of which bolt has one at a time,
	// and until the file is opened anew if that fails.
	writing sync.Mutex
	// mu is held for reading by each transaction, and for writing while the file is
	// opened anew. Nobody waits for the latter by Lock, which would keep readers from
	// beginning: they may hold what a transaction under way wants.
	mu sync.RWMutex
	ms *storage.MetaStore
}

// openDatabase opens or creates the database. A file of another schema is
// refused untouched with ErrFailedPrecondition.
func openDatabase(ctx context.Context, nvm string) (*database, error) {
	d := &database{path: filepath.Join(nvm, databaseFile)}
	if err := d.open(); err != nil {
		return nil, err
	}
	if err := d.checkSchema(ctx); err != nil {
		d.close()
		return nil, err
	}
	return d, nil
}

// open has the next transaction open the file, as the device has it. Pages that could
// not be written must not be written over in the page cache (see fill).
func (d *database) open() (err error) {
	if f, err := os.Open(d.path); err == nil {
		forget(f, 0, 0)
		f.Close()
	}
	d.ms, err = storage.NewMetaStore(d.path, func(o *bolt.Options) error {
		// Another daemon on the same root holds the file's lock for good.
		o.Timeout = 3 * time.Second
		// bbolt maps a file that outgrows its mapping anew, and waits for all read
		// transactions before: the copy on HDD is one. This is address space only.
		o.InitialMmapSize = databaseMapping
		return nil
	})
	return err
}

// reopen goes back to what the device has after a transaction could not be written.
// Called with writing held.
func (d *database) reopen() error {
	for !d.mu.TryLock() {
		time.Sleep(time.Millisecond) // transactions that read are short
	}
	defer d.mu.Unlock()
	return errors.Join(d.ms.Close(), d.open())
}

func (d *database) close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.ms.Close()
}

func (d *database) checkSchema(ctx context.Context) error {
	// The file is opened by its first transaction.
	err := d.view(ctx, func(context.Context, *bolt.Tx) error { return nil })
	if errors.Is(err, bolterrors.ErrTimeout) {
		return fmt.Errorf("open database %q: another process holds it; is a second daemon running on this root? %w", d.path, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return fmt.Errorf("open database %q: %w; move it away, and the copy on the HDD root takes its place: %w", d.path, err, errdefs.ErrDataLoss)
	}
	err = d.view(ctx, func(_ context.Context, tx *bolt.Tx) error {
		own := tx.Bucket(bucketOwn)
		if own == nil {
			return nil
		}
		v, err := strconv.Atoi(string(own.Get(keySchema)))
		switch {
		case err != nil:
			return fmt.Errorf("database %q has an unreadable schema version %q: %w", d.path, own.Get(keySchema), errdefs.ErrFailedPrecondition)
		case v < schemaVersion:
			return fmt.Errorf("database %q is of an older form of the store (schema %d, this daemon needs %d); remove the images with the nhybrid that wrote it, or move both roots away: %w",
				d.path, v, schemaVersion, errdefs.ErrFailedPrecondition)
		case v > schemaVersion:
			return fmt.Errorf("database %q has schema version %d, this daemon knows up to %d; run the newer nhybrid that wrote it: %w",
				d.path, v, schemaVersion, errdefs.ErrFailedPrecondition)
		}
		return nil
	})
	if err != nil {
		return err
	}
	return d.update(ctx, func(_ context.Context, tx *bolt.Tx) error {
		own, err := tx.CreateBucketIfNotExists(bucketOwn)
		if err != nil {
			return err
		}
		for _, b := range [][]byte{bucketSnapshots, bucketLayers, bucketRemoved, BucketProfiles, BucketPredictions, BucketOrigins} {
			if _, err := own.CreateBucketIfNotExists(b); err != nil {
				return err
			}
		}
		return own.Put(keySchema, []byte(strconv.Itoa(schemaVersion)))
	})
}

func (d *database) view(ctx context.Context, fn func(context.Context, *bolt.Tx) error) error {
	d.mu.RLock()
	defer d.mu.RUnlock()
	ctx, t, err := d.ms.TransactionContext(ctx, false)
	if err != nil {
		return err
	}
	err = fn(ctx, boltTx(t))
	return errors.Join(err, t.Rollback())
}

// boltTx is the transaction behind containerd's metastore, which is a bolt
// transaction by construction: the buckets of both live in one file.
func boltTx(t storage.Transactor) *bolt.Tx { return t.(*bolt.Tx) } //nolint:forcetypeassert // see above

func (d *database) update(ctx context.Context, fn func(context.Context, *bolt.Tx) error) error {
	d.writing.Lock()
	defer d.writing.Unlock()
	err := d.transact(ctx, fn)
	if errors.Is(err, unix.EIO) {
		log.G(ctx).WithError(err).WithField("database", d.path).Error("the database could not be written; it is opened anew")
		err = errors.Join(err, d.reopen())
	}
	return err
}

func (d *database) transact(ctx context.Context, fn func(context.Context, *bolt.Tx) error) error {
	d.mu.RLock()
	defer d.mu.RUnlock()
	ctx, t, err := d.ms.TransactionContext(ctx, true)
	if err != nil {
		return err
	}
	if err := fn(ctx, boltTx(t)); err != nil {
		return errors.Join(err, t.Rollback())
	}
	return t.Commit()
}

// copyTo writes a consistent copy of the database to path, synced and renamed
// into place, while the daemon goes on.
func (d *database) copyTo(ctx context.Context, path string) error {
	err := tier.WriteFile(path, func(f *os.File) error {
		return d.view(ctx, func(_ context.Context, tx *bolt.Tx) error {
			_, err := tx.WriteTo(f)
			return err
		})
	})
	if err != nil {
		return fmt.Errorf("copy database to %q: %w", path, err)
	}
	return nil
}

// databaseMapping is the size up to which the database grows without being mapped
// anew, in bytes.
const databaseMapping = 1 << 30

// databaseBallast is the space on NVM that the database keeps for its growth,
// in bytes: containers may fill the rest, and must still be removable then.
const databaseBallast = 8 << 20

// ballast gives the file blocks beyond its end, which later writes take.
func (d *database) ballast(bytes int64) error {
	f, err := os.OpenFile(d.path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, bytes)
}

func own(tx *bolt.Tx, bucket []byte) *bolt.Bucket { return tx.Bucket(bucketOwn).Bucket(bucket) }

func getJSON(b *bolt.Bucket, key, what string, into any) error {
	v := b.Get([]byte(key))
	if v == nil {
		return fmt.Errorf("record of %s %s: %w", what, key, errdefs.ErrNotFound)
	}
	if err := json.Unmarshal(v, into); err != nil {
		return fmt.Errorf("read record of %s %s: %w: %w", what, key, err, errdefs.ErrDataLoss)
	}
	return nil
}

func putJSON(b *bolt.Bucket, key string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return b.Put([]byte(key), data)
}

// GetSnapshot reads the record of a snapshot.
func GetSnapshot(tx *bolt.Tx, id string) (sn Snapshot, err error) {
	return sn, getJSON(own(tx, bucketSnapshots), id, "snapshot id", &sn)
}

// PutSnapshot writes the record of a snapshot. Layer is changed by Bind alone.
func PutSnapshot(tx *bolt.Tx, id string, sn Snapshot) error {
	return putJSON(own(tx, bucketSnapshots), id, sn)
}

func getLayer(tx *bolt.Tx, id LayerID) (l Layer, err error) {
	err = getJSON(own(tx, bucketLayers), id.String(), "layer", &l)
	l.ID = id
	return l, err
}

func putLayer(tx *bolt.Tx, l Layer) error { return putJSON(own(tx, bucketLayers), l.ID.String(), l) }

// removed lists the ids whose files are still to go.
func (d *database) removed(ctx context.Context) (ids []string, err error) {
	err = d.view(ctx, func(_ context.Context, tx *bolt.Tx) error {
		return own(tx, bucketRemoved).ForEach(func(k, _ []byte) error {
			ids = append(ids, string(k))
			return nil
		})
	})
	return ids, err
}

func (d *database) forgetRemoved(ctx context.Context, id string) error {
	return d.update(ctx, func(_ context.Context, tx *bolt.Tx) error {
		return own(tx, bucketRemoved).Delete([]byte(id))
	})
}

// passIDs makes the metastore give out only snapshot ids above n, and the store
// only layer ids above layer, from now on: bolt counts inside the transaction,
// so that one that was not committed leaves its id to the next.
func (d *database) passIDs(ctx context.Context, n, layer uint64) error {
	return d.update(ctx, func(_ context.Context, tx *bolt.Tx) error {
		v1, err := tx.CreateBucketIfNotExists(bucketMetastore)
		if err != nil {
			return err
		}
		for _, b := range [][]byte{bucketMetaSnapshots, bucketMetaParents} {
			if _, err := v1.CreateBucketIfNotExists(b); err != nil {
				return err
			}
		}
		if b := own(tx, bucketLayers); b.Sequence() < layer {
			if err := b.SetSequence(layer); err != nil {
				return err
			}
		}
		if b := v1.Bucket(bucketMetaSnapshots); b.Sequence() < n {
			return b.SetSequence(n)
		}
		return nil
	})
}

// walk is storage.WalkInfo for a database that may hold nothing yet.
func walk(ctx context.Context, tx *bolt.Tx, fn snapshots.WalkFunc, filters ...string) error {
	if tx.Bucket(bucketMetastore) == nil {
		return nil
	}
	return storage.WalkInfo(ctx, fn, filters...)
}

func entry(ctx context.Context, tx *bolt.Tx, name string) (e Entry, err error) {
	e.ID, e.Info, _, err = storage.GetInfo(ctx, name)
	if err != nil {
		return e, err
	}
	if e.Snapshot, err = GetSnapshot(tx, e.ID); err != nil && !errdefs.IsNotFound(err) {
		return e, err
	}
	if e.Info.Kind == snapshots.KindCommitted && e.Layer != 0 {
		l, err := getLayer(tx, e.Layer)
		if err != nil && !errdefs.IsNotFound(err) {
			return e, err
		}
		if err == nil {
			e.Of = &l
		}
	}
	return e, nil
}

// Entries lists all snapshots, active and committed, in the order of their keys.
func (s *Store) Entries(ctx context.Context) (all []Entry, err error) {
	err = s.db.view(ctx, func(ctx context.Context, tx *bolt.Tx) error {
		return walk(ctx, tx, func(ctx context.Context, info snapshots.Info) error {
			e, err := entry(ctx, tx, info.Name)
			if err == nil {
				all = append(all, e)
			}
			return err
		})
	})
	return all, err
}

// Walk is [snapshots.Snapshotter.Walk].
func (s *Store) Walk(ctx context.Context, fn snapshots.WalkFunc, filters ...string) error {
	return s.db.view(ctx, func(ctx context.Context, tx *bolt.Tx) error { return walk(ctx, tx, fn, filters...) })
}

// Lineage lists the snapshots from name downwards: itself first, the bottom last.
func (s *Store) Lineage(ctx context.Context, name string) (all []Entry, err error) {
	err = s.db.view(ctx, func(ctx context.Context, tx *bolt.Tx) error {
		for name != "" {
			e, err := entry(ctx, tx, name)
			if err != nil {
				return err
			}
			all = append(all, e)
			name = e.Info.Parent
		}
		return nil
	})
	return all, err
}

// ViewTx runs fn in a read transaction; the context carries it for containerd's metastore.
func (s *Store) ViewTx(ctx context.Context, fn func(context.Context, *bolt.Tx) error) error {
	return s.db.view(ctx, fn)
}

// UpdateTx runs fn in a write transaction and has the copy on HDD follow.
func (s *Store) UpdateTx(ctx context.Context, fn func(context.Context, *bolt.Tx) error) error {
	err := s.db.update(ctx, fn)
	if err == nil {
		s.mirror.changed()
	}
	return err
}

// Profiles is a bucket of the database for package profile, in a transaction.
func Profiles(tx *bolt.Tx, bucket []byte) *bolt.Bucket { return own(tx, bucket) }
