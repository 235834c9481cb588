// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	godigest "github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/nhybrid/nhybrid/hif/profile"
	"github.com/nhybrid/nhybrid/snapshotter/control"
)

// hot is the other half of the daemon: one image with a profile.
type hot struct {
	mu     sync.Mutex
	p      *profile.Profile
	asked  func()                    // at each question after Migration; nil: nothing
	states []*control.MigrationState // what Migration answers, one after the other; the last stays
	calls  []string
	sample int
}

func after(d time.Duration) *timestamppb.Timestamp { return timestamppb.New(moment.AsTime().Add(d)) }

func newHot(t *testing.T) *hot {
	t.Helper()
	p := profile.New(profile.Image{Digest: manifest, Repository: "docker.io/library/python", Layers: []godigest.Digest{base, java}}, moment.AsTime())
	p.Starts, p.Incomplete = 3, 1
	p.Files = []profile.File{
		{Path: "usr/bin/python3.11", Layer: 1, Size: 6_800_000, Kind: profile.Exec, Starts: 3, LastStart: 3, Weight: 1, Touched: 2_100_000, Ranges: []profile.Range{{Length: 2_100_000}}},
		{Path: "lib/libc.so.6", Size: 1_900_000, Kind: profile.Library, Starts: 3, LastStart: 3, Weight: 1, Touched: 1_900_000},
		{Path: "etc/escape\x1b[31m", Size: 10, Kind: profile.Read, Starts: 1, LastStart: 1, Weight: 0.64, Touched: -1},
		{Path: "etc/latin\xe9", Size: 11, Kind: profile.Read, Starts: 1, LastStart: 2, Weight: 0.2, Touched: -1},
	}
	require.NoError(t, p.Set(profile.Rule{Glob: "usr/bin/**", Action: profile.Pin}, moment.AsTime()))
	require.NoError(t, p.Set(profile.Rule{Glob: "etc/e*", Action: profile.Exclude}, moment.AsTime()))
	return &hot{p: &p}
}

const manifest = godigest.Digest(digest)

func (h *hot) find(ref string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if ref != image && ref != manifest.String() {
		return fmt.Errorf("image %q: %w", ref, errdefs.ErrNotFound)
	}
	if h.p == nil {
		return fmt.Errorf("no profile of image %s: %w", manifest, errdefs.ErrNotFound)
	}
	return nil
}

func (h *hot) info() *control.ProfileInfo {
	return &control.ProfileInfo{
		Images: []string{image}, Digest: manifest.String(), Repository: h.p.Repository, Known: "traced", Starts: int64(h.p.Starts), Incomplete: int64(h.p.Incomplete),
		Files: int64(len(h.p.Files)), HotBytes: profile.Bytes(h.p.Files), Rules: int64(len(h.p.Rules)), Updated: timestamppb.New(h.p.Updated),
	}
}

func (h *hot) Profiles(_ context.Context, r *control.ProfilesRequest, send func(*control.ProfileInfo) error) error {
	if err := send(h.info()); err != nil || r.GetNamespace() != "" {
		return err
	}
	return send(&control.ProfileInfo{Digest: java, Repository: "docker.io/library/java", Known: "predicted", Files: 12, HotBytes: 3e6})
}

func (h *hot) GetProfile(_ context.Context, r *control.ImageRequest) (*control.ProfileInfo, profile.Profile, error) {
	if err := h.find(r.GetImage()); err != nil {
		return nil, profile.Profile{}, err
	}
	return h.info(), *h.p, nil
}

func (h *hot) PutProfile(_ context.Context, r *control.ImageRequest, p profile.Profile) (*control.PutResponse, error) {
	if want := manifest; p.Image != want || r.GetImage() != "" && r.GetImage() != image {
		return nil, fmt.Errorf("profile is of image %s, not of %s: %w", p.Image, want, errdefs.ErrFailedPrecondition)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	var problems []profile.Problem
	for _, f := range p.Files {
		if strings.HasPrefix(string(f.Path), "gone/") {
			problems = append(problems, profile.Problem{Path: f.Path, Why: "the image has no such regular file"})
		}
	}
	h.p = &p
	return &control.PutResponse{Profile: h.info(), LeftOut: control.NewLeftOut(problems)}, nil
}

func (h *hot) RemoveProfile(_ context.Context, r *control.ImageRequest) error {
	if err := h.find(r.GetImage()); err != nil {
		return err
	}
	h.p = nil
	return nil
}

func (h *hot) SetRule(_ context.Context, r *control.SetRuleRequest) (*control.SetRuleResponse, error) {
	if err := h.find(r.GetImage()); err != nil {
		return nil, err
	}
	if err := h.p.Set(profile.Rule{Glob: r.GetGlob(), Action: profile.Action(r.GetAction())}, moment.AsTime()); err != nil {
		return nil, err
	}
	m := &control.SetRuleResponse{Files: 2, Bytes: 1234}
	for _, x := range h.p.Rules {
		m.Rules = append(m.Rules, &control.Rule{Glob: x.Glob, Action: string(x.Action)})
	}
	return m, nil
}

func (h *hot) PushProfile(_ context.Context, r *control.RegistryRequest) (*control.PushResponse, error) {
	h.calls = append(h.calls, fmt.Sprintf("push plain=%t", r.GetPlainHttp()))
	return &control.PushResponse{Digest: base, Profile: h.info()}, h.find(r.GetImage())
}

func (h *hot) PullProfile(_ context.Context, r *control.RegistryRequest) (*control.PutResponse, error) {
	h.calls = append(h.calls, fmt.Sprintf("pull plain=%t", r.GetPlainHttp()))
	left := &control.LeftOut{Total: 3, Files: []*control.LeftOutFile{{Path: []byte("etc/\xff"), Why: "it has 5 bytes, not 6"}}}
	return &control.PutResponse{Profile: h.info(), Digest: base, LeftOut: left}, h.find(r.GetImage())
}

func (h *hot) Ready(_ context.Context, r *control.ReadyRequest) (*control.ReadyResponse, error) {
	if r.GetContainer() != "web" {
		return nil, fmt.Errorf("container %q is not starting: %w", r.GetContainer(), errdefs.ErrNotFound)
	}
	return &control.ReadyResponse{Start: &control.OpenStart{Container: "web", Namespace: "default", Image: image, Files: 312, Since: moment}}, nil
}

func working() *control.MigrationState {
	return &control.MigrationState{
		State: "waiting", Why: "a container is starting", Current: []byte("/8/0b/11"), CurrentDirection: "up",
		Directions: []*control.Direction{
			{Name: "down", FilesDone: 8000, BytesDone: 150_000_000, FilesLeft: 700, BytesLeft: 12_000_000},
			{Name: "up", FilesLeft: 2, BytesLeft: 8_700_000},
		},
		PinnedBytes: 1_200_000, RateLimit: 20e6, OperationsLimit: 100,
		Failed: 1, LastError: "read \"/x\": input/output error", LastErrorTime: moment,
		NvmUsed: 1e9, NvmTotal: 4e9, High: 3.6e9, Low: 3.2e9, Reserve: 2e8, Settled: 2, Layers: 3,
		Inodes: 32768, InodesUsed: 1768, InodesHigh: 29491, InodesLow: 26214, InodesReserve: 1638,
	}
}

func (h *hot) Migration(context.Context) (*control.MigrationState, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.asked != nil {
		h.asked()
	}
	if len(h.states) == 0 {
		return working(), nil
	}
	m := h.states[0]
	if len(h.states) > 1 {
		h.states = h.states[1:]
	}
	return m, nil
}

func (h *hot) PauseMigration(context.Context) (*control.MigrationState, error) {
	return &control.MigrationState{State: "paused"}, nil
}

func (h *hot) ResumeMigration(context.Context) (*control.MigrationState, error) {
	return &control.MigrationState{State: "idle"}, nil
}

func (h *hot) MigrateNow(ctx context.Context) (*control.MigrationState, error) {
	return h.Migration(ctx)
}

func (h *hot) Files(_ context.Context, r *control.FilesRequest, send func(*control.ImageFile) error) error {
	if err := find(r.GetImage()); err != nil {
		return err
	}
	for _, f := range []*control.ImageFile{
		{Path: []byte("etc/passwd"), Size: 1000, Layer: 0, Tier: "both", Hot: true, Weight: 1, Starts: 3, NvmBytes: 1000},
		{Path: []byte("etc/ssl/cert.pem"), Size: 200_000, Tier: "hdd"},
		{Path: []byte("usr/bin/python3.11"), Size: 6_800_000, Layer: 1, Tier: "nvm", Hot: true, Pinned: true, Weight: 1, Starts: 3, NvmBytes: 6_800_000},
		{Path: []byte("usr/lib/jvm/modules"), Size: 100_000_000, Layer: 1, Tier: "parts", Hot: true, Weight: 0.8, Starts: 2, NvmBytes: 25_000_000},
		{Path: []byte("usr/lib/locale/\xe9"), Size: 3_000_000, Layer: 1, Tier: "nvm", NvmBytes: 3_000_000},
		{Path: []byte("usr/lib/libssl.so"), Size: 700_000, Layer: 1, Tier: "hdd", Hot: true, Weight: 0.5, Starts: 1},
		{Path: []byte("run.sh"), Size: 100, Layer: 1, Tier: "hdd"},
	} {
		if err := send(f); err != nil {
			return err
		}
	}
	return nil
}

func (h *hot) Sample(context.Context) (*control.TopSample, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.sample++
	return sample(int64(h.sample)), nil
}

// sample is the nth of a daemon that has 100 opens on NVM, 25 on HDD and 5 MB migrated from one to the next.
func sample(n int64) *control.TopSample {
	m := working()
	m.Directions[1].BytesDone += 5_000_000 * n
	return &control.TopSample{
		Time:        after(time.Duration(n) * 2 * time.Second),
		Starts:      []*control.OpenStart{{Container: "web", Namespace: "default", Image: image, Files: 100 * n, Since: moment}, {Container: "db", Namespace: "k8s.io", Since: moment}},
		StartsTotal: 17, OpensNvm: 100 * n, OpensHdd: 25 * n, Overflows: 1, Migration: m,
		Tiers: []*control.TierSpace{
			{Name: "nvm", Total: 4e9, Free: 3e9, Space: []*control.Space{{Kind: "hot", Bytes: 7e6}, {Kind: "unsettled", Bytes: 2e8}}},
			{Name: "hdd", Total: 4e12, Free: 3e12},
		},
	}
}
