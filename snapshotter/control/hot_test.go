// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package control

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"

	"github.com/nhybrid/nhybrid/hif/profile"
)

// hotFake answers everything with err, if there is one.
type hotFake struct {
	err   error
	p     profile.Profile
	put   chan profile.Profile // what PutProfile got
	files []*ImageFile
	rule  chan *SetRuleRequest
}

var state = MigrationState{State: "waiting", Why: "open \xff", LastError: "read \xff"}

func (f hotFake) migration() (*MigrationState, error) {
	return &MigrationState{State: state.State, Why: state.Why, LastError: state.LastError}, f.err
}

func (f hotFake) Profiles(_ context.Context, _ *ProfilesRequest, send func(*ProfileInfo) error) error {
	return errors.Join(send(&ProfileInfo{Known: "traced"}), f.err)
}
func (f hotFake) GetProfile(context.Context, *ImageRequest) (*ProfileInfo, profile.Profile, error) {
	return &ProfileInfo{Known: "traced"}, f.p, f.err
}
func (f hotFake) PutProfile(_ context.Context, r *ImageRequest, p profile.Profile) (*PutResponse, error) {
	if f.err == nil {
		f.put <- p
	}
	return &PutResponse{Profile: &ProfileInfo{Images: []string{r.GetImage()}}, LeftOut: NewLeftOut([]profile.Problem{{Path: "\xff", Why: "bad \xff"}})}, f.err
}
func (f hotFake) RemoveProfile(context.Context, *ImageRequest) error { return f.err }
func (f hotFake) SetRule(_ context.Context, r *SetRuleRequest) (*SetRuleResponse, error) {
	if f.rule != nil {
		f.rule <- r
	}
	return &SetRuleResponse{}, f.err
}
func (f hotFake) PushProfile(context.Context, *RegistryRequest) (*PushResponse, error) {
	return &PushResponse{}, f.err
}
func (f hotFake) PullProfile(context.Context, *RegistryRequest) (*PutResponse, error) {
	return nil, f.err
}
func (f hotFake) Ready(context.Context, *ReadyRequest) (*ReadyResponse, error) {
	return &ReadyResponse{}, f.err
}
func (f hotFake) Migration(context.Context) (*MigrationState, error)       { return f.migration() }
func (f hotFake) PauseMigration(context.Context) (*MigrationState, error)  { return f.migration() }
func (f hotFake) ResumeMigration(context.Context) (*MigrationState, error) { return f.migration() }
func (f hotFake) MigrateNow(context.Context) (*MigrationState, error)      { return f.migration() }
func (f hotFake) Files(_ context.Context, _ *FilesRequest, send func(*ImageFile) error) error {
	for _, x := range f.files {
		if err := send(x); err != nil {
			return err
		}
	}
	return f.err
}
func (f hotFake) Sample(context.Context) (*TopSample, error) {
	return &TopSample{TraceError: "no \xff"}, f.err
}

func client(t *testing.T, f hotFake) (*Server, Client) {
	t.Helper()
	s, socket := start(t, failing{hotFake: f})
	c, done, err := Dial(socket)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, done()) })
	return s, c
}

const hash = digest.Digest("sha256:1111111111111111111111111111111111111111111111111111111111111111")

// big is a profile of several messages.
func big(files int) profile.Profile {
	p := profile.New(profile.Image{Digest: hash, Layers: []digest.Digest{hash}}, time.Unix(1, 0))
	for i := range files {
		p.Files = append(p.Files, profile.File{Path: profile.Path(fmt.Sprintf("%s/%d\xff", strings.Repeat("d", 150), i)), Size: 1, Kind: profile.Read, Touched: -1})
	}
	return p
}

// all reads a stream to its end.
func all[T any](stream grpc.ServerStreamingClient[T], err error) ([]*T, error) {
	var got []*T
	for err == nil {
		var m *T
		if m, err = stream.Recv(); err == nil {
			got = append(got, m)
		}
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return got, err
}

func put(t *testing.T, c Client, parts ...*PutPart) (*PutResponse, error) {
	t.Helper()
	stream, err := c.PutProfile(t.Context())
	require.NoError(t, err)
	for _, p := range parts {
		if err := stream.Send(p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, err
		}
	}
	return stream.CloseAndRecv()
}

func TestErrorsOfHotKeepTheirClass(t *testing.T) {
	ctx := t.Context()
	for _, class := range []error{errdefs.ErrNotFound, errdefs.ErrInvalidArgument, errdefs.ErrUnavailable, errdefs.ErrFailedPrecondition, errdefs.ErrNotImplemented} {
		_, c := client(t, hotFake{err: fmt.Errorf("the reason: %w", class)})
		var b bytes.Buffer
		require.NoError(t, profile.Encode(&b, big(1)))
		for name, call := range map[string]func() error{
			"profiles": func() error { _, err := all(c.Profiles(ctx, &ProfilesRequest{})); return err },
			"get":      func() error { _, err := all(c.GetProfile(ctx, &ImageRequest{Image: "x"})); return err },
			"put": func() error {
				_, err := put(t, c, &PutPart{Image: &ImageRequest{}, Data: b.Bytes()})
				return err
			},
			"remove": func() error { _, err := c.RemoveProfile(ctx, &ImageRequest{Image: "x"}); return err },
			"rule": func() error {
				_, err := c.SetRule(ctx, &SetRuleRequest{Image: "x", Glob: "a", Action: "pin"})
				return err
			},
			"push":   func() error { _, err := c.PushProfile(ctx, &RegistryRequest{Image: "x"}); return err },
			"pull":   func() error { _, err := c.PullProfile(ctx, &RegistryRequest{Image: "x"}); return err },
			"ready":  func() error { _, err := c.Ready(ctx, &ReadyRequest{Container: "x"}); return err },
			"state":  func() error { _, err := c.Migration(ctx, &MigrationRequest{}); return err },
			"pause":  func() error { _, err := c.PauseMigration(ctx, &MigrationRequest{}); return err },
			"resume": func() error { _, err := c.ResumeMigration(ctx, &MigrationRequest{}); return err },
			"now":    func() error { _, err := c.MigrateNow(ctx, &MigrationRequest{}); return err },
			"files":  func() error { _, err := all(c.Files(ctx, &FilesRequest{Image: "x"})); return err },
			"top":    func() error { _, err := all(c.Top(ctx, &TopRequest{})); return err },
		} {
			err := call()
			require.ErrorIs(t, errgrpc.ToNative(err), class, name)
			require.ErrorContains(t, err, "the reason", name)
		}
	}
}

func TestBadRequestsOfHot(t *testing.T) {
	_, c := client(t, hotFake{})
	ctx := t.Context()
	for name, call := range map[string]func() error{
		"get without image":      func() error { _, err := all(c.GetProfile(ctx, &ImageRequest{})); return err },
		"remove without image":   func() error { _, err := c.RemoveProfile(ctx, &ImageRequest{}); return err },
		"rule without image":     func() error { _, err := c.SetRule(ctx, &SetRuleRequest{Glob: "a", Action: "pin"}); return err },
		"rule without glob":      func() error { _, err := c.SetRule(ctx, &SetRuleRequest{Image: "x", Action: "pin"}); return err },
		"rule of no such action": func() error { _, err := c.SetRule(ctx, &SetRuleRequest{Image: "x", Glob: "a"}); return err },
		"glob that is malformed": func() error {
			_, err := c.SetRule(ctx, &SetRuleRequest{Image: "x", Glob: "[", Action: "pin"})
			return err
		},
		"push without image":      func() error { _, err := c.PushProfile(ctx, &RegistryRequest{}); return err },
		"pull without image":      func() error { _, err := c.PullProfile(ctx, &RegistryRequest{}); return err },
		"ready without container": func() error { _, err := c.Ready(ctx, &ReadyRequest{}); return err },
		"files without image":     func() error { _, err := all(c.Files(ctx, &FilesRequest{})); return err },
		"interval too short":      func() error { _, err := all(c.Top(ctx, &TopRequest{IntervalMilliseconds: 99})); return err },
		"interval negative":       func() error { _, err := all(c.Top(ctx, &TopRequest{IntervalMilliseconds: -1})); return err },
		"interval too long":       func() error { _, err := all(c.Top(ctx, &TopRequest{IntervalMilliseconds: 1 << 62})); return err },
		"put nothing":             func() error { _, err := put(t, c); return err },
		"put without image":       func() error { _, err := put(t, c, &PutPart{Data: []byte("{}")}); return err },
		"put no profile":          func() error { _, err := put(t, c, &PutPart{Image: &ImageRequest{}, Data: []byte("{}")}); return err },
		"put half a profile": func() error {
			_, err := put(t, c, &PutPart{Image: &ImageRequest{}, Data: []byte(`{"schema":1,`)})
			return err
		},
	} {
		require.ErrorIs(t, errgrpc.ToNative(call()), errdefs.ErrInvalidArgument, name)
	}
}

// A profile may be larger than a message of gRPC.
func TestProfileInParts(t *testing.T) {
	want := big(50_000)
	f := hotFake{p: want, put: make(chan profile.Profile, 1)}
	_, c := client(t, f)
	parts, err := all(c.GetProfile(t.Context(), &ImageRequest{Image: "x"}))
	require.NoError(t, err)
	require.Greater(t, len(parts), 9)
	require.Equal(t, "traced", parts[0].GetInfo().GetKnown())
	var data []byte
	for _, p := range parts {
		data = append(data, p.GetData()...)
	}
	have, err := profile.Decode(bytes.NewReader(data))
	require.NoError(t, err)
	require.Equal(t, want.Files, have.Files)

	send := []*PutPart{{Image: &ImageRequest{Image: "x"}}, {}} // parts may be empty
	for len(data) > 0 {
		n := min(len(data), 777_777)
		send = append(send, &PutPart{Data: data[:n]})
		data = data[n:]
	}
	r, err := put(t, c, send...)
	require.NoError(t, err)
	require.Equal(t, []string{"x"}, r.GetProfile().GetImages())
	require.Equal(t, "bad ?", r.GetLeftOut().GetFiles()[0].GetWhy())
	require.Equal(t, want.Files, (<-f.put).Files)
}

// Of what is too long the server reads no more than it must; the client may send on for ever.
func TestPutStopsTheSender(t *testing.T) {
	_, c := client(t, hotFake{put: make(chan profile.Profile, 1)})
	stream, err := c.PutProfile(t.Context())
	require.NoError(t, err)
	require.NoError(t, stream.Send(&PutPart{Image: &ImageRequest{}, Data: []byte(`{"schema":1,"repository":"`)}))
	sent, part := 0, &PutPart{Data: bytes.Repeat([]byte("x"), 1<<20)}
	for err == nil {
		if err = stream.Send(part); err == nil {
			sent++
		}
		require.Less(t, sent, 2*profile.MaxBytes>>20)
	}
	require.ErrorIs(t, err, io.EOF)
	_, err = stream.CloseAndRecv()
	require.ErrorIs(t, errgrpc.ToNative(err), errdefs.ErrInvalidArgument)
	require.ErrorContains(t, err, "more than 32 MiB")
}

func TestRuleIsCleaned(t *testing.T) {
	f := hotFake{rule: make(chan *SetRuleRequest, 1)}
	_, c := client(t, f)
	_, err := c.SetRule(t.Context(), &SetRuleRequest{Image: "x", Glob: "//usr/**", Action: "exclude"})
	require.NoError(t, err)
	require.Equal(t, "usr/**", (<-f.rule).GetGlob())
}

func TestFiles(t *testing.T) {
	f := hotFake{}
	for i := range 2*batchSize + 1 {
		f.files = append(f.files, &ImageFile{Path: fmt.Appendf(nil, "usr/%d\xff", i)})
	}
	f.files = append(f.files, &ImageFile{Path: []byte("usrlocal")})
	_, c := client(t, f)
	for path, want := range map[string]int{
		"": 2*batchSize + 2, "/": 2*batchSize + 2, "usr": 2*batchSize + 1, "/usr/": 2*batchSize + 1, "/../usr/./": 2*batchSize + 1,
		"/usr/7\xff": 1, "usrlocal": 1,
	} {
		batches, err := all(c.Files(t.Context(), &FilesRequest{Image: "x", Path: []byte(path)}))
		require.NoError(t, err)
		n := 0
		for _, b := range batches {
			n += len(b.GetFiles())
			require.LessOrEqual(t, len(b.GetFiles()), batchSize)
		}
		require.Equal(t, want, n, path)
	}
	_, err := all(c.Files(t.Context(), &FilesRequest{Image: "x", Path: []byte("/us")}))
	require.ErrorIs(t, errgrpc.ToNative(err), errdefs.ErrNotFound)
	require.ErrorContains(t, err, `"/us"`)
}

// Names in errors of the system need not be UTF-8, and must not cost the whole answer.
func TestStateIsValid(t *testing.T) {
	_, c := client(t, hotFake{})
	for _, call := range []func(context.Context, *MigrationRequest, ...grpc.CallOption) (*MigrationState, error){
		c.Migration, c.PauseMigration, c.ResumeMigration, c.MigrateNow,
	} {
		m, err := call(t.Context(), &MigrationRequest{})
		require.NoError(t, err)
		require.Equal(t, "open ?", m.GetWhy())
		require.Equal(t, "read ?", m.GetLastError())
	}
}

func TestTopAndStop(t *testing.T) {
	s, c := client(t, hotFake{})
	stream, err := c.Top(t.Context(), &TopRequest{IntervalMilliseconds: 100})
	require.NoError(t, err)
	var last time.Time
	for range 3 {
		m, err := stream.Recv()
		require.NoError(t, err)
		require.Equal(t, "no ?", m.GetTraceError())
		require.True(t, m.GetTime().AsTime().After(last))
		last = m.GetTime().AsTime()
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	s.Stop(ctx)
	require.NoError(t, ctx.Err(), "the server had to be stopped by force")
}

func TestNewLeftOut(t *testing.T) {
	require.Zero(t, NewLeftOut(nil).GetTotal())
	m := NewLeftOut(make([]profile.Problem, 1000))
	require.Equal(t, int64(1000), m.GetTotal())
	require.Len(t, m.GetFiles(), maxLeftOut)
}

func TestPathsInJSON(t *testing.T) {
	b, err := JSON(&FileBatch{Files: []*ImageFile{{Path: []byte("a/<b>")}, {Path: []byte("\xff")}}})
	require.NoError(t, err)
	require.Contains(t, string(b), `"path":"a/<b>"`)
	require.Contains(t, string(b), `"path":{"base64":"/w=="}`)
}
