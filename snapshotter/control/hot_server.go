// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/nhybrid/nhybrid/hif/profile"
)

const (
	// A profile may be larger than a message, which gRPC takes up to 4 MiB of.
	partSize = 1 << 20
	// A path has at most 4095 bytes, so that a batch is far below that too.
	batchSize = 256

	// DefaultInterval and the others are of TopRequest.
	DefaultInterval = time.Second
	MinInterval     = 100 * time.Millisecond
	MaxInterval     = time.Hour
)

type hotService struct {
	UnimplementedHotServer
	backend HotBackend
	ctx     context.Context // as in service
}

func missing(request, what string) error {
	return errgrpc.ToGRPC(fmt.Errorf("%s: no %s is named: %w", request, what, errdefs.ErrInvalidArgument))
}

func (s *hotService) Profiles(r *ProfilesRequest, stream grpc.ServerStreamingServer[ProfileInfo]) error {
	return errgrpc.ToGRPC(s.backend.Profiles(stream.Context(), r, stream.Send))
}

func (s *hotService) GetProfile(r *ImageRequest, stream grpc.ServerStreamingServer[ProfilePart]) error {
	if r.GetImage() == "" {
		return missing("get profile", "image")
	}
	info, p, err := s.backend.GetProfile(stream.Context(), r)
	if err != nil {
		return errgrpc.ToGRPC(err)
	}
	if err := stream.Send(&ProfilePart{Info: info}); err != nil {
		return err
	}
	return errgrpc.ToGRPC(profile.Encode(parts(func(b []byte) error { return stream.Send(&ProfilePart{Data: b}) }), p))
}

// parts is a writer that sends what it gets in messages of a size that gRPC takes.
type parts func([]byte) error

func (send parts) Write(b []byte) (n int, err error) {
	for len(b) > n {
		end := min(len(b), n+partSize)
		if err := send(b[n:end]); err != nil {
			return n, err
		}
		n = end
	}
	return n, nil
}

func (s *hotService) PutProfile(stream grpc.ClientStreamingServer[PutPart, PutResponse]) error {
	first, err := stream.Recv()
	if errors.Is(err, io.EOF) {
		return missing("put profile", "image")
	}
	if err != nil {
		return err
	}
	image := first.GetImage()
	if image == nil {
		return errgrpc.ToGRPC(fmt.Errorf("put profile: the first message has no image: %w", errdefs.ErrInvalidArgument))
	}
	// Decoded while it arrives: of one that is too long no more is read than it takes to see that.
	p, err := profile.Decode(&received{buf: first.GetData(), next: func() ([]byte, error) {
		m, err := stream.Recv()
		return m.GetData(), err
	}})
	if ctx := stream.Context().Err(); ctx != nil {
		return errgrpc.ToGRPC(ctx)
	}
	if err != nil {
		return errgrpc.ToGRPC(err)
	}
	r, err := answer(s.backend.PutProfile(stream.Context(), image, p))
	if err != nil {
		return err
	}
	return stream.SendAndClose(r.valid())
}

// received reads the data of a stream's messages.
type received struct {
	buf  []byte
	next func() ([]byte, error)
}

func (r *received) Read(b []byte) (int, error) {
	for len(r.buf) == 0 {
		var err error
		if r.buf, err = r.next(); err != nil {
			return 0, err
		}
	}
	n := copy(b, r.buf)
	r.buf = r.buf[n:]
	return n, nil
}

func (s *hotService) RemoveProfile(ctx context.Context, r *ImageRequest) (*RemoveProfileResponse, error) {
	if r.GetImage() == "" {
		return nil, missing("remove profile", "image")
	}
	return answer(&RemoveProfileResponse{}, s.backend.RemoveProfile(ctx, r))
}

func (s *hotService) SetRule(ctx context.Context, r *SetRuleRequest) (*SetRuleResponse, error) {
	if r.GetImage() == "" {
		return nil, missing("set rule", "image")
	}
	rule, err := profile.NewRule(r.GetGlob(), profile.Action(r.GetAction()))
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	r.Glob = rule.Glob
	return answer(s.backend.SetRule(ctx, r))
}

func (s *hotService) PushProfile(ctx context.Context, r *RegistryRequest) (*PushResponse, error) {
	if r.GetImage() == "" {
		return nil, missing("push profile", "image")
	}
	return answer(s.backend.PushProfile(ctx, r))
}

func (s *hotService) PullProfile(ctx context.Context, r *RegistryRequest) (*PutResponse, error) {
	if r.GetImage() == "" {
		return nil, missing("pull profile", "image")
	}
	m, err := answer(s.backend.PullProfile(ctx, r))
	return m.valid(), err
}

func (s *hotService) Ready(ctx context.Context, r *ReadyRequest) (*ReadyResponse, error) {
	if r.GetContainer() == "" {
		return nil, missing("ready", "container")
	}
	return answer(s.backend.Ready(ctx, r))
}

func (s *hotService) Migration(ctx context.Context, _ *MigrationRequest) (*MigrationState, error) {
	return migration(s.backend.Migration(ctx))
}

func (s *hotService) PauseMigration(ctx context.Context, _ *MigrationRequest) (*MigrationState, error) {
	return migration(s.backend.PauseMigration(ctx))
}

func (s *hotService) ResumeMigration(ctx context.Context, _ *MigrationRequest) (*MigrationState, error) {
	return migration(s.backend.ResumeMigration(ctx))
}

func (s *hotService) MigrateNow(ctx context.Context, _ *MigrationRequest) (*MigrationState, error) {
	return migration(s.backend.MigrateNow(ctx))
}

func migration(m *MigrationState, err error) (*MigrationState, error) {
	m, err = answer(m, err)
	return m.valid(), err
}

// valid replaces what is no UTF-8, which may come in with a name in an error of the system: protobuf refuses to send a
// whole message for it.
func (m *MigrationState) valid() *MigrationState {
	if m != nil {
		m.Why, m.LastError = strings.ToValidUTF8(m.Why, "?"), strings.ToValidUTF8(m.LastError, "?")
	}
	return m
}

func (m *PutResponse) valid() *PutResponse {
	for _, f := range m.GetLeftOut().GetFiles() {
		f.Why = strings.ToValidUTF8(f.GetWhy(), "?")
	}
	return m
}

func (s *hotService) Files(r *FilesRequest, stream grpc.ServerStreamingServer[FileBatch]) error {
	if r.GetImage() == "" {
		return missing("files", "image")
	}
	r.Path = []byte(path.Clean("/" + string(r.GetPath()))[1:])
	below := string(r.Path)
	batch, sent := &FileBatch{}, false
	flush := func() error {
		if len(batch.Files) == 0 {
			return nil
		}
		sent = true
		err := stream.Send(batch)
		batch = &FileBatch{} // what was sent may still be in use
		return err
	}
	err := s.backend.Files(stream.Context(), r, func(f *ImageFile) error {
		p := string(f.GetPath())
		if below != "" && p != below && !strings.HasPrefix(p, below+"/") {
			return nil
		}
		if batch.Files = append(batch.Files, f); len(batch.Files) < batchSize {
			return nil
		}
		return flush()
	})
	if err == nil {
		err = flush()
	}
	if err == nil && !sent && below != "" {
		err = fmt.Errorf("files: image %q has no file with data at or below %q: %w", r.GetImage(), "/"+below, errdefs.ErrNotFound)
	}
	return errgrpc.ToGRPC(err)
}

func (s *hotService) Top(r *TopRequest, stream grpc.ServerStreamingServer[TopSample]) error {
	interval := DefaultInterval
	if ms := r.GetIntervalMilliseconds(); ms != 0 {
		if ms < MinInterval.Milliseconds() || ms > MaxInterval.Milliseconds() {
			return errgrpc.ToGRPC(fmt.Errorf("top: interval of %d ms is not from %s to %s: %w", ms, MinInterval, MaxInterval, errdefs.ErrInvalidArgument))
		}
		interval = time.Duration(ms) * time.Millisecond
	}
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	defer context.AfterFunc(s.ctx, cancel)()
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		m, err := s.backend.Sample(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return errgrpc.ToGRPC(err)
		}
		m.Time = timestamppb.Now()
		m.TraceError = strings.ToValidUTF8(m.GetTraceError(), "?")
		m.Migration = m.GetMigration().valid()
		if err := stream.Send(m); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}
