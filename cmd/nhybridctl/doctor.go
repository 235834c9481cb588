// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"

	"github.com/nhybrid/nhybrid/cmd/internal/config"
	"github.com/nhybrid/nhybrid/cmd/nhybridctl/doctor"
	"github.com/nhybrid/nhybrid/scmlib/region/api"
	"github.com/nhybrid/nhybrid/snapshotter/control"
)

func (a *app) doctor() *cobra.Command {
	var file, containerd, program, name string
	c := &cobra.Command{
		Use: "doctor", Short: "Look for what is wrong with the installation, and say the cure", Args: cobra.NoArgs,
		Long: "Look at the kernel (by trial mounts), at the filesystems of both tiers, at the daemon, its layers and its mounts, at\ncontainerd's images and at its configuration. Each finding is ok, warn or fail and one line; those that are not ok have a cure. The exit code is 1 if\nanything fails. Needs root. Nothing is changed: what the trials make in the tiers is gone when they end.",
		RunE: func(c *cobra.Command, _ []string) error {
			bar := a.steps(5, "looking")
			var all []doctor.Finding
			daemon := a.doctorDaemon(c.Context(), file)
			bar()
			if daemon.settings == nil {
				all = append(all, daemon.findings...)
			}
			if settings := daemon.settings; settings != nil {
				host := doctor.Host(*settings, !daemon.regionsOff)
				all = append(all, daemon.beside(host)...)
				bar()
				if daemon.pid > 0 {
					all = append(all, doctor.Namespaces(*settings, daemon.pid)...)
				}
				if daemon.containerd {
					ctx, cancel := context.WithTimeout(c.Context(), doctorTimeout)
					all = append(all, doctor.Blobs(ctx, *settings, name)...)
					cancel()
				}
				bar()
				whole, raw, err := doctor.Read(c.Context(), containerd, program)
				bar()
				if err != nil {
					all = append(all, doctor.Finding{Area: "containerd", Level: doctor.Fail, Text: control.ErrorMessage(err),
						Cure: "mend it, or name containerd's configuration with --containerd-config"})
				} else {
					all = append(all, doctor.Containerd(containerd, whole, raw, *settings, name, doctor.Fsync)...)
				}
			}
			bar()
			return a.printFindings(all)
		},
	}
	f := c.Flags()
	f.StringVar(&file, "config", os.Getenv("NHYBRID_CONFIG"), "nhybrid's configuration, where the daemon does not answer (default "+config.DefaultFile+" where it exists)")
	f.StringVar(&containerd, "containerd-config", "/etc/containerd/config.toml", "containerd's configuration")
	f.StringVar(&program, "containerd", "containerd", "containerd's program, to ask for its whole configuration; empty: read the file only")
	f.StringVar(&name, "name", "nhybrid", "the snapshotter's name in containerd")
	return c
}

// steps shows progress on a terminal; the result is called after each of n steps.
func (a *app) steps(n int, what string) func() {
	if _, _, ok := terminal(a.errs); !ok {
		return func() {}
	}
	bar := progressbar.NewOptions(n, progressbar.OptionSetWriter(a.errs), progressbar.OptionSetDescription(what), progressbar.OptionClearOnFinish())
	return func() { _ = bar.Add(1) } // an ornament
}

// doctorTimeout bounds what is asked of the daemon, and of containerd.
const doctorTimeout = 10 * time.Second

// daemon is what the daemon says of itself.
type daemon struct {
	findings []doctor.Finding
	// settings are its own, or without an answer those of the file; nil where they are no good.
	settings   *config.Config
	pid        int // 0: it does not answer
	containerd bool
	regionsOff bool
}

func (d *daemon) add(area string, level doctor.Level, text, cure string) {
	d.findings = append(d.findings, doctor.Finding{Area: area, Level: level, Text: control.Message(text), Cure: control.Message(cure)})
}

// doctorDaemon asks the daemon how it is.
func (a *app) doctorDaemon(ctx context.Context, file string) *daemon {
	d := &daemon{}
	ctx, cancel := context.WithTimeout(ctx, doctorTimeout)
	defer cancel()
	var status *control.StatusResponse
	var running *control.ConfigResponse
	var layers []*control.Snapshot
	err := a.with(func(client control.Client) (err error) {
		if status, err = client.Status(ctx, &control.StatusRequest{}); err != nil {
			return err
		}
		if running, err = client.Config(ctx, &control.ConfigRequest{}); err != nil {
			return err
		}
		stream, err := client.List(ctx, &control.ListRequest{})
		if err != nil {
			return err
		}
		return receive(ctx, stream, func(s *control.Snapshot) error { layers = append(layers, s); return nil })
	})
	if err != nil {
		d.add("daemon", doctor.Fail, control.ErrorMessage(err), "systemctl start nhybrid, and see journalctl -u nhybrid; or give --address")
		c, err := config.Load(file, os.Environ(), nil)
		if err != nil {
			d.add("config", doctor.Fail, control.ErrorMessage(err), "mend it; nhybridctl config default shows every key")
			return d
		}
		d.add("config", doctor.OK, "the configuration file is good", "")
		d.settings = &c
		return d
	}
	d.pid = int(status.GetPid())
	d.add("daemon", doctor.OK, fmt.Sprintf("%s answers as process %d, policy %s", status.GetVersion(), status.GetPid(), status.GetPolicy()), "")
	// Builds without a version in them have nothing to compare.
	if v, s := version, status.GetVersion(); v != s && v != "" && s != "" && s != "unknown" {
		d.add("daemon", doctor.Warn, fmt.Sprintf("the daemon is of version %s, nhybridctl of %s", status.GetVersion(), v), "restart the daemon; no container notices")
	}
	if k := status.GetContainerd(); k.GetReachable() {
		d.containerd = true
		d.add("daemon", doctor.OK, "it reaches containerd "+k.GetVersion(), "")
	} else {
		d.add("daemon", doctor.Fail, fmt.Sprintf("it does not reach containerd at %s: %s", k.GetAddress(), cause(k.GetError())), "start containerd, or set containerd.address")
	}
	for _, q := range status.GetQueues() {
		told := slices.ContainsFunc(status.GetWarnings(), func(w string) bool {
			return strings.Contains(w, "has failed and is tried again") || strings.Contains(w, "cannot be used")
		})
		if q.GetFailed() > 0 && !told {
			d.add("daemon", doctor.Warn, fmt.Sprintf("%d jobs of queue %s failed: %s", q.GetFailed(), q.GetName(), q.GetLastError()), "see the daemon's log")
		}
	}
	d.warnings(status.GetWarnings(), layers)
	d.findings = append(d.findings, doctor.Damaged(layers)...)
	c, err := config.Parse("the daemon's configuration", []byte(running.GetToml()))
	if err != nil {
		d.add("config", doctor.Fail, control.ErrorMessage(err), "use the nhybridctl that came with the daemon")
		return d
	}
	d.settings = &c
	return d
}

// beside puts what the daemon says of itself before host, what was found by looking. Both see the same lack of room: the daemon
// knows the reserve that holds, so its line stays, unless only host calls it a failure.
func (d *daemon) beside(host []doctor.Finding) []doctor.Finding {
	own := slices.DeleteFunc(slices.Clone(d.findings), func(f doctor.Finding) bool {
		return slices.ContainsFunc(host, func(h doctor.Finding) bool { return h.Level == doctor.Fail && sameShortage(f, h) })
	})
	return append(own, slices.DeleteFunc(slices.Clone(host), func(h doctor.Finding) bool {
		return slices.ContainsFunc(own, func(f doctor.Finding) bool { return sameShortage(f, h) })
	})...)
}

// sameShortage reports whether two findings name the same one of [store.Room.Shortages], perhaps with other numbers.
func sameShortage(daemon, host doctor.Finding) bool {
	name, _, _ := strings.Cut(daemon.Text, ":")
	other, _, _ := strings.Cut(host.Text, ":")
	tier, _, _ := strings.Cut(name, " ")
	return name == other && daemon.Area == "daemon" && host.Area == strings.ToLower(tier)
}

// warnings passes on what the daemon warns of, but for what doctor says itself of single layers.
func (d *daemon) warnings(all []string, layers []*control.Snapshot) {
	if len(all) == 0 {
		d.add("daemon", doctor.OK, "it warns of nothing", "")
	}
	for _, w := range all {
		switch {
		case strings.HasPrefix(w, api.NotServed):
			d.regionsOff = true
			text, cure := control.Cure(w)
			d.add("regions", doctor.Fail, "no container with a region starts: "+text, cmp.Or(cure, "mend what the reason names, and restart the daemon"))
		case strings.HasPrefix(w, "layer ") && slices.ContainsFunc(layers, func(s *control.Snapshot) bool {
			return s.GetError() != "" && strings.HasPrefix(w, "layer "+s.GetLayer()+" ")
		}):
		case strings.HasPrefix(w, control.OneFilesystem): // as Host says
		default:
			text, cure := control.Cure(w)
			d.add("daemon", doctor.Warn, text, cmp.Or(cure, "see the daemon's log"))
		}
	}
}

func (a *app) printFindings(all []doctor.Finding) error {
	count := map[doctor.Level]int{}
	for _, f := range all {
		count[f.Level]++
	}
	if a.json {
		if err := a.printJSON(map[string]any{"ok": count[doctor.Fail] == 0, "findings": all}); err != nil {
			return err
		}
	} else {
		for _, f := range all {
			fmt.Fprintf(a.out, "%-4s  %s: %s\n", f.Level, f.Area, f.Text)
			if f.Cure != "" {
				fmt.Fprintf(a.out, "      cure: %s\n", f.Cure)
			}
		}
		fmt.Fprintf(a.out, "\n%d ok, %d warnings, %d failures\n", count[doctor.OK], count[doctor.Warn], count[doctor.Fail])
	}
	if count[doctor.Fail] > 0 {
		return silent{}
	}
	return nil
}
