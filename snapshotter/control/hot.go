// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"

	"github.com/nhybrid/nhybrid/hif/profile"
)

// HotBackend knows what starts of images need and moves files accordingly. What holds for Backend holds here. An image
// that is not known is ErrNotFound, as is a profile that is not there.
type HotBackend interface {
	// Profiles calls send for every profile and prediction, and stops at its first error.
	Profiles(ctx context.Context, r *ProfilesRequest, send func(*ProfileInfo) error) error
	// GetProfile finds the profile of an image, or a prediction in the form of one.
	GetProfile(ctx context.Context, r *ImageRequest) (*ProfileInfo, profile.Profile, error)
	// PutProfile stores p, which was decoded and is well-formed but not trusted: it is still to be held against the
	// image ([profile.Fit]). Where r names no image, it is the one of p's digest. A profile of another image than the
	// named one is ErrFailedPrecondition. Digest is left empty.
	PutProfile(ctx context.Context, r *ImageRequest, p profile.Profile) (*PutResponse, error)
	RemoveProfile(ctx context.Context, r *ImageRequest) error
	// SetRule gets a rule that was checked; glob is without a leading slash.
	SetRule(ctx context.Context, r *SetRuleRequest) (*SetRuleResponse, error)
	// PushProfile refuses a prediction with ErrFailedPrecondition: every node can make its own.
	PushProfile(ctx context.Context, r *RegistryRequest) (*PushResponse, error)
	PullProfile(ctx context.Context, r *RegistryRequest) (*PutResponse, error)
	// Ready is ErrNotFound for a container that is not being watched.
	Ready(ctx context.Context, r *ReadyRequest) (*ReadyResponse, error)

	Migration(ctx context.Context) (*MigrationState, error)
	// PauseMigration and ResumeMigration are no error where nothing changes.
	PauseMigration(ctx context.Context) (*MigrationState, error)
	ResumeMigration(ctx context.Context) (*MigrationState, error)
	// MigrateNow answers once the plan is made: state idle says that there was nothing to do. While paused it is
	// ErrFailedPrecondition.
	MigrateNow(ctx context.Context) (*MigrationState, error)

	// Files calls send for every regular file of an image that is not empty, and stops at its first error.
	Files(ctx context.Context, r *FilesRequest, send func(*ImageFile) error) error
	// Sample is asked for at every interval of each client: it must be quick. Time is left to the server.
	Sample(ctx context.Context) (*TopSample, error)
}

// maxLeftOut is how many of the files that were left out are named: enough to see what is wrong.
const maxLeftOut = 100

// NewLeftOut turns what [profile.Fit] left out into a message.
func NewLeftOut(problems []profile.Problem) *LeftOut {
	m := &LeftOut{Total: int64(len(problems))}
	for _, p := range problems[:min(len(problems), maxLeftOut)] {
		m.Files = append(m.Files, &LeftOutFile{Path: []byte(p.Path), Why: p.Why})
	}
	return m
}
