// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/integration/rig"
	"github.com/nhybrid/nhybrid/placement"
	"github.com/nhybrid/nhybrid/snapshotter/control"
)

const (
	imageName = "demo:1"
	nvmSize   = 1 << 30 // emulated; memory is taken only for what is stored
	// watchEnd is how long the view may take to show the end of a pull that is over.
	watchEnd = 5 * time.Second
)

// demo runs the whole show. It takes down what it has set up, however it ends.
func demo(ctx context.Context, o options) (err error) {
	began := time.Now()
	if o.held {
		unix.CloseOnExec(readyFD) // else every process that is started keeps it open
	}
	p, err := openPlace(o.name)
	if errors.Is(err, errBusy) {
		down, err := takeDown(o)
		return errors.Join(fmt.Errorf("one runs already (process %d); take it down with: %s", p.note.Pid, down), err)
	} else if err != nil {
		return err
	}
	if p.leftovers() {
		say("Removing what a demo that was killed has left in %s", p.dir)
		if err := p.remove(); err != nil {
			return err
		}
		return demo(ctx, o)
	}
	defer func() {
		interrupted := ctx.Err() != nil && err != nil
		if removeErr := p.remove(); removeErr != nil {
			err = errors.Join(err, fmt.Errorf("take down: %w", removeErr))
		} else if interrupted {
			err = errors.New("interrupted; everything is taken down")
		}
	}()
	if err := p.enter(); err != nil {
		return err
	}
	if err := os.MkdirAll(o.out, 0o755); err != nil {
		return err
	}

	recipe := packagesRecipe
	if o.tiny {
		recipe = tinyRecipe
	}
	say("Image: %d layers %s", len(recipe.names), recipe.about)
	img, err := recipe.build(ctx, filepath.Join(o.out, "cache"))
	if err != nil {
		return fmt.Errorf("make image: %w", err)
	}

	r, err := p.start(ctx, o)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil && ctx.Err() == nil {
			err = fmt.Errorf("%w\n%s\n%s", err, r.Daemon.LogTail(4000), r.Containerd.LogTail(4000))
		}
		err = errors.Join(err, r.Close())
	}()
	if err := r.Push(ctx, imageName, img); err != nil {
		return err
	}
	client, done, err := control.Dial(r.ControlSocket())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, done()) }()
	status, err := client.Status(ctx, &control.StatusRequest{})
	if err != nil {
		return fmt.Errorf("ask the daemon for its status: %w", err)
	}
	introduce(status)

	say("Pulling %s at %s", r.Ref(imageName), placement.FormatRate(must(placement.ParseRate(o.rate))))
	report := &report{Policy: status.GetPolicy()}
	if err := report.pull(ctx, client, r, img); err != nil {
		return err
	}
	report.printTable(recipe.names)
	report.printPull()

	say("Running a container")
	if report.First, err = runContainer(ctx, r, recipe.command); err != nil {
		return err
	}
	report.First.print()
	say("Waiting until the start is recorded, and the files that it opened are on NVM, the others not")
	if err := report.settle(ctx, client, r); err != nil {
		return err
	}
	say("Running it again")
	if report.Second, err = runContainer(ctx, r, recipe.command); err != nil {
		return err
	}
	report.Second.print()
	report.printStarts()
	file := filepath.Join(o.out, "demo.json")
	if err := report.write(file); err != nil {
		return err
	}
	say("The same is in %s. It took %.1f s.", relative(file), time.Since(began).Seconds())
	if !o.keep {
		return nil
	}
	if err := printTry(ctx, r, recipe, o); err != nil {
		return err
	}
	return hold(ctx)
}

// start makes the tiers and runs registry, link, daemon and containerd.
func (p *place) start(ctx context.Context, o options) (*rig.Rig, error) {
	say("Tiers, daemon, containerd, registry in %s", p.dir)
	rate, err := placement.ParseRate(o.rate)
	if err != nil {
		return nil, err
	}
	ro := rig.Options{
		Dir: p.dir, NVMSize: nvmSize, Rate: rate, Latency: 2 * time.Millisecond, CRI: o.keep,
		// One JSON object a line, so that what is shown of the log needs no guessing.
		DaemonConfig: "log_format = 'json'\n",
		DaemonArgs:   []string{"--set", "hot.quiet=" + quiet.String()},
	}
	if o.policy != "" {
		ro.DaemonArgs = append(ro.DaemonArgs, "--set", "placement.policy="+o.policy)
	}
	if o.nvm != "" {
		if ro.NVM, err = p.tier("NVM", o.nvm); err != nil {
			return nil, err
		}
	}
	if o.hdd != "" {
		ro.HDD, err = p.tier("HDD", o.hdd)
	} else {
		ro.HDD, err = p.emulatedHDD(ctx)
	}
	if err != nil {
		return nil, err
	}
	r, err := rig.Start(ctx, ro)
	if err != nil {
		return nil, fmt.Errorf("start: %w", err)
	}
	return r, nil
}

// watchPull pulls the image while nhybridctl shows it, by the daemon's own account.
func watchPull(ctx context.Context, r *rig.Rig) error {
	watch, err := r.Command(ctx, "nhybridctl", "watch", "--once")
	if err != nil {
		return err
	}
	// Not killed with the pull: what it has drawn stays whole.
	watch.Cancel = func() error { return watch.Process.Signal(syscall.SIGTERM) }
	var complaint bytes.Buffer
	watch.Stdout, watch.Stderr = os.Stdout, &complaint
	if err := watch.Start(); err != nil {
		return fmt.Errorf("start nhybridctl watch: %w", err)
	}
	shown := make(chan struct{})
	var shownErr error // of when shown is closed
	go func() { shownErr = watch.Wait(); close(shown) }()

	pullErr := r.Pull(ctx, imageName)
	if pullErr != nil {
		_ = watch.Process.Signal(syscall.SIGTERM) // there may be no end to show
	}
	select {
	case <-shown:
	case <-time.After(watchEnd):
		// A pull that was over before the view began has no end to show.
		_ = watch.Process.Kill()
		<-shown
	}
	var exit *exec.ExitError
	if pullErr == nil && errors.As(shownErr, &exit) && complaint.Len() > 0 {
		return fmt.Errorf("nhybridctl watch: %w: %s", shownErr, strings.TrimSpace(complaint.String()))
	}
	return pullErr
}

func say(format string, args ...any) { line("\n== "+format, args...) }

func line(format string, args ...any) { fmt.Printf(format+"\n", args...) }

func must[T any](v T, _ error) T { return v } // of what was checked before

// relative is a path as a person in the working directory would write it.
func relative(path string) string {
	if wd, err := os.Getwd(); err == nil {
		if rel, err := filepath.Rel(wd, path); err == nil && !strings.HasPrefix(rel, "..") {
			return rel
		}
	}
	return path
}
