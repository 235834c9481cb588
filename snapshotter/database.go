// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/placement/tier"
)

const (
	databaseFile = "nhybrid.db"
	// schemaVersion is the layout of our own buckets. containerd's metastore
	// keeps a version of its own in the same file.
	schemaVersion = 1
)

var (
	bucketOwn     = []byte("nhybrid")
	bucketLayers  = []byte("layers")  // snapshot id -> record
	bucketRemoved = []byte("removed") // snapshot id of which files may still stand
	// By digest of an image: JSON of package profile, the same from static
	// analysis, and where a profile came from if not from starts here.
	bucketProfiles    = []byte("profiles")
	bucketPredictions = []byte("predictions")
	bucketOrigins     = []byte("profile-origins")
	keySchema         = []byte("schema")

	// containerd's metastore (core/snapshots/storage), whose sequence gives the ids.
	bucketMetastore = []byte("v1")
	bucketSnapshots = []byte("snapshots")
	bucketParents   = []byte("parents")
)

// record is what the database knows of a snapshot beside containerd's
// metastore. It is keyed by snapshot id, which stays the same on commit.
type record struct {
	Tier      placement.Tier  `json:"tier"`
	Namespace string          `json:"namespace,omitempty"`
	ChainID   string          `json:"chain_id,omitempty"` // of an extraction
	Image     *imageRef       `json:"image,omitempty"`    // the pull that stored it
	Decision  json.RawMessage `json:"decision,omitempty"` // a control.Decision, when storing began

	Boot     string          `json:"boot,omitempty"` // boot id at the time of commit
	Captured bool            `json:"captured,omitempty"`
	Durable  bool            `json:"durable,omitempty"`
	Home     bool            `json:"home,omitempty"`    // all data stand on HDD too
	Homing   string          `json:"homing,omitempty"`  // boot id in which copying them began
	Damaged  string          `json:"damaged,omitempty"` // why it cannot be used
	Repairs  int             `json:"repairs,omitempty"` // how often it was rebuilt
	Usage    snapshots.Usage `json:"usage,omitzero"`
	Data     int64           `json:"data_bytes,omitempty"`
	Files    int64           `json:"files,omitempty"`

	// Mixed: single files of the layer have changed tier. NVMBytes is what
	// stands on NVM since then. The home of such a layer is HDD.
	Mixed    bool  `json:"mixed,omitempty"`
	NVMBytes int64 `json:"nvm_bytes,omitempty"`

	// IDMap is set for the active snapshot of a container in a user namespace.
	UIDMap string `json:"uidmap,omitempty"`
	GIDMap string `json:"gidmap,omitempty"`
	// MaxSize is the quota of the upper directory in bytes, 0 for none.
	MaxSize int64 `json:"max_size,omitempty"`
}

// imageRef names the image that a layer came with.
type imageRef struct {
	Name     string `json:"name,omitempty"`
	Manifest string `json:"manifest"`
	Index    int    `json:"index"`  // of the layer, from the bottom
	Layers   int    `json:"layers"` // in the image
	Digest   string `json:"digest"` // of the layer's blob
	Size     int64  `json:"size"`   // of the layer's blob
}

// database is containerd's snapshot metastore and our own buckets in one bolt
// file on NVM, where an fsync costs microseconds.
type database struct {
	ms   *storage.MetaStore
	path string
}

// openDatabase opens or creates the database. A file of a newer schema is
// refused untouched with ErrFailedPrecondition.
func openDatabase(ctx context.Context, nvm string) (*database, error) {
	d := &database{path: filepath.Join(nvm, databaseFile)}
	ms, err := storage.NewMetaStore(d.path, func(o *bolt.Options) error {
		// Another daemon on the same root holds the file's lock for good.
		o.Timeout = 3 * time.Second
		return nil
	})
	if err != nil {
		return nil, err
	}
	d.ms = ms
	if err := d.checkSchema(ctx); err != nil {
		ms.Close()
		return nil, err
	}
	return d, nil
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
		if err != nil {
			return fmt.Errorf("database %q has an unreadable schema version %q: %w", d.path, own.Get(keySchema), errdefs.ErrFailedPrecondition)
		}
		if v > schemaVersion {
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
		for _, b := range [][]byte{bucketLayers, bucketRemoved, bucketProfiles, bucketPredictions, bucketOrigins} {
			if _, err := own.CreateBucketIfNotExists(b); err != nil {
				return err
			}
		}
		return own.Put(keySchema, []byte(strconv.Itoa(schemaVersion)))
	})
}

func (d *database) view(ctx context.Context, fn func(context.Context, *bolt.Tx) error) error {
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

func getRecord(tx *bolt.Tx, id string) (record, error) {
	var r record
	b := tx.Bucket(bucketOwn).Bucket(bucketLayers).Get([]byte(id))
	if b == nil {
		return r, fmt.Errorf("record of snapshot id %s: %w", id, errdefs.ErrNotFound)
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return r, fmt.Errorf("read record of snapshot id %s: %w", id, err)
	}
	return r, nil
}

func putRecord(tx *bolt.Tx, id string, r record) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return tx.Bucket(bucketOwn).Bucket(bucketLayers).Put([]byte(id), b)
}

// updateRecord changes the record of a snapshot that still exists; a snapshot
// that was removed meanwhile is no error.
func (d *database) updateRecord(ctx context.Context, id string, change func(*record)) error {
	return d.update(ctx, func(_ context.Context, tx *bolt.Tx) error {
		r, err := getRecord(tx, id)
		if err != nil {
			if errdefs.IsNotFound(err) {
				return nil
			}
			return err
		}
		change(&r)
		return putRecord(tx, id, r)
	})
}

// moveToRemoved forgets a snapshot and remembers that its files are to go.
func moveToRemoved(tx *bolt.Tx, id string) error {
	own := tx.Bucket(bucketOwn)
	if err := own.Bucket(bucketLayers).Delete([]byte(id)); err != nil {
		return err
	}
	return own.Bucket(bucketRemoved).Put([]byte(id), []byte{})
}

// removed lists the ids whose files are still to go.
func (d *database) removed(ctx context.Context) (ids []string, err error) {
	err = d.view(ctx, func(_ context.Context, tx *bolt.Tx) error {
		return tx.Bucket(bucketOwn).Bucket(bucketRemoved).ForEach(func(k, _ []byte) error {
			ids = append(ids, string(k))
			return nil
		})
	})
	return ids, err
}

func (d *database) forgetRemoved(ctx context.Context, id string) error {
	return d.update(ctx, func(_ context.Context, tx *bolt.Tx) error {
		return tx.Bucket(bucketOwn).Bucket(bucketRemoved).Delete([]byte(id))
	})
}

// passIDs makes the metastore give out only ids above n from now on.
func (d *database) passIDs(ctx context.Context, n uint64) error {
	return d.update(ctx, func(_ context.Context, tx *bolt.Tx) error {
		v1, err := tx.CreateBucketIfNotExists(bucketMetastore)
		if err != nil {
			return err
		}
		for _, b := range [][]byte{bucketSnapshots, bucketParents} {
			if _, err := v1.CreateBucketIfNotExists(b); err != nil {
				return err
			}
		}
		if b := v1.Bucket(bucketSnapshots); b.Sequence() < n {
			return b.SetSequence(n)
		}
		return nil
	})
}

// snapshot is one entry of the metastore with its record.
type snapshot struct {
	ID   string
	Info snapshots.Info
	record
}

// snapshots lists all snapshots, active and committed, in the order of their keys.
func (d *database) snapshots(ctx context.Context) (all []snapshot, err error) {
	err = d.view(ctx, func(ctx context.Context, tx *bolt.Tx) error {
		return walk(ctx, tx, func(ctx context.Context, info snapshots.Info) error {
			id, _, _, err := storage.GetInfo(ctx, info.Name)
			if err != nil {
				return err
			}
			r, err := getRecord(tx, id)
			if err != nil && !errdefs.IsNotFound(err) {
				return err
			}
			all = append(all, snapshot{ID: id, Info: info, record: r})
			return nil
		})
	})
	return all, err
}

// walk is storage.WalkInfo for a database that may hold nothing yet.
func walk(ctx context.Context, tx *bolt.Tx, fn snapshots.WalkFunc, filters ...string) error {
	if tx.Bucket(bucketMetastore) == nil {
		return nil
	}
	return storage.WalkInfo(ctx, fn, filters...)
}

// lineage lists the snapshots from name downwards: itself first, the bottom last.
func (d *database) lineage(ctx context.Context, name string) (all []snapshot, err error) {
	err = d.view(ctx, func(ctx context.Context, tx *bolt.Tx) error {
		for name != "" {
			id, info, _, err := storage.GetInfo(ctx, name)
			if err != nil {
				return err
			}
			r, err := getRecord(tx, id)
			if err != nil && !errdefs.IsNotFound(err) {
				return err
			}
			all = append(all, snapshot{ID: id, Info: info, record: r})
			name = info.Parent
		}
		return nil
	})
	return all, err
}

// chain lists the ids of a lineage.
func (d *database) chain(ctx context.Context, name string) (ids []string, err error) {
	all, err := d.lineage(ctx, name)
	for _, sn := range all {
		ids = append(ids, sn.ID)
	}
	return ids, err
}

func (d *database) record(ctx context.Context, id string) (r record, err error) {
	err = d.view(ctx, func(_ context.Context, tx *bolt.Tx) error {
		r, err = getRecord(tx, id)
		return err
	})
	return r, err
}

// storedLayers tells the tier of each layer of a namespace, by chain id.
func (s *Snapshotter) storedLayers(ctx context.Context, ns string) (map[string]placement.Tier, error) {
	all, err := s.db.snapshots(ctx)
	if err != nil {
		return nil, err
	}
	stored := map[string]placement.Tier{}
	for _, sn := range all {
		if sn.Info.Kind == snapshots.KindCommitted && sn.namespace() == ns {
			stored[clientKey(sn.Info.Name)] = sn.Tier
		}
	}
	return stored, nil
}
