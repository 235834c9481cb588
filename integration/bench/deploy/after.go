// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/nhybrid/nhybrid/integration/bench/lab"
	"github.com/nhybrid/nhybrid/integration/rig"
)

// writeBack is how long layers took from NVM to HDD.
type writeBack struct {
	Bytes   int64   `json:"bytes"`
	Seconds float64 `json:"seconds"` // from the daemon's start with write-back on
}

// afterwards measures what the daemon does and keeps when nobody wants anything of it.
func (b *bench) afterwards(ctx context.Context, g *rig.Rig, r *run) (err error) {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(b.options.idle):
	}
	idle, err := lab.MemoryOf(g.Daemon.Pid())
	if err != nil {
		return err
	}
	r.DaemonIdle = &idle
	if r.NVMDataBytes == 0 {
		return nil
	}

	if err := g.Daemon.Stop(); err != nil {
		return err
	}
	path := filepath.Join(g.Dir, "nhybrid.toml")
	config, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	on := strings.Replace(string(config), "write_back = false", "write_back = true", 1)
	if on == string(config) {
		return fmt.Errorf("%s: no \"write_back = false\" to change", path)
	}
	if err := os.WriteFile(path, []byte(on), 0o644); err != nil {
		return err
	}
	if err := g.Daemon.Start(ctx); err != nil {
		return err
	}
	start := time.Now()
	w, err := newWatcher(g)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	if err := w.awaitHome(ctx, g.Namespace); err != nil {
		return err
	}
	r.WriteBack = &writeBack{Bytes: r.NVMDataBytes, Seconds: time.Since(start).Seconds()}
	return nil
}
