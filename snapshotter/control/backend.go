// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package control is the API of nhybridctl: what stands where, and why, over gRPC on a unix socket.
//
// The messages are defined in control.proto and are used as they are on both sides. Server serves them for a Backend,
// which is the snapshotter; Dial reaches a server.
package control

import (
	"context"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/nhybrid/nhybrid/placement"
)

// Backend knows the answers. All methods may be called at once from several goroutines and must not keep the messages
// they are given. Errors are classed with errdefs: ErrNotFound, ErrInvalidArgument (two snapshots match, for example),
// ErrUnavailable (containerd cannot be reached), and arrive so at the other end.
type Backend interface {
	// Status leaves version, revision, pid, started and address to the server.
	Status(ctx context.Context) (*StatusResponse, error)
	// List calls send for every snapshot, parents before children, and stops at its first error.
	List(ctx context.Context, r *ListRequest, send func(*Snapshot) error) error
	Inspect(ctx context.Context, r *InspectRequest) (*InspectResponse, error)
	Why(ctx context.Context, r *WhyRequest) (*WhyResponse, error)
	Usage(ctx context.Context, r *UsageRequest) (*UsageResponse, error)
	// Watch calls send for the running pulls and then for what happens, until ctx ends, which is no error.
	Watch(ctx context.Context, r *WatchRequest, send func(*Event) error) error

	HotBackend
}

// NewDecision turns a decision of a policy into a message. Time and image are the caller's to set.
func NewDecision(d placement.Decision) *Decision {
	in := d.Input
	m := &Decision{
		Tier:        d.Tier.String(),
		Reason:      d.Reason,
		Policy:      d.Policy,
		Time:        timestamppb.Now(),
		Index:       int32(in.Index),
		Layers:      int32(len(in.Layers)),
		Ldl:         int32(d.LDL),
		Admitted:    d.Admitted,
		NvmFree:     in.NVMFree,
		NvmReserve:  in.NVMReserve,
		NvmPromised: in.NVMPromised,
		HddBacklog:  in.HDDBacklog,
		HddRate:     in.HDDRate,
		Bandwidth:   in.Bandwidth,
		UnpackRate:  in.UnpackRate,
		Sequential:  in.Sequential,
	}
	others, left := in.Downloading()
	m.Downloading, m.BytesLeft = int32(others), left
	if in.Index >= 0 && in.Index < len(in.Layers) {
		m.Size, m.SizeExact = in.Layers[in.Index].Size(), in.Layers[in.Index].Exact
	}
	if d.Files != nil {
		for _, h := range d.Files.Shares {
			m.Files = append(m.Files, &Share{Place: h.Place.String(), Rule: string(h.Rule), HotBy: h.HotBy, Files: h.Files, Bytes: h.Bytes})
		}
	}
	return m
}
