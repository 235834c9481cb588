// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package operator

import (
	"context"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/nhybrid/nhybrid/hif"
	"github.com/nhybrid/nhybrid/hif/migrate"
	"github.com/nhybrid/nhybrid/hif/plan"
	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/placement/tier"
	"github.com/nhybrid/nhybrid/snapshotter/control"
	"github.com/nhybrid/nhybrid/snapshotter/store"
)

// Migration implements [control.HotBackend].
func (s backend) Migration(context.Context) (*control.MigrationState, error) {
	m, err := s.manager()
	if err != nil {
		return nil, err
	}
	out := &control.MigrationState{RateLimit: float64(s.hotConfig.Engine.Rate), OperationsLimit: float64(s.hotConfig.Engine.Operations)}
	o := m.Overview()
	out.Settled, out.Layers = int64(len(o.SettledLayers)), int64(o.Layers)
	room, err := s.store.Room(placement.NVM)
	if err != nil {
		return nil, err
	}
	fillNVM(out, room, s.hotConfig.Limits)
	engine := m.Engine()
	if engine == nil {
		out.State, out.Why = migrate.Paused.String(), hif.ErrNoMigration.Error()
		return out, nil
	}
	p, st := engine.Progress(), engine.Stats()
	out.State, out.Why, out.Now = p.State.String(), p.Reason, p.Now
	out.Current, out.CurrentDirection = []byte(p.Current), p.CurrentDirection
	if p.State == migrate.Idle && (!engine.Reached() || m.Settling()) {
		out.State, out.Why = migrate.Running.String(), "making a plan, or parts of large files"
	}
	out.PinnedBytes = p.Pinned
	if out.Failed, out.LastError = st.Failures, p.Error; p.Error != "" {
		out.LastErrorTime = timestamppb.New(p.ErrorAt)
	}
	out.Directions = []*control.Direction{
		{
			Name: "down", FilesDone: int64(st.Down.Files), BytesDone: st.Down.Bytes,
			FilesLeft: int64(p.Down.Left.Files), BytesLeft: p.Down.Left.Bytes,
		},
		{
			Name: "up", FilesDone: int64(st.Up.Files), BytesDone: st.Up.Bytes,
			FilesLeft: int64(p.Up.Left.Files), BytesLeft: p.Up.Left.Bytes,
		},
	}
	return out, nil
}

// fillNVM tells what NVM has, in bytes and in inodes, and at which use of them files leave. A plan counts bytes, and inodes as
// the same share of them ([store.Room.Scarcer]), so its marks are that share of the inodes.
func fillNVM(m *control.MigrationState, room store.Room, limits plan.Limits) {
	m.NvmTotal, m.NvmUsed, m.Reserve = room.Total, room.Total-room.Free, room.Reserve
	m.High, m.Low = limits.Marks(plan.Space{Free: room.Free, Total: room.Total, Reserve: room.Reserve})
	if room.Inodes <= 0 || room.Total <= 0 {
		return
	}
	share := func(bytes int64) int64 { return int64(float64(bytes) / float64(room.Total) * float64(room.Inodes)) }
	m.Inodes, m.InodesUsed, m.InodesReserve = room.Inodes, room.Inodes-room.InodesFree, room.InodesReserve
	m.InodesHigh, m.InodesLow = share(m.High), share(m.Low)
}

// PauseMigration implements [control.HotBackend].
func (s backend) PauseMigration(ctx context.Context) (*control.MigrationState, error) {
	m, err := s.manager()
	if err == nil {
		err = m.Pause()
	}
	if err != nil {
		return nil, err
	}
	return s.Migration(ctx)
}

// ResumeMigration implements [control.HotBackend].
func (s backend) ResumeMigration(ctx context.Context) (*control.MigrationState, error) {
	m, err := s.manager()
	if err != nil {
		return nil, err
	}
	engine := m.Engine()
	if engine == nil {
		return nil, hif.ErrNoMigration
	}
	engine.Resume()
	return s.Migration(ctx)
}

// MigrateNow implements [control.HotBackend].
func (s backend) MigrateNow(ctx context.Context) (*control.MigrationState, error) {
	m, err := s.manager()
	if err != nil {
		return nil, err
	}
	if err := m.MigrateNow(ctx); err != nil {
		return nil, err
	}
	return s.Migration(ctx)
}

// Sample implements [control.HotBackend].
func (s backend) Sample(ctx context.Context) (*control.TopSample, error) {
	m, err := s.manager()
	if err != nil {
		return nil, err
	}
	out := &control.TopSample{}
	stats, err := m.Stats()
	if err != nil {
		out.TraceError = err.Error()
	}
	out.StartsTotal, _ = m.Recorded()
	out.OpensNvm, out.OpensHdd = int64(stats.Opens[placement.NVM]), int64(stats.Opens[placement.HDD])
	out.Overflows, out.Lost = int64(stats.Overflows), int64(stats.Lost)
	for _, o := range m.Starts() {
		out.Starts = append(out.Starts, s.openStart(o))
	}
	if out.Migration, err = s.Migration(ctx); err != nil {
		return nil, err
	}
	space := s.space()
	for _, t := range tier.Tiers {
		free, total, err := s.store.Tiers.Space(t)
		if err != nil {
			return nil, err
		}
		out.Tiers = append(out.Tiers, &control.TierSpace{Name: t.String(), Total: total, Free: free, Space: space[t]})
	}
	return out, nil
}
