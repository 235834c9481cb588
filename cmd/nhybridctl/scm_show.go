// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	"github.com/nhybrid/nhybrid/scmlib/region"
	"github.com/nhybrid/nhybrid/snapshotter/control"
)

// regionSize writes a size as it is asked for, in the name of a device too.
func (a *app) regionSize(n int64) string {
	if a.bytes {
		return strconv.FormatInt(n, 10)
	}
	return region.FormatSize(n)
}

// taken is what a region takes of NVM.
func taken(r region.Record) int64 {
	if r.Kind == region.Snapshot {
		return r.Used
	}
	return r.Size
}

func users(r region.Record) string {
	var all []string
	for _, u := range r.Users {
		all = append(all, u.Container)
	}
	return strings.Join(all, ", ")
}

func marks(r region.Record) string {
	var all []string
	if r.Keep {
		all = append(all, "keep")
	}
	if r.Shared {
		all = append(all, "shared")
	}
	if r.Owner() != r.Namespace {
		all = append(all, "of "+r.Owner())
	}
	return strings.Join(all, ", ")
}

func (a *app) scmList() *cobra.Command {
	return &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List the regions and who has them", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			l := region.Listing{}
			if _, err := a.ask(c.Context(), region.OpList, region.Args{Namespace: a.namespace}, &l); err != nil {
				return err
			}
			if a.json {
				if l.Regions == nil {
					l.Regions = []region.Record{}
				}
				return a.printJSON(l)
			}
			rows := [][]string{{"NAMESPACE", "REGION", "SIZE", "NVM", "CREATED", "USED BY", "MARKS", "ORIGIN"}}
			for _, r := range l.Regions {
				rows = append(rows, []string{
					r.Namespace, r.String(), a.regionSize(r.Size), a.size(taken(r)), r.Created.UTC().Format(time.RFC3339), orDash(users(r)), orDash(marks(r)), orDash(control.Printable(r.Origin)),
				})
			}
			if err := a.table(rows); err != nil {
				return err
			}
			for _, ns := range slices.Sorted(maps.Keys(l.Namespaces)) {
				if u := l.Namespaces[ns]; u.Quota != (region.Quota{}) {
					fmt.Fprintf(a.out, "quota of namespace %s: %s\n", ns, a.account(u))
				}
			}
			for _, key := range slices.Sorted(maps.Keys(l.Broken)) {
				fmt.Fprintln(a.out, "warning:", control.Message(l.Broken[key]))
			}
			return nil
		},
	}
}

func (a *app) quota(q region.Quota) string {
	var all []string
	if q.Bytes > 0 {
		all = append(all, a.size(q.Bytes))
	}
	if q.Regions > 0 {
		all = append(all, fmt.Sprintf("%d regions", q.Regions))
	}
	return strings.Join(all, ", ")
}

// account says what of its quota a namespace has.
func (a *app) account(u region.Account) string {
	bytes, regions := a.size(u.Bytes), fmt.Sprintf("%d regions", u.Regions)
	if u.Quota.Bytes > 0 {
		bytes += " of " + a.size(u.Quota.Bytes) + percent(u.Bytes, u.Quota.Bytes)
	}
	if u.Quota.Regions > 0 {
		regions = fmt.Sprintf("%d of %d regions", u.Regions, u.Quota.Regions)
	}
	return bytes + ", " + regions
}

func (a *app) scmInspect() *cobra.Command {
	return &cobra.Command{
		Use: "inspect REGION", Short: "Show all that is known of a region", Args: cobra.ExactArgs(1), ValidArgsFunction: a.regionNames,
		RunE: func(c *cobra.Command, args []string) error {
			var r region.Inspection
			if _, err := a.ask(c.Context(), region.OpInspect, region.Args{Namespace: a.within(), Region: args[0]}, &r); err != nil {
				return err
			}
			if a.json {
				return a.printJSON(r)
			}
			rows := [][]string{
				{"region", r.String()}, {"namespace", r.Namespace}, {"id", r.ID}, {"size", a.regionSize(r.Size)}, {"on NVM", a.size(taken(r.Record))},
				{"created", r.Created.UTC().Format(time.RFC3339)}, {"origin", orDash(control.Printable(r.Origin))}, {"marks", orDash(marks(r.Record))},
				{"counts for", "namespace " + r.Owner + ", which has " + a.account(r.Account)},
			}
			for _, u := range r.Users {
				rows = append(rows, []string{"used by", fmt.Sprintf("%s, process %d", u.Container, u.Pid)})
			}
			return a.table(rows)
		},
	}
}

func (a *app) scmSpace() *cobra.Command {
	return &cobra.Command{
		Use: "df", Short: "Show what regions take of NVM, and what they may", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			var s region.Space
			if _, err := a.ask(c.Context(), region.OpBooks, region.Args{}, &s); err != nil {
				return err
			}
			if a.json {
				return a.printJSON(s)
			}
			limit := "-"
			if s.Limit > 0 {
				limit = a.size(s.Limit) + percent(s.Promised, s.Limit)
			}
			rows := [][]string{
				{"regions", a.size(s.Promised)}, {"in the making", a.size(s.Making)}, {"pool", a.size(s.Pool)}, {"limit", limit},
				{"kept for regions", a.size(s.Reserve)},
				{"NVM free", fmt.Sprintf("%s, of which %s stay free and %s are promised to layers", a.size(s.Free), a.size(s.Headroom), a.size(s.Others))},
			}
			for _, p := range s.Regions {
				rows = append(rows, []string{"pool of " + a.regionSize(p.Size), fmt.Sprintf("%d of %d ready", p.Ready, p.Want)})
			}
			if err := a.table(rows); err != nil {
				return err
			}
			list := [][]string{{"NAMESPACE", "REGIONS", "BYTES", "QUOTA"}}
			for _, ns := range slices.Sorted(maps.Keys(s.Accounts)) {
				if u := s.Accounts[ns]; a.namespace == "" || a.namespace == ns {
					list = append(list, []string{ns, strconv.Itoa(u.Regions), a.size(u.Bytes), orDash(a.quota(u.Quota))})
				}
			}
			if len(list) == 1 {
				return nil
			}
			fmt.Fprintln(a.out)
			return a.table(list)
		},
	}
}

// regionUsage is what of NVM is not the images'; nil where no regions are served.
func (a *app) regionUsage(ctx context.Context) (*region.Space, error) {
	var s region.Space
	_, err := a.ask(ctx, region.OpBooks, region.Args{}, &s)
	if errors.Is(err, errOff) {
		return nil, nil
	}
	return &s, err
}

// printRegionUsage says it below the table of du.
func (a *app) printRegionUsage(ctx context.Context) error {
	s, err := a.regionUsage(ctx)
	switch {
	case err != nil:
		_, err = fmt.Fprintf(a.out, "\nregions on NVM are not known: %s\n", control.ErrorMessage(err))
	case s != nil:
		_, err = fmt.Fprintf(a.out, "\nregions on NVM: %s, and %s that wait in the pool; nhybridctl scm df tells more\n", a.size(s.Promised+s.Making), a.size(s.Pool))
	}
	return err
}

// printUsageJSON adds to what the images have what the regions have, as scm df tells it, or why that is not known.
func (a *app) printUsageJSON(ctx context.Context, images proto.Message) error {
	b, err := control.JSON(images)
	if err != nil {
		return err
	}
	var more struct {
		Regions *region.Space `json:"regions,omitempty"`
		Unknown string        `json:"regions_unknown,omitempty"`
	}
	if more.Regions, err = a.regionUsage(ctx); err != nil {
		more.Regions, more.Unknown = nil, control.ErrorMessage(err)
	}
	m, err := json.Marshal(more)
	if err != nil {
		return err
	}
	if len(m) > len("{}") { // as one object, whose keys stay in their order
		b = slices.Concat(bytes.TrimSuffix(bytes.TrimSpace(b), []byte("}")), []byte(","), m[1:])
	}
	return a.printJSON(json.RawMessage(b))
}

func (a *app) scmCheck() *cobra.Command {
	var repair bool
	c := &cobra.Command{
		Use: "check REGION", Short: "Examine a region: its file, and header, log and heap of scmlib", Args: cobra.ExactArgs(1), ValidArgsFunction: a.regionNames,
		Long: "Examine a region: that it has all its blocks, and where scmlib has made it both copies of its header, its log and each block\nof its heap. One that is in use is examined in a copy. The exit code is 1 if anything is wrong.",
		RunE: func(c *cobra.Command, args []string) error {
			var r region.Report
			if _, err := a.ask(c.Context(), region.OpCheck, region.Args{Namespace: a.within(), Region: args[0], Repair: repair}, &r); err != nil {
				return err
			}
			var err error
			if a.json {
				err = a.printJSON(r)
			} else {
				err = a.printReport(r)
			}
			if err == nil && len(r.Problems) > 0 {
				err = silent{}
			}
			return err
		},
	}
	c.Flags().BoolVar(&repair, "repair", false, "heal the header and roll back what was under way, as the next open would")
	return c
}

func (a *app) printReport(r region.Report) error {
	rows := [][]string{
		{"region", r.Ref.String()}, {"size", a.regionSize(r.Size)}, {"allocated", a.size(r.Allocated)}, {"not zero", a.size(r.Used)}, {"in use", yes(r.ContainerOn)},
	}
	if !r.Formatted {
		rows = append(rows, []string{"format", "not scmlib's: no more can be told"})
	} else {
		header := "both copies are good"
		if r.HeaderBad {
			header = "one copy is damaged; the next open heals it"
		}
		pending := "nothing under way"
		if r.Pending > 0 {
			pending = fmt.Sprintf("%d transactions, which the next open rolls back", r.Pending)
		}
		if r.Repaired {
			header, pending = "good", "rolled back"
		}
		rows = append(rows, []string{"layout", orDash(control.Printable(r.Layout))}, []string{"uuid", r.UUID}, []string{"copy of", orDash(r.Parent)},
			[]string{"opened", fmt.Sprintf("%d times for writing", r.Generation)}, []string{"header", header}, []string{"log", pending},
			[]string{"heap", fmt.Sprintf("%d blocks, %s; %s in free chunks", r.HeapBlocks, a.size(r.HeapBytes), a.size(int64(r.HeapFree)))})
	}
	for _, p := range r.Problems {
		rows = append(rows, []string{"problem", control.Message(p)})
	}
	return a.table(rows)
}
