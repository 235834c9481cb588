// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/nhybrid/nhybrid/integration/bench/lab"
	"github.com/nhybrid/nhybrid/integration/bench/result"
)

func (o *options) run(ctx context.Context, progress io.Writer) (err error) {
	b := &bench{options: o, progress: progress, begun: time.Now()}
	found, err := lab.FindPrograms(o.bin)
	if err != nil {
		return err
	}
	r := &result.Result{
		Name: "scm", Command: lab.ShellCommand(), Machine: result.ThisMachine(), Targets: targets,
		Settings: map[string]any{
			"emulation": "mapped regions on tmpfs, files on ext4 on a loop device over tmpfs: one and the same DRAM",
			"huge":      o.huge, "rounds": o.rounds, "slices": o.slices, "slice_ms": o.slice.Milliseconds(), "array": o.array, "elements": o.elements, "stream_doubles": o.stream,
			"rows": o.rows, "redis_rounds": o.redisRounds, "redis_slices": o.redisSlices, "requests": o.requests, "clients": o.clients,
			"attachments": o.attachments, "effort": o.effort, "quick": o.quick,
		},
	}
	if r.Versions, err = result.Versions(ctx, found, "containerd", "ctr", "containerd-nhybrid-grpc"); err != nil {
		return err
	}
	for _, p := range []string{"libpmemobj-dev", "libsqlite3-dev", "redis-server"} {
		out, err := exec.CommandContext(ctx, "dpkg-query", "-W", "-f=${Version}", p).Output()
		if err != nil {
			return fmt.Errorf("the Debian package %s is missing (`make bench-scm` installs it): %w", p, err)
		}
		r.Versions[p] = string(out)
	}
	failed := b.measure(ctx)
	if ctx.Err() != nil { // what an earlier run has written stays
		return fmt.Errorf("interrupted; nothing was written: %w", ctx.Err())
	}
	if failed != nil {
		r.Notes = append(r.Notes, "not everything was measured: "+strings.ReplaceAll(failed.Error(), "\n", "; "))
	}
	r.Machine.LoadAfter = result.Load()
	b.fill(r)
	path, err := r.Write(o.out)
	if err != nil {
		return errors.Join(failed, err)
	}
	if len(b.micros) > 0 {
		if err := errors.Join(os.MkdirAll(filepath.Dir(o.svg), 0o755), os.WriteFile(o.svg, b.picture(), 0o644)); err != nil {
			return errors.Join(failed, err)
		}
	}
	b.say("wrote %s", path)
	return failed
}

// measure does the parts. One that fails does not keep the others from being done.
func (b *bench) measure(ctx context.Context) (err error) {
	o := b.options
	if o.does(partMicro) || o.does(partRedis) || o.does(partAttach) {
		if b.stand, err = newStand(ctx, o); err != nil {
			return err
		}
		b.say("emulated memory, containerd, daemon and image are ready")
		for _, p := range []struct {
			name string
			do   func(context.Context) error
		}{{partAttach, b.attachCost}, {partMicro, b.micro}, {partRedis, b.redisBench}} {
			if o.does(p.name) && ctx.Err() == nil {
				if perr := p.do(ctx); perr != nil {
					b.say("%s failed: %v", p.name, perr)
					err = errors.Join(err, fmt.Errorf("%s: %w", p.name, perr))
				}
			}
		}
		err = errors.Join(err, b.stand.Close())
	}
	if o.does(partCrash) && ctx.Err() == nil {
		if cerr := b.crashTests(ctx); cerr != nil {
			err = errors.Join(err, fmt.Errorf("%s: %w", partCrash, cerr))
		}
	}
	return errors.Join(err, ctx.Err())
}
