// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package region

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/scmlib/region/stream"
)

const (
	metaVersion = 1
	maxMeta     = 64 << 10
)

// Record is what is known of a region.
type Record struct {
	Version int `json:"version"`
	Ref
	ID      string    `json:"id"`   // random; another for each region, whatever its name
	Size    int64     `json:"size"` // bytes
	Created time.Time `json:"created"`
	Origin  string    `json:"origin,omitempty"` // what it is a copy of
	// Used is what a snapshot takes of the NVM; other regions take all their size.
	Used int64 `json:"used,omitempty"`
	// Tenant is the namespace whose quota it counts for, if not its own: many tenants have their containers in the one namespace of Kubernetes.
	Tenant string `json:"tenant,omitempty"`
	// Instance tells a container from another of the same id that lived before.
	Instance string `json:"instance,omitempty"`
	// Keep makes a volume of the region when its container is removed.
	Keep bool `json:"keep,omitempty"`
	// Shared lets several containers have a volume at a time.
	Shared bool `json:"shared,omitempty"`
	// Users are the containers that were given it. Those whose process is gone no longer count.
	Users []User `json:"users,omitempty"`

	// Intents, to be finished or undone after a crash.
	Frozen []string `json:"frozen,omitempty"`  // cgroup files by which to thaw
	GrowTo int64    `json:"grow_to,omitempty"` // size it was growing to
}

// User is a container that was given a region.
type User struct {
	Namespace string `json:"namespace"`
	Container string `json:"container"`
	Process
}

// Owner is the namespace whose quota the region counts for.
func (r *Record) Owner() string { return cmp.Or(r.Tenant, r.Namespace) }

func (r *Record) charge() int64 {
	if r.Kind == Snapshot {
		return r.Used
	}
	return max(r.Size, r.GrowTo)
}

// readMeta reads what is known of the region in dir, whose name alone says which region it is: so one rename turns the one into the other.
func readMeta(dir string, ref Ref) (Record, error) {
	var r Record
	f, err := os.Open(filepath.Join(dir, "meta"))
	if err != nil {
		return r, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxMeta))
	if err == nil {
		err = json.Unmarshal(b, &r)
	}
	if err == nil && r.Version != metaVersion {
		err = fmt.Errorf("version %d, this program knows %d: %w", r.Version, metaVersion, errdefs.ErrNotImplemented)
	}
	if err == nil {
		err = r.plausible()
	}
	if err != nil {
		return r, fmt.Errorf("read %q: %w", f.Name(), err)
	}
	r.Ref, r.Users, r.Frozen = ref, nil, nil
	var u use
	if b, err := os.ReadFile(filepath.Join(dir, "use")); err == nil && json.Unmarshal(b, &u) == nil {
		r.Users, r.Frozen = u.Users, u.Frozen
	}
	return r, nil
}

// plausible checks the numbers on which the books rest.
func (r *Record) plausible() error {
	err := stream.CheckSize(r.Size)
	if err == nil && r.GrowTo != 0 {
		err = stream.CheckSize(r.GrowTo)
	}
	if err == nil && r.Tenant != "" {
		err = checkIdentifier("tenant", r.Tenant)
	}
	if err == nil && (r.Used < 0 || r.Used > r.Size) {
		err = fmt.Errorf("%d of %d bytes used: %w", r.Used, r.Size, errdefs.ErrInvalidArgument)
	}
	return err
}

// writeMeta replaces the metadata in a region's directory. It survives a crash of the machine.
func writeMeta(dir string, r Record) error {
	err := writeFile(filepath.Join(dir, "meta.next"), stripped(r), true)
	if err == nil {
		err = os.Rename(filepath.Join(dir, "meta.next"), filepath.Join(dir, "meta"))
	}
	if err == nil {
		err = syncDir(dir)
	}
	if err != nil {
		return fmt.Errorf("write metadata of %s: %w", r.Ref, err)
	}
	return nil
}

func stripped(r Record) Record {
	r.Version, r.Users, r.Frozen = metaVersion, nil, nil
	return r
}

// use is who has a region. It is a file of its own, which is not synced: with the machine, the users end.
type use struct {
	Users  []User   `json:"users,omitempty"`
	Frozen []string `json:"frozen,omitempty"`
}

// writeUse replaces what is known of who has a region. It survives the daemon.
func writeUse(dir string, r Record) error {
	next := filepath.Join(dir, "use.next")
	err := writeFile(next, use{r.Users, r.Frozen}, false)
	if err == nil {
		err = os.Rename(next, filepath.Join(dir, "use"))
	}
	if err != nil {
		return fmt.Errorf("write users of %s: %w", r.Ref, err)
	}
	return nil
}

func writeFile(path string, v any, durable bool) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil && durable {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// reserved is the size of the metadata of a region in the pool: blanks, whose blocks are on the medium, so that metadata written over them needs no
// commit of the journal, which takes longer than all else while a container waits.
const reserved = 4096

// reserveMeta makes a directory ready for claim.
func reserveMeta(dir string) error {
	err := os.WriteFile(filepath.Join(dir, unsure), nil, 0o600)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(dir, "meta"), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(bytes.Repeat([]byte(" "), reserved))
	return errors.Join(err, f.Sync(), f.Close(), syncDir(dir))
}

// claim makes a directory of the pool a region's. It is durable when this returns, though it has not been renamed: see findPool.
func claim(dir string, r Record) error {
	b, err := json.Marshal(stripped(r))
	if err != nil {
		return err
	}
	if len(b) > reserved {
		return fmt.Errorf("metadata of %d bytes: %w", len(b), errdefs.ErrInvalidArgument)
	}
	f, err := os.OpenFile(filepath.Join(dir, "meta"), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(append(b, bytes.Repeat([]byte(" "), reserved-len(b))...), 0)
	if err == nil {
		err = unix.Fdatasync(int(f.Fd()))
	}
	return errors.Join(err, f.Close())
}

// claimed tells whose a directory of the pool is, if anybody's. One that is neither whole nor blank was being claimed when the machine stopped.
func claimed(dir string) (r Record, free bool, err error) {
	b, err := os.ReadFile(filepath.Join(dir, "meta"))
	if err != nil {
		return r, false, err
	}
	if len(bytes.TrimSpace(b)) == 0 {
		return r, len(b) == reserved, nil
	}
	if err = json.Unmarshal(b, &r); err == nil {
		err = r.Ref.check()
	}
	return r, false, err
}

// Mark in a directory: its metadata may never have reached the medium, since nobody was told of the region yet.
const unsure = "new"

// settled makes a region durable that has come to its place, metadata and name together: one commit of the journal.
func settled(dir string) error {
	f, err := os.Open(filepath.Join(dir, "meta"))
	if err != nil {
		return err
	}
	err = errors.Join(f.Sync(), f.Close(), syncDir(filepath.Dir(dir)))
	if err == nil {
		err = os.Remove(filepath.Join(dir, unsure))
	}
	return err
}

func syncDir(dir string) error {
	f, err := os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return fmt.Errorf("sync %q: %w", dir, err)
	}
	return nil
}
