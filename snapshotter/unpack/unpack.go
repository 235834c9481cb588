// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package unpack turns the bytes of a layer's blob into a pack in one pass,
// while the blob is being downloaded (docs/store.md, section 3).
//
// [OpenGrowing] reads a blob that containerd is still writing. [Layer] decodes
// it, gives each data file to the pack, to NVM or to both, and returns the
// metadata. The result is what containerd's applier makes of the same blob on
// overlayfs. Nothing that [Layer] has written may be used before it returns
// without an error: only then are both digests verified.
//
// The package imports package pack and nothing else of the project. It does
// not sync, rename or delete packs; durability is the caller's. Calls of
// [Layer] for different layers may run at the same time.
package unpack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// Pack is the pack that is being written. For each data file Layer calls Begin,
// then either Write until all bytes are there or Hole once, then End.
type Pack interface {
	// Begin gives the next file its number and its place.
	Begin(size int64) (number, block uint32, err error)
	Write(p []byte) (int, error)
	// Hole leaves out the bytes of the file. sum is their CRC-32C.
	Hole(sum uint32) error
	// End ends the file and returns the CRC-32C of its bytes.
	End() (sum uint32, err error)
}

// NVM is the place of data files on NVM. Layer calls its methods from one
// goroutine.
type NVM interface {
	// Create begins the file of that number. alone: its bytes do not go to the pack,
	// too. It leaves nothing after an error.
	Create(number uint32, alone bool) (NVMFile, error)
	// Remove deletes a file that Create has made: the layer itself has replaced
	// it, or writing it failed. In the second case an error of Remove ends Layer:
	// what is left on NVM would be read instead of the pack.
	Remove(number uint32) error
}

// NVMFile is a data file on NVM while it is written, for example an *os.File
// that is open for reading and writing.
type NVMFile interface {
	io.Writer
	// ReadAt gives back what was written, for a file that NVM does not take to
	// its end.
	io.ReaderAt
	io.Closer
}

// Placement says where the bytes of a data file go.
type Placement int

const (
	ToPack Placement = iota // the pack alone
	ToNVM                   // NVM alone: a hole in the pack, to be filled later
	ToBoth
)

// File is a data file whose bytes are about to arrive.
type File struct {
	Path   string // in the layer, symlinks resolved, without a slash in front
	Size   int64  // bytes, above zero
	Mode   uint32 // permissions as in stat(2), without the type
	Number uint32
}

// Want is what the blob has to turn out to be.
type Want struct {
	Digest digest.Digest // of the blob
	Size   int64         // bytes of the blob
	DiffID digest.Digest // of the uncompressed stream; "" if it is not known
}

// Options are the parts of unpacking that callers differ in. The zero value
// writes everything to the pack.
type Options struct {
	// Layer is the number of the layer, for [pack.Inode.Data].
	Layer uint64
	// Place is asked for each data file, which is above [pack.InlineMax], in the order of the tar, in the
	// goroutine of Layer, and may block. nil stands for ToPack, as does a nil NVM.
	Place func(File) Placement
	// NVM takes what Place sends there. After its first error it gets no more
	// files of this layer; what it had not taken goes to the pack.
	NVM NVM
	// Progress is called with the bytes of the blob that have been decoded and
	// those that came out, from another goroutine than Layer's. It must not block.
	Progress func(compressed, uncompressed int64)

	// Limits against blobs that are made to fill disks or memory. Zero stands
	// for the default.
	MaxBytes    int64 // uncompressed, and data of all files with their sparse parts; default 1 TiB
	MaxRatio    int64 // uncompressed to compressed, beyond 1 GiB uncompressed; default 10 000
	MaxMetadata int64 // bytes of memory for names and attributes, estimated; default 1 GiB
}

const (
	defaultMaxBytes    = 1 << 40
	defaultMaxRatio    = 10_000
	defaultMaxMetadata = 1 << 30
)

func (o Options) withDefaults() Options {
	if o.MaxBytes == 0 {
		o.MaxBytes = defaultMaxBytes
	}
	if o.MaxRatio == 0 {
		o.MaxRatio = defaultMaxRatio
	}
	if o.MaxMetadata == 0 {
		o.MaxMetadata = defaultMaxMetadata
	}
	return o
}

// Result describes a layer that has been unpacked.
type Result struct {
	DiffID       digest.Digest // of the uncompressed stream
	Compressed   int64         // bytes of the blob
	Uncompressed int64         // bytes of the tar with all that follows its end
	Entries      int64         // entries of the tar
	Files        uint32        // files that are not empty, the replaced ones included
	DataBytes    int64         // bytes of these files
	NVMBytes     int64         // bytes of data files that stand on NVM
	Holes        uint32        // those of them that stand on NVM alone
	NVMError     error         // why NVM got no more files, if it failed
}

// Supports reports whether blobs of that media type are layers that Layer can
// read. How they are compressed is found out from their first bytes, since
// media types are often wrong about it. Encrypted layers are not supported.
func Supports(mediaType string) bool {
	base, suffix, _ := strings.Cut(mediaType, "+")
	switch base {
	case "application/vnd.docker.image.rootfs.diff.tar",
		"application/vnd.docker.image.rootfs.foreign.diff.tar":
		return suffix == ""
	case "application/vnd.docker.image.rootfs.diff.tar.gzip",
		"application/vnd.docker.image.rootfs.diff.tar.zstd",
		"application/vnd.docker.image.rootfs.foreign.diff.tar.gzip":
		return suffix == ""
	case "application/vnd.oci.image.layer.v1.tar",
		"application/vnd.oci.image.layer.nondistributable.v1.tar":
		return suffix == "" || suffix == "gzip" || suffix == "zstd"
	}
	return false
}

// Layer unpacks blob into p and closes blob. It blocks until the blob has ended,
// it is found to be bad, or ctx ends.
//
// The error is errdefs.ErrInvalidArgument if the blob is not a layer that
// containerd's applier would take or exceeds a limit,
// errdefs.ErrFailedPrecondition if a size or digest is not the wanted one, and
// otherwise that of ctx, blob, p or NVM, wrapped. After an error the caller drops
// all that has been written.
func Layer(ctx context.Context, blob io.ReadCloser, p Pack, want Want, opts Options) (*pack.Meta, Result, error) {
	meta, res, err := unpackLayer(ctx, blob, p, want, opts.withDefaults())
	if err != nil {
		return nil, Result{}, fmt.Errorf("unpack blob %q: %w", want.Digest, err)
	}
	return meta, res, nil
}

func unpackLayer(ctx context.Context, blob io.ReadCloser, p Pack, want Want, opts Options) (*pack.Meta, Result, error) {
	s := startStream(ctx, blob, opts)
	defer s.stop()
	a := newApplier(ctx, p, opts)
	defer a.data.close()
	err := a.run(s)
	if err == nil {
		// What follows the end of the tar belongs to both digests.
		_, err = io.Copy(io.Discard, s)
	}
	// An error of the stream reaches the tar reader as if it were one of the tar.
	if s.err != nil && !errors.Is(s.err, io.EOF) {
		err = s.err
	}
	if err != nil {
		return nil, Result{}, err
	}
	sums := s.sums()
	if sums.compressed != want.Size {
		return nil, Result{}, fmt.Errorf("blob has %d bytes and not %d: %w", sums.compressed, want.Size, errdefs.ErrFailedPrecondition)
	}
	if sums.digest != want.Digest {
		return nil, Result{}, fmt.Errorf("digest of the blob is %q: %w", sums.digest, errdefs.ErrFailedPrecondition)
	}
	if want.DiffID != "" && sums.diffID != want.DiffID {
		return nil, Result{}, fmt.Errorf("diff ID is %q and not %q: %w", sums.diffID, want.DiffID, errdefs.ErrFailedPrecondition)
	}
	meta, res := a.result()
	res.DiffID, res.Compressed, res.Uncompressed = sums.diffID, sums.compressed, sums.uncompressed
	return meta, res, nil
}
