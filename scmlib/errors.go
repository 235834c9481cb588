// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scmlib

import (
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
)

// Errors to tell apart with errors.Is. Each belongs to a class of github.com/containerd/errdefs too.
var (
	ErrNoRegion    = fmt.Errorf("no region: %w", errdefs.ErrNotFound)
	ErrGranularity = fmt.Errorf("persistence is too coarse: %w", errdefs.ErrFailedPrecondition)
	ErrDurability  = fmt.Errorf("not durable enough: %w", errdefs.ErrFailedPrecondition)
	ErrLocked      = fmt.Errorf("region is in use: %w", errdefs.ErrUnavailable)
	ErrUnformatted = fmt.Errorf("region is not formatted: %w", errdefs.ErrFailedPrecondition)
	ErrVersion     = fmt.Errorf("region of another format: %w", errdefs.ErrNotImplemented)
	ErrLayout      = fmt.Errorf("region of another layout: %w", errdefs.ErrFailedPrecondition)
	ErrSize        = fmt.Errorf("wrong size: %w", errdefs.ErrInvalidArgument)
	ErrCorrupt     = fmt.Errorf("region is damaged: %w", errdefs.ErrDataLoss)
	ErrUnsafe      = fmt.Errorf("memory lost what it had promised to save: %w", errdefs.ErrDataLoss)
	ErrFull        = fmt.Errorf("region is full: %w", errdefs.ErrResourceExhausted)
	ErrType        = fmt.Errorf("type not usable in a region: %w", errdefs.ErrInvalidArgument)
	ErrRange       = fmt.Errorf("outside the region: %w", errdefs.ErrOutOfRange)
	ErrFree        = fmt.Errorf("not an allocated block: %w", errdefs.ErrInvalidArgument)
	ErrReadOnly    = fmt.Errorf("region is read-only: %w", errdefs.ErrPermissionDenied)
	ErrClosed      = fmt.Errorf("region is closed: %w", errdefs.ErrFailedPrecondition)
	ErrTxDone      = fmt.Errorf("transaction has ended: %w", errdefs.ErrFailedPrecondition)
)

// MediaError is a fault (SIGBUS) while memory of the region was touched: a bad block, a file that was cut, or a file system without space.
type MediaError struct {
	Path string
	Off  uint64 // of the byte that could not be read or written
	Err  error  // what the runtime said
}

func (e *MediaError) Error() string {
	return fmt.Sprintf("region %q: memory fault at offset %d: bad block, or the file was cut or has no space behind it", e.Path, e.Off)
}

// Unwrap classes the error as loss of data.
func (e *MediaError) Unwrap() []error { return []error{e.Err, errdefs.ErrDataLoss} }

// PtrError is what [Ptr.In] panics with when an offset does not lie in the region: the data is damaged, or the pointer is another region's.
// Update and View turn it into an error.
type PtrError struct {
	Off  Off
	Size uint64
}

func (e *PtrError) Error() string {
	return fmt.Sprintf("offset %d, length %d is not within the heap of the region, or not aligned", uint64(e.Off), e.Size)
}

// Unwrap makes it an ErrRange.
func (e *PtrError) Unwrap() error { return ErrRange }

var errAborted = errors.New("transaction was left by panic or Goexit")
