// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nhybrid/nhybrid/snapshotter/control"
)

func (a *app) status() *cobra.Command {
	return &cobra.Command{
		Use: "status", Short: "Show how the daemon and its tiers are", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return a.with(func(client control.Client) error {
				r, err := client.Status(c.Context(), &control.StatusRequest{})
				if err != nil {
					return err
				}
				if a.json {
					return a.printMessage(r)
				}
				return a.printStatus(r, time.Now())
			})
		},
	}
}

func (a *app) printStatus(r *control.StatusResponse, now time.Time) error {
	k := r.GetKernel()
	kernel := []string{k.GetRelease()}
	switch {
	case k.GetFileBacked() && (k.GetStackOk() || !k.GetLoop()):
		kernel = append(kernel, "views from files")
	default:
		kernel = append(kernel, "views through loop devices")
	}
	if k.GetMetacopy() {
		kernel = append(kernel, "metacopy=on")
	}
	if !k.GetIdMap() {
		kernel = append(kernel, "no id-mapped views")
	}
	containerd := r.GetContainerd().GetAddress() + ", "
	if r.GetContainerd().GetReachable() {
		containerd += r.GetContainerd().GetVersion()
	} else {
		containerd += "not reachable: " + control.Message(cause(r.GetContainerd().GetError()))
	}
	rows := [][]string{
		{"version", strings.TrimSpace(r.GetVersion() + " " + r.GetRevision())},
		{"process", fmt.Sprintf("%d, up %s", r.GetPid(), now.Sub(r.GetStarted().AsTime()).Round(time.Second))},
		{"address", r.GetAddress()},
		{"containerd", containerd},
		{"kernel", strings.Join(kernel, ", ")},
		{"policy", r.GetPolicy()},
		{"snapshots", fmt.Sprintf("%d committed (%d not durable yet), %d active", r.GetCommitted(), r.GetNotDurable(), r.GetActive())},
		{"pulls", strconv.FormatInt(r.GetPulls(), 10)},
	}
	for _, q := range r.GetQueues() {
		line := fmt.Sprintf("%d waiting, %d running", q.GetWaiting(), q.GetRunning())
		if q.GetFailed() > 0 {
			line += fmt.Sprintf(", %d failed: %s", q.GetFailed(), control.Message(q.GetLastError()))
		}
		rows = append(rows, []string{"queue " + q.GetName(), line})
	}
	if err := a.table(rows); err != nil {
		return err
	}
	fmt.Fprintln(a.out)
	rows = [][]string{{"TIER", "ROOT", "FILESYSTEM", "USED", "FREE", "RESERVE", "SIZE", "INODES FREE", "DAX", "QUOTA"}}
	for _, t := range r.GetTiers() {
		rows = append(rows, []string{
			t.GetName(), t.GetRoot(), strings.TrimSpace(t.GetFilesystem() + " " + t.GetDevice()),
			a.size(t.GetUsed()), a.size(t.GetFree()), a.size(t.GetReserve()), a.size(t.GetTotal()), inodes(t), yes(t.GetDax()), yes(t.GetQuota()),
		})
	}
	if err := a.table(rows); err != nil {
		return err
	}
	for _, w := range r.GetWarnings() {
		fmt.Fprintln(a.out, "warning:", control.Message(w))
	}
	return nil
}

// inodes says how many a tier has left, and of how many.
func inodes(t *control.Tier) string {
	if t.GetInodes() == 0 {
		return "no limit"
	}
	return strings.TrimSpace(strconv.FormatInt(t.GetInodesFree(), 10) + percent(t.GetInodesFree(), t.GetInodes()))
}

func (a *app) ls() *cobra.Command {
	var labels, count bool
	c := &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List the snapshots and where they stand", Args: cobra.NoArgs,
		Long: "List the snapshots and where they stand. What containers have written is counted with --size only, since that walks the directory of each.",
		RunE: func(c *cobra.Command, _ []string) error {
			var all []*control.Snapshot
			err := a.with(func(client control.Client) error {
				stream, err := client.List(c.Context(), &control.ListRequest{Namespace: a.namespace, Count: count})
				if err != nil {
					return err
				}
				return receive(c.Context(), stream, func(s *control.Snapshot) error { all = append(all, s); return nil })
			})
			if err != nil {
				return err
			}
			if a.json {
				return printList(a, all)
			}
			if err := a.table(a.snapshotRows(all, labels)); err != nil {
				return err
			}
			seen := map[string]bool{}
			for _, s := range all {
				if id := cmp.Or(s.GetLayer(), s.GetId()); s.GetError() != "" && !seen[id] {
					seen[id] = true
					a.printUnusable(id, s.GetError())
				}
			}
			return nil
		},
	}
	c.Flags().BoolVar(&labels, "labels", false, "show labels too")
	c.Flags().BoolVarP(&count, "size", "s", false, "count what containers have written")
	return c
}

func (a *app) snapshotRows(all []*control.Snapshot, labels bool) [][]string {
	head := []string{"ID", "NAMESPACE", "NAME", "PARENT", "KIND", "LAYER", "TIER", "NVM", "HDD", "INODES", "VIEW", "STATE", "IMAGES"}
	if labels {
		head = append(head, "LABELS")
	}
	byKey := map[string]string{}
	for _, s := range all {
		byKey[s.GetKey()] = s.GetId()
	}
	rows := [][]string{head}
	for _, s := range all {
		row := []string{
			s.GetId(), s.GetNamespace(), control.Short(s.GetName()), orDash(byKey[s.GetParent()]), s.GetKind(), orDash(s.GetLayer()),
			orDash(s.GetTier()), known(s.NvmBytes, a.size), known(s.HddBytes, a.size), known(s.Inodes, decimal), a.size(s.GetViewBytes()),
			state(s.GetState(), s.GetError()), orDash(strings.Join(s.GetImages(), " ")),
		}
		if labels {
			var l []string
			for k, v := range s.GetLabels() {
				l = append(l, k+"="+v)
			}
			row = append(row, orDash(strings.Join(sorted(l), " ")))
		}
		rows = append(rows, row)
	}
	return rows
}

// known writes a number, or a dash where it was not counted.
func known(n *int64, write func(int64) string) string {
	if n == nil {
		return "-"
	}
	return write(*n)
}

func decimal(n int64) string { return strconv.FormatInt(n, 10) }

// state is how far a layer has come, or that it cannot be used.
func state(state, trouble string) string {
	if trouble != "" {
		return "unusable"
	}
	return orDash(state)
}

// printUnusable says below a table why a layer of it cannot be used.
func (a *app) printUnusable(layer, trouble string) {
	fmt.Fprintf(a.out, "warning: layer %s cannot be used: %s\n", layer, control.Message(trouble))
}

func (a *app) inspect() *cobra.Command {
	var files bool
	var o heatOptions
	c := &cobra.Command{
		Use: "inspect IMAGE|SNAPSHOT", Short: "Show the layers of an image or of a snapshot, or the heat of an image's files",
		Long: "Show the layers of an image, or those under a snapshot, bottom first.\nA snapshot is named by its key, its id, its chain ID or the start of that.\n\n" +
			"With --files show by directory, everything below it summed up, what belongs on NVM (hot) and what stands there.",
		Example: "  nhybridctl inspect docker.io/library/python:3\n  nhybridctl inspect --files docker.io/library/python:3 --path /usr/lib --depth 1 --sort hot",
		Args:    cobra.ExactArgs(1), ValidArgsFunction: a.images,
		RunE: func(c *cobra.Command, args []string) error {
			if files {
				return a.printHeat(c.Context(), args[0], o)
			}
			for _, name := range []string{"depth", "all", "path", "sort"} {
				if c.Flags().Changed(name) {
					return usage("inspect: --" + name + " is for --files")
				}
			}
			return a.with(func(client control.Client) error {
				r, err := client.Inspect(c.Context(), &control.InspectRequest{Ref: args[0], Namespace: a.namespace})
				if err != nil {
					return err
				}
				if a.json {
					return a.printMessage(r)
				}
				return a.printInspect(r)
			})
		},
	}
	f := c.Flags()
	f.BoolVar(&files, "files", false, "show the heat of the image's files")
	f.IntVar(&o.depth, "depth", 2, "with --files: levels of directories")
	f.BoolVar(&o.all, "all", false, "with --files: all directories and files")
	f.StringVar(&o.path, "path", "", "with --files: only this directory of the image, with the files in it")
	f.StringVar(&o.sort, "sort", "path", "with --files: "+strings.Join(heatSorts, ", "))
	_ = c.RegisterFlagCompletionFunc("sort", cobra.FixedCompletions(heatSorts, cobra.ShellCompDirectiveNoFileComp)) // fails for unknown flags only
	return c
}

func (a *app) printInspect(r *control.InspectResponse) error {
	var nvm, hdd int64
	for _, l := range r.GetLayers() {
		nvm, hdd = nvm+l.GetNvmBytes(), hdd+l.GetHddBytes()
	}
	var rows [][]string
	if r.GetImage() != "" {
		rows = append(rows, []string{"image", r.GetImage()}, []string{"digest", r.GetDigest()})
	}
	rows = append(rows, []string{"namespace", r.GetNamespace()})
	if s := r.GetSnapshot(); s != nil {
		rows = append(rows, []string{"snapshot", fmt.Sprintf("%s, %s, %s", s.GetId(), s.GetKind(), s.GetName())})
		if s.GetKind() == "active" && s.Inodes != nil { // nil: it has gone meanwhile
			rows = append(rows, []string{"writable", fmt.Sprintf("%s on %s, in %d inodes", a.size(s.GetNvmBytes()+s.GetHddBytes()), strings.ToUpper(s.GetTier()), s.GetInodes())})
		}
	}
	rows = append(rows, []string{"layers", fmt.Sprintf("%d, %s on NVM, %s on HDD", len(r.GetLayers()), a.size(nvm), a.size(hdd))})
	if err := a.table(rows); err != nil {
		return err
	}
	fmt.Fprintln(a.out)
	rows = [][]string{{"INDEX", "DIGEST", "SNAPSHOT", "LAYER", "COMPRESSED", "SIZE", "TIER", "NVM", "HDD", "LDL", "STATE", "WHY"}}
	for _, l := range r.GetLayers() {
		ldl := ""
		if l.GetLdl() {
			ldl = "last"
		}
		st := state(l.GetState(), l.GetError())
		if l.GetSnapshotId() == "" {
			st = "not unpacked"
		}
		size := "-" // not known yet
		if l.Stored() || l.GetUncompressed() > 0 {
			size = a.size(l.GetUncompressed())
		}
		rows = append(rows, []string{
			strconv.Itoa(int(l.GetIndex())), orDash(control.Short(l.GetDigest())), orDash(l.GetSnapshotId()), orDash(l.GetLayer()), a.size(l.GetCompressed()), size,
			orDash(l.GetTier()), a.size(l.GetNvmBytes()), a.size(l.GetHddBytes()), ldl, st, orDash(l.GetDecision().Cause()),
		})
	}
	if err := a.table(rows); err != nil {
		return err
	}
	for _, l := range r.GetLayers() {
		if l.GetError() != "" {
			a.printUnusable(l.GetLayer(), l.GetError())
		}
	}
	return nil
}

func (a *app) why() *cobra.Command {
	return &cobra.Command{
		Use: "why IMAGE [LAYER|PATH]", Short: "Tell why a layer or a file stands where it does",
		Long:    "Tell why the layers of an image stand where they do. A layer is named by its index from 0, the lowest, its digest, its chain ID or the\nstart of one of these; a path inside the image begins with /.",
		Example: "  nhybridctl why docker.io/library/python:3\n  nhybridctl why docker.io/library/python:3 2\n  nhybridctl why docker.io/library/python:3 /usr/local/bin/python3",
		Args:    cobra.RangeArgs(1, 2), ValidArgsFunction: a.images,
		RunE: func(c *cobra.Command, args []string) error {
			request := &control.WhyRequest{Image: args[0], Namespace: a.namespace}
			if len(args) == 2 {
				if strings.HasPrefix(args[1], "/") {
					request.Path = []byte(args[1])
				} else {
					request.Layer = args[1]
				}
			}
			return a.with(func(client control.Client) error {
				r, err := client.Why(c.Context(), request)
				if err != nil {
					return err
				}
				if a.json {
					return a.printMessage(r)
				}
				if f := r.GetFile(); f != nil {
					var from *control.Layer
					if len(r.GetLayers()) > 0 {
						from = r.GetLayers()[0]
					}
					fmt.Fprintln(a.out, f.Sentence(from, int(r.GetTotal())))
				}
				for _, l := range r.GetLayers() {
					fmt.Fprintln(a.out, l.Sentence(int(r.GetTotal())))
				}
				return nil
			})
		},
	}
}

func (a *app) du() *cobra.Command {
	return &cobra.Command{
		Use: "du", Short: "Show who occupies which tier", Args: cobra.NoArgs,
		Long: "Show what each image occupies on each tier. Own bytes would go with the image, shared ones stay with another.",
		RunE: func(c *cobra.Command, _ []string) error {
			return a.with(func(client control.Client) error {
				r, err := client.Usage(c.Context(), &control.UsageRequest{Namespace: a.namespace})
				if err != nil {
					return err
				}
				if a.json {
					return a.printUsageJSON(c.Context(), r)
				}
				if err := a.printUsage(r); err != nil {
					return err
				}
				return a.printRegionUsage(c.Context())
			})
		},
	}
}

func (a *app) printUsage(r *control.UsageResponse) error {
	rows := [][]string{{"IMAGE", "NAMESPACE", "LAYERS", "NVM OWN", "NVM SHARED", "HDD OWN", "HDD SHARED"}}
	for _, i := range r.GetImages() {
		rows = append(rows, []string{
			i.GetName(), i.GetNamespace(), strconv.Itoa(int(i.GetLayers())),
			a.size(i.GetNvmOwn()), a.size(i.GetNvmShared()), a.size(i.GetHddOwn()), a.size(i.GetHddShared()),
		})
	}
	if err := a.table(rows); err != nil {
		return err
	}
	fmt.Fprintln(a.out)
	rows = [][]string{{"TIER", "LAYERS", "WRITABLE", "VIEWS", "PARTS", "METADATA", "ORPHANS", "FREE", "SIZE"}}
	for _, t := range r.GetTiers() {
		rows = append(rows, []string{
			t.GetName(), a.size(t.GetLayers()), a.size(t.GetUppers()), a.size(t.GetViews()), a.size(t.GetParts()), a.size(t.GetMetadata()),
			a.size(t.GetOrphans()), a.size(t.GetFree()), a.size(t.GetTotal()),
		})
	}
	if err := a.table(rows); err != nil {
		return err
	}
	if len(r.GetOrphans()) == 0 {
		return nil
	}
	fmt.Fprintln(a.out)
	rows = [][]string{{"ORPHAN", "NVM", "HDD", "WHY"}}
	for _, o := range r.GetOrphans() {
		rows = append(rows, []string{o.GetKey(), a.size(o.GetNvmBytes()), a.size(o.GetHddBytes()), control.Message(o.GetReason())})
	}
	return a.table(rows)
}
