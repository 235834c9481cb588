// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/nhybrid/nhybrid/hif/profile"
	"github.com/nhybrid/nhybrid/snapshotter/control"
)

var errNoHot = fmt.Errorf("hot files: %w", errdefs.ErrNotImplemented)

func (s backend) Profiles(context.Context, *control.ProfilesRequest, func(*control.ProfileInfo) error) error {
	return errNoHot
}

func (s backend) GetProfile(context.Context, *control.ImageRequest) (*control.ProfileInfo, profile.Profile, error) {
	return nil, profile.Profile{}, errNoHot
}

func (s backend) PutProfile(context.Context, *control.ImageRequest, profile.Profile) (*control.PutResponse, error) {
	return nil, errNoHot
}

func (s backend) RemoveProfile(context.Context, *control.ImageRequest) error { return errNoHot }

func (s backend) SetRule(context.Context, *control.SetRuleRequest) (*control.SetRuleResponse, error) {
	return nil, errNoHot
}

func (s backend) PushProfile(context.Context, *control.RegistryRequest) (*control.PushResponse, error) {
	return nil, errNoHot
}

func (s backend) PullProfile(context.Context, *control.RegistryRequest) (*control.PutResponse, error) {
	return nil, errNoHot
}

func (s backend) Ready(context.Context, *control.ReadyRequest) (*control.ReadyResponse, error) {
	return nil, errNoHot
}

func (s backend) Migration(context.Context) (*control.MigrationState, error) { return nil, errNoHot }

func (s backend) PauseMigration(context.Context) (*control.MigrationState, error) {
	return nil, errNoHot
}

func (s backend) ResumeMigration(context.Context) (*control.MigrationState, error) {
	return nil, errNoHot
}

func (s backend) MigrateNow(context.Context) (*control.MigrationState, error) { return nil, errNoHot }

func (s backend) Files(context.Context, *control.FilesRequest, func(*control.ImageFile) error) error {
	return errNoHot
}

func (s backend) Sample(context.Context) (*control.TopSample, error) { return nil, errNoHot }
