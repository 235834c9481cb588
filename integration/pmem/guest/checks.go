// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// common are the first checks of every boot: the machine and its services.
func (g *guest) common() []check {
	checks := []check{{"nvdimm", true, g.makeNamespace}}
	if g.boot == "first" {
		checks = append(checks,
			check{"filesystems-made", true, g.makeFilesystems},
			check{"scm-without-dax", false, g.withoutDAX},
		)
	}
	checks = append(checks,
		check{"tiers-mounted", true, g.mountTiers},
		check{"dax-mapping", false, g.daxMount},
		check{"persistence-domain", false, g.checkDomain},
		check{"scm-host", false, g.scmHost},
	)
	if g.nhybrid() {
		checks = append(checks, check{"daemon-starts", true, g.startDaemon})
	}
	return append(checks, check{"containerd-starts", true, g.startContainerd})
}

// first are the checks up to the power cut.
func (g *guest) first() []check {
	checks := append(g.common(), check{"scm-refused", false, scmRefused})
	if g.nhybrid() {
		checks = append(checks, check{"status", false, g.checkStatus}, check{"doctor", false, g.scmDoctor})
	}
	checks = append(checks, check{"pull", true, g.pull})
	if g.nhybrid() {
		checks = append(checks, check{"both-tiers-used", false, g.bothTiers})
	}
	checks = append(checks,
		check{"container-runs", true, g.runs},
		check{"user-by-name", false, g.namedUser},
		check{"whole-tree", false, g.wholeTree},
		check{"program-mapped-from-pmem", false, g.programMapping},
	)
	if g.nhybrid() {
		checks = append(checks,
			check{"durable", true, g.durable},
			check{"scm-container", false, g.scmContainer},
			check{"scm-volumes", true, makeVolumes},
			check{"scm-ledgers", true, g.startLedgers},
		)
	}
	return append(checks, check{"kernel-sound", false, kernelSound})
}

// regionsSurvive are the checks of persistent memory after a power cut, before anything works in it.
func (g *guest) regionsSurvive() []check {
	return []check{{"scm-list", false, scmList}, {"scm-check", false, g.scmCheck}}
}

// cutWorking are the checks of a boot that is cut off while programs work in persistent memory.
func (g *guest) cutWorking() []check {
	return append(append(g.common(), g.regionsSurvive()...),
		check{"scm-ledgers-start", true, g.startLedgersAgain},
		check{"scm-promises-kept", true, g.ledgersWork},
		check{"kernel-sound", false, kernelSound},
	)
}

// cutStarting are the checks of a boot that is cut off at some moment after them, while the ledgers are started and recover.
func (g *guest) cutStarting() []check {
	return append(append(g.common(), g.regionsSurvive()...),
		check{"doctor", false, g.scmDoctor},
		check{"scm-container", false, g.scmContainer},
		check{"kernel-sound", false, kernelSound},
	)
}

// second are the checks after the power cut.
func (g *guest) second() []check {
	checks := g.common()
	if g.nhybrid() {
		checks = append(append(checks, g.regionsSurvive()...),
			check{"scm-other-language", false, g.otherLanguage},
			check{"scm-ledgers-start", false, g.startLedgersAgain},
			check{"scm-promises-kept", false, g.ledgersWork},
		)
	}
	checks = append(checks,
		check{"image-survives", false, g.runs},
		check{"whole-tree", false, g.wholeTree},
		check{"program-mapped-from-pmem", false, g.programMapping},
		check{"commit-applied", false, func(ctx context.Context) error { return g.commit(ctx, true) }},
		check{"commit-upper", false, func(ctx context.Context) error { return g.commit(ctx, false) }},
	)
	if g.nhybrid() {
		checks = append(checks,
			check{"scm-unsafe-shutdown", false, g.unsafeShutdown},
			check{"scm-removed", false, removeLedgers},
			check{"daemon-killed", false, g.daemonKilled},
			check{"quota-nvm", false, func(ctx context.Context) error { return g.quota(ctx, "nvm") }},
			check{"quota-hdd", false, func(ctx context.Context) error { return g.quota(ctx, "hdd") }},
		)
	}
	checks = append(checks,
		check{"containerd-restarted", false, g.containerdRestarted},
		check{"images-removed", false, g.removeImages},
	)
	if g.nhybrid() {
		checks = append(checks, check{"tiers-empty", false, g.tiersEmpty})
	}
	return append(checks, check{"services-end", false, g.servicesEnd}, check{"kernel-sound", false, kernelSound})
}

func (g *guest) image() string { return g.registryHost + "/pmem:1" }

func (g *guest) nhybrid() bool { return g.snapshotter == "nhybrid" }

func (g *guest) pull(ctx context.Context) error {
	_, err := ctr(ctx, "images", "pull", "--plain-http", "--snapshotter", g.snapshotter, g.image())
	return err
}

// runs shows that the image is there and that a program from it runs.
func (g *guest) runs(ctx context.Context) error {
	const want = "changed: new"
	out, err := g.runOnce(ctx, "hello", nil, "/bin/sh", "-c", "echo changed: $(cat /data/changed)")
	if err != nil {
		return err
	}
	if got := strings.TrimSpace(out); got != want {
		return fmt.Errorf("the container said %q, want %q", got, want)
	}
	return nil
}

// namedUser runs a program as a user whose number only the image knows; containerd looks it up without mounting anything.
func (g *guest) namedUser(ctx context.Context) error {
	const want = "uid=1000(worker) gid=1000(workers) groups=1000(workers),2000(crew)"
	out, err := g.runOnce(ctx, "worker", []string{"--user", "worker"}, "/bin/id")
	if err != nil {
		return err
	}
	if got := strings.TrimSpace(out); got != want {
		return fmt.Errorf("the container says %q, want %q", got, want)
	}
	return nil
}

// wholeTree compares each file that a container sees with what the layers say.
func (g *guest) wholeTree(ctx context.Context) error {
	c, err := g.startContainer(ctx, "tree", g.image(), nil)
	if err != nil {
		return err
	}
	return errors.Join(c.compare(g.expected), c.remove(ctx))
}

// programMapping runs the same program from both tiers: its text must be mapped from the NVDIMM where its layer stands on NVM, and from the page
// cache where it stands on HDD. The latter only on the first boot: what has been run is hot, and the daemon then takes it to NVM.
func (g *guest) programMapping(ctx context.Context) error {
	programs := []string{"/bin/probe-top"}
	if g.boot == "first" {
		programs = append(programs, "/bin/probe-base")
	}
	if g.nhybrid() {
		// Else the one leaves NVM as soon as a start has shown that it is cold, and the other comes there when one has used it.
		if err := errors.Join(g.keepOn(ctx, "nvm", "/bin/probe-top"), g.keepOn(ctx, "hdd", "/bin/probe-base")); err != nil {
			return err
		}
	}
	for _, program := range programs {
		out, err := g.runOnce(ctx, "probe", []string{"--privileged"}, program)
		if err != nil {
			return err
		}
		for _, kind := range []string{"text", "file"} {
			// With another snapshotter there is one tier.
			if err := g.checkProbe(out, kind, program == "/bin/probe-top" || !g.nhybrid()); err != nil {
				return fmt.Errorf("%s: %w", program, err)
			}
		}
	}
	return nil
}

// daemonKilled kills the daemon under a running container, which must not notice, and starts it again.
func (g *guest) daemonKilled(ctx context.Context) error {
	c, err := g.startContainer(ctx, "survivor", g.image(), nil)
	if err != nil {
		return err
	}
	if _, err := c.exec(ctx, "/bin/sh", "-c", "echo before >/data/before"); err != nil {
		return err
	}
	if err := g.daemon.end(ctx, syscall.SIGKILL); err != nil {
		return err
	}
	// Neither what is open nor what was never touched may need the daemon.
	alone, aloneErr := c.exec(ctx, "/bin/cat", "/data/changed", "/data/kinds/first", "/data/before")
	if err := g.startDaemon(ctx); err != nil {
		return err
	}
	if aloneErr != nil {
		return fmt.Errorf("without the daemon: %w", aloneErr)
	}
	if want := "new\ntwo names\nbefore\n"; alone != want {
		return fmt.Errorf("without the daemon the container reads %q, want %q", alone, want)
	}
	if out, err := c.exec(ctx, "/bin/cat", "/data/before"); err != nil || out != "before\n" {
		return fmt.Errorf("with a new daemon the container reads %q (%w)", out, err)
	}
	return errors.Join(g.runs(ctx), c.remove(ctx))
}

// containerdRestarted does the same with containerd, in good order.
func (g *guest) containerdRestarted(ctx context.Context) error {
	c, err := g.startContainer(ctx, "stayer", g.image(), nil)
	if err != nil {
		return err
	}
	if err := g.containerd.end(ctx, syscall.SIGTERM); err != nil {
		return err
	}
	if err := g.startContainerd(ctx); err != nil {
		return err
	}
	out, err := c.exec(ctx, "/bin/cat", "/data/changed")
	if err != nil {
		return err
	}
	if out != "new\n" {
		return fmt.Errorf("after the restart the container reads %q, want %q", out, "new\n")
	}
	return errors.Join(c.compare(g.expected), c.remove(ctx))
}

// removeImages removes all images and waits until containerd has no snapshot left.
func (g *guest) removeImages(ctx context.Context) error {
	out, err := ctr(ctx, "images", "ls", "--quiet")
	if err != nil {
		return err
	}
	images := strings.Fields(out)
	if len(images) == 0 {
		return fmt.Errorf("list images: %w", errNone)
	}
	if _, err := ctr(ctx, append([]string{"images", "rm", "--sync"}, images...)...); err != nil {
		return err
	}
	return poll(ctx, func() error {
		out, err := ctr(ctx, "snapshots", "--snapshotter", g.snapshotter, "ls")
		if err != nil {
			return err
		}
		if lines := strings.Split(strings.TrimSpace(out), "\n"); len(lines) > 1 {
			return fmt.Errorf("%d snapshots are left", len(lines)-1)
		}
		return nil
	})
}

// servicesEnd ends both services in good order and takes the tiers off, which works only when nothing holds them.
func (g *guest) servicesEnd(ctx context.Context) error {
	if err := g.containerd.end(ctx, syscall.SIGTERM); err != nil {
		return err
	}
	if g.daemon != nil {
		if err := g.daemon.end(ctx, syscall.SIGTERM); err != nil {
			return err
		}
		if code := g.daemon.cmd.ProcessState.ExitCode(); code != 0 {
			return fmt.Errorf("the daemon ended with %v", g.daemon.cmd.ProcessState)
		}
	}
	for _, tier := range []string{nvm, hdd} {
		mounts, err := mountsBelow(tier)
		if err != nil {
			return err
		}
		if len(mounts) > 0 {
			return fmt.Errorf("still mounted: %s", strings.Join(mounts, " "))
		}
		if err := poll(ctx, func() error { return unix.Unmount(tier, 0) }); err != nil {
			return fmt.Errorf("unmount %s: %w", tier, err)
		}
	}
	return nil
}

// kernelSound shows that the kernel has not complained: where it lost a thread of the daemon, all else may seem well.
func kernelSound(ctx context.Context) error {
	out, err := output(ctx, "busybox", "dmesg")
	if err != nil {
		return err
	}
	for line := range strings.Lines(out) {
		for _, word := range []string{"BUG:", "Oops", "WARNING:", "blocked for more than", "rcu_preempt detected stalls"} {
			if strings.Contains(line, word) {
				return fmt.Errorf("the kernel says %q", strings.TrimSpace(line))
			}
		}
	}
	return nil
}

func mountsBelow(dir string) ([]string, error) {
	data, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return nil, err
	}
	var found []string
	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); len(f) > 1 && strings.HasPrefix(f[1], filepath.Clean(dir)+"/") {
			found = append(found, f[1])
		}
	}
	return found, nil
}
