// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"time"

	"github.com/nhybrid/nhybrid/integration/bench/lab"
	"github.com/nhybrid/nhybrid/integration/bench/result"
	"github.com/nhybrid/nhybrid/integration/rig"
	"github.com/nhybrid/nhybrid/snapshotter/control"
)

// hotRun is a pull of an image of which a profile is known, and its first start right after it.
type hotRun struct {
	Round int    `json:"round"`
	Image string `json:"image"`
	// HotBytes are those of the files of the profile, InPlaceBytes those of them that stood on NVM when the pull returned.
	HotBytes     int64 `json:"hot_bytes"`
	InPlaceBytes int64 `json:"in_place_bytes"`
	// StartS is the first start right after a pull, from the command to its end; NVMStartS the same with overlayfs on NVM.
	StartS    float64 `json:"start_s"`
	NVMStartS float64 `json:"nvm_start_s"`
}

// hotLink is the bandwidth over which the image comes.
const hotLink = "100Mbit"

// startCommand opens some programs of the image and ends.
func (b *bench) startCommand() []string {
	if b.options.size == small {
		return []string{"sh", "-c", "cat /data/1/* | wc -c"}
	}
	return []string{"sh", "-c", "java -version && python3 -c 'import json, http.client' && redis-server --version"}
}

func (b *bench) measureHot(ctx context.Context, imageOf string) (all []hotRun, err error) {
	for round := 1; round <= b.options.rounds; round++ {
		r := hotRun{Round: round, Image: imageOf}
		if err := b.hotStart(ctx, &r); err != nil {
			return nil, fmt.Errorf("known profile, round %d: %w", round, err)
		}
		v, _ := variantByName(overlayNVM)
		err := b.withRig(ctx, v, imageOf, func(g *rig.Rig, s *stand) (err error) {
			if err := b.coldPull(ctx, g, s); err != nil {
				return err
			}
			r.NVMStartS, err = b.timedStart(ctx, g)
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("overlayfs on NVM, round %d: %w", round, err)
		}
		b.say("known profile, round %d: %.1f of %.1f MB in place, first start %.2f s, overlayfs on NVM %.2f s", round, float64(r.InPlaceBytes)/1e6,
			float64(r.HotBytes)/1e6, r.StartS, r.NVMStartS)
		all = append(all, r)
	}
	return all, nil
}

// hotStart has a start teach the daemon what is hot; then it pulls the image anew, once to see what is in place and once to
// start it at once.
func (b *bench) hotStart(ctx context.Context, r *hotRun) error {
	v, _ := variantByName(hybrid)
	return b.withRig(ctx, v, r.Image, func(g *rig.Rig, s *stand) (err error) {
		client, done, err := control.Dial(g.ControlSocket())
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, done()) }()
		w, err := newWatcher(g)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, w.close()) }()
		if err := g.Pull(ctx, imageName); err != nil {
			return err
		}
		if _, err := b.timedStart(ctx, g); err != nil {
			return err
		}
		if err := awaitProfile(ctx, client); err != nil {
			return err
		}
		for _, then := range []func() error{
			func() (err error) {
				r.HotBytes, r.InPlaceBytes, err = inPlace(ctx, client, g)
				return err
			},
			func() (err error) {
				r.StartS, err = b.timedStart(ctx, g)
				return err
			},
		} {
			if _, err := g.Ctr(ctx, "images", "rm", "--sync", g.Ref(imageName)); err != nil {
				return err
			}
			if err := w.await(ctx, empty); err != nil {
				return err
			}
			if err := errors.Join(b.coldPull(ctx, g, s), then()); err != nil {
				return err
			}
		}
		return nil
	})
}

// withRig runs f with a rig of its own on disks of its own, to whose registry the image was pushed.
func (b *bench) withRig(ctx context.Context, v variant, imageOf string, f func(*rig.Rig, *stand) error) (err error) {
	s, err := newStand(ctx, filepath.Join(b.dir, "f"), b.sizes)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	rate, err := linkRate(hotLink)
	if err != nil {
		return err
	}
	o := b.rigOptions(s, v, rate)
	o.DaemonArgs = append(o.DaemonArgs, "--set", "hot.quiet=1s")
	g, err := rig.Start(ctx, o)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil && ctx.Err() == nil && g.Daemon != nil {
			err = fmt.Errorf("%w\nthe end of the daemon's log:\n%s", err, g.Daemon.LogTail(3000))
		}
		err = errors.Join(err, g.Close())
	}()
	if err := g.Push(ctx, imageName, b.images[imageOf]); err != nil {
		return err
	}
	return f(g, s)
}

// coldPull pulls the image onto an armed disk with nothing cached.
func (b *bench) coldPull(ctx context.Context, g *rig.Rig, s *stand) error {
	if err := s.arm(); err != nil {
		return err
	}
	if err := lab.DropCaches(b.options.dropCaches); err != nil {
		return err
	}
	return g.Pull(ctx, imageName)
}

func (b *bench) timedStart(ctx context.Context, g *rig.Rig) (seconds float64, err error) {
	start := time.Now()
	_, err = g.RunContainer(ctx, imageName, "hot", b.startCommand()...)
	return time.Since(start).Seconds(), err
}

// awaitProfile waits until a start is recorded and no other is open.
func awaitProfile(ctx context.Context, client control.Client) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	top, err := client.Top(ctx, &control.TopRequest{IntervalMilliseconds: 200})
	if err != nil {
		return fmt.Errorf("watch starts: %w", err)
	}
	for {
		s, err := top.Recv()
		if err != nil {
			return fmt.Errorf("wait for the record of a start: %w", err)
		}
		if s.GetTraceError() != "" {
			return fmt.Errorf("starts are not traced here: %s", s.GetTraceError())
		}
		if s.GetStartsTotal() > 0 && len(s.GetStarts()) == 0 {
			return nil
		}
	}
}

// empty is satisfied when no snapshot is left.
func empty(s *control.StatusResponse) error {
	if n := s.GetCommitted(); n > 0 {
		return fmt.Errorf("%d layers are still there", n)
	}
	return settled(s)
}

// inPlace sums up the hot files of the image, and what of them stands on NVM.
func inPlace(ctx context.Context, client control.Client, g *rig.Rig) (hot, there int64, err error) {
	files, err := client.Files(ctx, &control.FilesRequest{Image: g.Ref(imageName), Namespace: g.Namespace})
	if err != nil {
		return 0, 0, fmt.Errorf("list files of the image: %w", err)
	}
	for {
		batch, err := files.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return 0, 0, fmt.Errorf("list files of the image: %w", err)
		}
		for _, f := range batch.GetFiles() {
			if f.GetHot() {
				hot += f.GetSize()
				there += min(f.GetSize(), f.GetNvmBytes())
			}
		}
	}
	if hot == 0 {
		return 0, 0, errors.New("no file of the image is known to be hot")
	}
	return hot, there, nil
}

func hotFigures(all []hotRun, set func(string, float64)) {
	var shares, starts []float64
	for _, r := range all {
		shares = append(shares, float64(r.InPlaceBytes)/float64(r.HotBytes))
		starts = append(starts, r.StartS/r.NVMStartS)
	}
	set("hot_in_place", result.Median(shares))
	set("first_start_after_pull_vs_nvm", result.Median(starts))
}
