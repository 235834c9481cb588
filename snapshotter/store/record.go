// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package store

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/nhybrid/nhybrid/placement"
)

// LayerID numbers the layers of a store. Numbers are never given out twice.
type LayerID uint64

// String is the number in decimal, the name of the layer on the tiers.
func (id LayerID) String() string { return strconv.FormatUint(uint64(id), 10) }

// ParseLayerID is the inverse of [LayerID.String].
func ParseLayerID(s string) (LayerID, error) {
	if id, ok := parseLayer(s); ok {
		return id, nil
	}
	return 0, fmt.Errorf("%q is not the number of a layer: %w", s, errdefs.ErrInvalidArgument)
}

// State is how far a layer has come (docs/store.md, section 4).
type State string

// The states, in order.
const (
	Unpacking State = "unpacking" // bytes arrive; nothing is valid
	Staged    State = "staged"    // committed by path, not packed yet
	Stored    State = "stored"    // whole on the two tiers together; a power cut costs it
	Durable   State = "durable"   // every byte is on a device; the pack may have holes
	Home      State = "home"      // the pack is whole
)

// Valid reports whether a layer in this state can be read.
func (s State) Valid() bool { return s == Stored || s == Durable || s == Home }

// Layer is what the database knows of a layer.
type Layer struct {
	ID    LayerID `json:"-"`
	State State   `json:"state"`
	// Damaged is why the layer cannot be read, "" if it can.
	Damaged string `json:"damaged,omitempty"`
	Repairs int    `json:"repairs,omitempty"` // how often it was unpacked anew
	// Users counts the snapshots that refer to the layer. Used: there was one.
	Users int  `json:"users,omitempty"`
	Used  bool `json:"used,omitempty"`

	// Where it came from. A layer without Blob came by path.
	Namespace string        `json:"namespace,omitempty"` // of the content store that has the blob
	Blob      digest.Digest `json:"blob,omitempty"`
	MediaType string        `json:"media_type,omitempty"`
	Size      int64         `json:"size,omitempty"` // bytes of the blob
	DiffID    digest.Digest `json:"diff_id,omitempty"`

	// Snapshot and Tier say where the staging directory of a layer in state Staged stands.
	// Parents are the layers below it, bottom first, to which its files may refer.
	Snapshot string         `json:"snapshot,omitempty"`
	Tier     placement.Tier `json:"tier,omitempty"`
	Parents  []LayerID      `json:"parents,omitempty"`

	Boot    string          `json:"boot,omitempty"` // boot id when it was stored
	Created time.Time       `json:"created,omitzero"`
	Usage   snapshots.Usage `json:"usage,omitzero"`
	Tar     int64           `json:"tar,omitempty"`   // bytes of the uncompressed tar
	Data    int64           `json:"data,omitempty"`  // bytes of the data files
	Files   int64           `json:"files,omitempty"` // data files
	Pack    int64           `json:"pack,omitempty"`  // bytes of the pack
	Holes   int64           `json:"holes,omitempty"` // bytes of the pack that were holes when it was written
	NVM     int64           `json:"nvm,omitempty"`   // bytes on NVM, as last counted
	// Decision is a control.Decision: why its bytes went where they went.
	Decision json.RawMessage `json:"decision,omitempty"`
}

// HDD is how many bytes of the layer stand on HDD.
func (l *Layer) HDD() int64 {
	if l.State == Home {
		return l.Pack
	}
	return max(0, l.Pack-l.Holes)
}

// Snapshot is what the database knows of a snapshot beside containerd's
// metastore, by snapshot id, which stays the same on commit.
type Snapshot struct {
	// Key by which the snapshot was prepared.
	Key string `json:"key,omitempty"`
	// Tier of the writable directory of an active snapshot.
	Tier placement.Tier `json:"tier"`
	// Layer is that of a committed snapshot, or the one that Apply has bound to an
	// extraction; 0 for none.
	Layer     LayerID   `json:"layer,omitempty"`
	Namespace string    `json:"namespace,omitempty"`
	ChainID   string    `json:"chain_id,omitempty"` // of an extraction
	Image     *ImageRef `json:"image,omitempty"`    // the pull that stored it
	// IDMaps are set for the active snapshot of a container in a user namespace.
	UIDMap string `json:"uidmap,omitempty"`
	GIDMap string `json:"gidmap,omitempty"`
	// MaxSize is the quota of the writable directory in bytes, 0 for none.
	MaxSize int64 `json:"max_size,omitempty"`
}

// ImageRef names the image that a layer came with.
type ImageRef struct {
	Name     string `json:"name,omitempty"`
	Manifest string `json:"manifest"`
	Index    int    `json:"index"`  // of the layer, from the bottom
	Layers   int    `json:"layers"` // in the image
	Digest   string `json:"digest"` // of the layer's blob
	Size     int64  `json:"size"`   // of the layer's blob
}

// Entry is one snapshot of the metastore with its record and its layer.
type Entry struct {
	ID   string
	Info snapshots.Info
	Snapshot
	// Of is the layer of a committed snapshot; nil for others.
	Of *Layer
}

// NS is the namespace of a snapshot. Garbage collection brings none along; the
// key that containerd's metadata layer makes begins with it.
func (e Entry) NS() string {
	if e.Namespace != "" {
		return e.Namespace
	}
	ns, _, _ := strings.Cut(e.Info.Name, "/")
	return ns
}

// ClientKey is the key of a snapshot as the client of containerd gave it:
// containerd's metadata layer makes "<namespace>/<n>/<key>" of it.
func ClientKey(key string) string {
	if p := strings.SplitN(key, "/", 3); len(p) == 3 {
		if _, err := strconv.ParseUint(p[1], 10, 64); err == nil {
			return p[2]
		}
	}
	return key
}
