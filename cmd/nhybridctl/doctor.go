// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
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
		Long: "Look at the kernel (by trial mounts), at the filesystems of both tiers, at the daemon and at containerd's\nconfiguration. Each finding is ok, warn or fail and one line; those that are not ok have a cure. The exit code is 1 if\nanything fails. Needs root. Nothing is changed: what the trials make in the tiers is gone when they end.",
		RunE: func(c *cobra.Command, _ []string) error {
			bar := a.steps(4, "looking")
			var all []doctor.Finding
			settings, found := a.doctorDaemon(c.Context(), file)
			all = append(all, found...)
			bar()
			if settings != nil {
				served := !slices.ContainsFunc(found, func(f doctor.Finding) bool { return f.Area == "regions" && f.Level == doctor.Fail })
				all = append(all, doctor.Host(*settings, served)...)
				bar()
				whole, raw, err := doctor.Read(c.Context(), containerd, program)
				bar()
				if err != nil {
					all = append(all, doctor.Finding{Area: "containerd", Level: doctor.Fail, Text: plain(err),
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

// doctorDaemon asks the daemon how it is. Its own configuration counts; without an answer that of the file does.
func (a *app) doctorDaemon(ctx context.Context, file string) (*config.Config, []doctor.Finding) {
	var all []doctor.Finding
	add := func(area string, level doctor.Level, text, cure string) {
		all = append(all, doctor.Finding{Area: area, Level: level, Text: oneLine(text), Cure: oneLine(cure)})
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	var status *control.StatusResponse
	var running *control.ConfigResponse
	err := a.with(func(client control.Client) (err error) {
		if status, err = client.Status(ctx, &control.StatusRequest{}); err != nil {
			return err
		}
		running, err = client.Config(ctx, &control.ConfigRequest{})
		return err
	})
	if err != nil {
		add("daemon", doctor.Fail, plain(err), "systemctl start nhybrid, and see journalctl -u nhybrid; or give --address")
		c, err := config.Load(file, os.Environ(), nil)
		if err != nil {
			add("config", doctor.Fail, plain(err), "mend it; nhybridctl config default shows every key")
			return nil, all
		}
		add("config", doctor.OK, "the configuration file is good", "")
		return &c, all
	}
	add("daemon", doctor.OK, fmt.Sprintf("%s answers as process %d, policy %s", status.GetVersion(), status.GetPid(), status.GetPolicy()), "")
	// Builds without a version in them have nothing to compare.
	if v, s := version, status.GetVersion(); v != s && v != "" && s != "" && s != "unknown" {
		add("daemon", doctor.Warn, fmt.Sprintf("the daemon is of version %s, nhybridctl of %s", status.GetVersion(), v), "restart the daemon; no container notices")
	}
	if k := status.GetContainerd(); k.GetReachable() {
		add("daemon", doctor.OK, "it reaches containerd "+k.GetVersion(), "")
	} else {
		add("daemon", doctor.Fail, fmt.Sprintf("it does not reach containerd at %s: %s", k.GetAddress(), cause(k.GetError())), "start containerd, or set containerd.address")
	}
	for _, q := range status.GetQueues() {
		if q.GetFailed() > 0 {
			add("daemon", doctor.Warn, fmt.Sprintf("%d jobs of queue %s failed: %s", q.GetFailed(), q.GetName(), q.GetLastError()), "see the daemon's log")
		}
	}
	for _, w := range status.GetWarnings() {
		if strings.HasPrefix(w, api.NotServed) {
			add("regions", doctor.Fail, "no container with a region starts: "+w, "mend what the reason names, and restart the daemon; no container notices")
			continue
		}
		add("daemon", doctor.Warn, w, "")
	}
	if len(status.GetWarnings()) == 0 {
		add("daemon", doctor.OK, "it warns of nothing", "")
	}
	c, err := config.Parse("the daemon's configuration", []byte(running.GetToml()))
	if err != nil {
		add("config", doctor.Fail, plain(err), "use the nhybridctl that came with the daemon")
		return nil, all
	}
	return &c, all
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
