// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// hostUSC is where the header of a region has the count of unsafe shutdowns (docs/scm.md, header).
const hostUSC = 200

// unsafeShutdown shows what becomes of regions when memory has lost what it had promised to save. QEMU's module does not count that: then regions
// bear no stamp. For the rest of it a file takes the place of the kernel's.
func (g *guest) unsafeShutdown(ctx context.Context) (err error) {
	if found, err := filepath.Glob("/sys/bus/nd/devices/nmem*/nfit/dirty_shutdown"); err != nil || len(found) > 0 {
		return fmt.Errorf("this machine counts unsafe shutdowns in %v: %w", found, err)
	}
	if data, err := os.ReadFile(filepath.Join(logDir, "containerd-nhybrid-grpc")); err != nil || !strings.Contains(string(data), "does not count unsafe shutdowns") {
		return fmt.Errorf("the daemon has not said that unsafe shutdowns are not counted: %w", err)
	}
	if n, err := stampOf("container+default+ledger-go"); err != nil || n != 0 {
		return fmt.Errorf("a region is stamped with %d where nothing is counted: %w", n, err)
	}
	module, err := filepath.EvalSymlinks("/sys/bus/nd/devices/nmem0")
	if err != nil {
		return err
	}
	dir := filepath.Join(module, "nfit")
	if err := unix.Mount("counter", dir, "tmpfs", 0, ""); err != nil {
		return fmt.Errorf("mount a counter: %w", err)
	}
	defer func() { err = errors.Join(err, unix.Unmount(dir, 0), g.restartDaemon(ctx)) }()
	if err := g.count(ctx, dir, 3); err != nil {
		return err
	}
	c := container{"shaken"}
	if _, err := ctr(ctx, "run", "--detach", "--snapshotter", g.snapshotter, "--log-uri", "file://"+logDir+"/shaken-1", "--device", "nhybrid.io/scm=1m",
		g.image(), c.id, "/bin/ledger-go", "hold"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.remove(ctx)) }()
	// The first start makes it scmlib's; at the second it is stamped, and is cut off with the region open.
	if err := holds(ctx, "shaken-1"); err != nil {
		return err
	}
	if err := c.startAgain(ctx, "shaken-2"); err != nil {
		return err
	}
	if err := holds(ctx, "shaken-2"); err != nil {
		return err
	}
	if n, err := stampOf("container+default+shaken"); err != nil || n != 4 {
		return fmt.Errorf("with 3 unsafe shutdowns the stamp is %d, want 4: %w", n, err)
	}
	// As often as before: nothing was lost.
	if err := c.startAgain(ctx, "shaken-3"); err != nil {
		return err
	}
	if err := holds(ctx, "shaken-3"); err != nil {
		return err
	}
	if err := c.stop(ctx); err != nil {
		return err
	}
	if err := g.count(ctx, dir, 4); err != nil {
		return err
	}
	if err := c.startAgain(ctx, "shaken-4"); err != nil {
		return err
	}
	if err := holds(ctx, "shaken-4"); err == nil || !strings.Contains(err.Error(), "unsafe shutdown count was 4") {
		return fmt.Errorf("a region that was open when memory was lost is not refused: %w", err)
	}
	return nil
}

// stampOf reads the count of unsafe shutdowns from a region's file.
func stampOf(key string) (uint64, error) {
	f, err := os.Open(filepath.Join(nvm, "nhybrid/r/k", key, "data"))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var b [8]byte
	_, err = f.ReadAt(b[:], hostUSC)
	return binary.LittleEndian.Uint64(b[:]), err
}

// count sets the counter, which the daemon reads at its start.
func (g *guest) count(ctx context.Context, dir string, n int) error {
	if err := os.WriteFile(filepath.Join(dir, "dirty_shutdown"), fmt.Appendln(nil, n), 0o444); err != nil {
		return err
	}
	return g.restartDaemon(ctx)
}

func (g *guest) restartDaemon(ctx context.Context) error {
	if err := g.daemon.end(ctx, syscall.SIGTERM); err != nil {
		return err
	}
	return g.startDaemon(ctx)
}

// startAgain kills the container's process, if it runs, and starts it once more.
func (c container) startAgain(ctx context.Context, log string) error {
	_ = c.stop(ctx) // it may have ended by itself
	_, err := ctr(ctx, "tasks", "start", "--detach", "--log-uri", "file://"+filepath.Join(logDir, log), c.id)
	return err
}

// holds waits until a ledger has its region open; its error is what the ledger says.
func holds(ctx context.Context, log string) error {
	var failed error
	err := poll(ctx, func() error {
		data, err := os.ReadFile(filepath.Join(logDir, log))
		if err != nil {
			return err
		}
		f := readFacts(string(data))
		if why, ok := f["failed:"]; ok {
			failed = errors.New(why)
			return nil
		}
		if _, ok := f["holding"]; !ok {
			return fmt.Errorf("it does not have its region yet, and has said %q", data)
		}
		return nil
	})
	return errors.Join(err, failed)
}
