// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package region

import (
	"encoding/json"
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
		err = stream.CheckSize(r.Size)
	}
	if err != nil {
		return r, fmt.Errorf("read %q: %w", f.Name(), err)
	}
	r.Ref = ref
	return r, nil
}

// writeMeta replaces the metadata in a region's directory. With durable it survives a crash of the machine, else that of the daemon.
func writeMeta(dir string, r Record, durable bool) error {
	r.Version = metaVersion
	b, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode metadata of %s: %w", r.Ref, err)
	}
	path := filepath.Join(dir, "meta")
	f, err := os.OpenFile(path+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil && durable {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err == nil && durable {
		err = syncDir(dir)
	}
	if err != nil {
		return fmt.Errorf("write metadata of %s: %w", r.Ref, err)
	}
	return nil
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
