// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package scm measures persistent memory in containers: the figures of the paper (Giles 2016, figures 4 to 9) on the host, in a container's
// region, in files and in ordinary memory; libpmemobj, bbolt and SQLite beside them; what crash tests have found; what a region costs at the start of
// a container. docs/bench.md says what the figures mean.
package scm

import (
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nhybrid/nhybrid/integration/bench/lab"
)

// parts of the measurement, which --skip can leave out.
const (
	partMicro  = "micro"
	partRedis  = "redis"
	partAttach = "attach"
	partCrash  = "crash"
)

var parts = []string{partMicro, partRedis, partAttach, partCrash}

// options of the command.
type options struct {
	out, bin, svg, huge            string
	skip, workloads                []string
	rounds, slices, shrink         int
	array, elements, stream, rows  int
	slice                          time.Duration
	redisRounds, redisSlices       int
	requests, clients, attachments int
	effort, cpu                    int
	quick                          bool
}

// Command is the subcommand.
func Command() *cobra.Command {
	o := &options{}
	c := &cobra.Command{
		Use: "scm", Short: "Persistent memory in containers: the paper's figures, PMDK, bbolt, SQLite, Redis, crash tests (out/scm.json)", Args: cobra.NoArgs,
		Long: "Run the same workloads on the host, in a container's region, in files and in ordinary memory, in turns, on emulated memory.",
		RunE: func(c *cobra.Command, _ []string) error {
			if err := o.complete(c); err != nil {
				return err
			}
			return o.run(c.Context(), c.ErrOrStderr())
		},
	}
	f := c.Flags()
	f.StringVar(&o.out, "out", "out", "directory of the results")
	f.StringVar(&o.svg, "svg", "", "where the picture is written (default scm-bench.svg in the directory of the results)")
	f.StringVar(&o.bin, "bin", "", "directory of the programs (default: bin/ of the repository)")
	f.StringVar(&o.huge, "huge", "always", "huge pages of the emulated memory that is mapped: always, never, within_size, advise (tmpfs(5))")
	f.StringSliceVar(&o.skip, "skip", nil, "parts to leave out: "+strings.Join(parts, ", "))
	f.StringSliceVar(&o.workloads, "workloads", nil, "workloads to measure (default all): "+strings.Join(workloads, ", "))
	f.IntVar(&o.rounds, "rounds", 4, "rounds of the workloads, each with new processes, containers and regions")
	f.IntVar(&o.slices, "slices", 15, "turns that each contender has at each workload in a round")
	f.DurationVar(&o.slice, "slice", 40*time.Millisecond, "length of such a turn where the memory is not mapped")
	f.IntVar(&o.array, "array", 20_000_000, "integers in the array")
	f.IntVar(&o.elements, "elements", 200_000, "elements of the tree before inserts are measured")
	f.IntVar(&o.stream, "stream", 11_250_000, "doubles in each of STREAM's three arrays: 90 MB")
	f.IntVar(&o.rows, "rows", 200_000, "rows of the array in bbolt and SQLite; fewer than integers, which is to their advantage")
	f.IntVar(&o.redisRounds, "redis-rounds", 2, "rounds of Redis, each with new servers")
	f.IntVar(&o.redisSlices, "redis-slices", 10, "turns that each server has at each request in a round")
	f.IntVar(&o.requests, "requests", 20_000, "requests in such a turn")
	f.IntVar(&o.clients, "clients", 50, "connections of redis-benchmark")
	f.IntVar(&o.attachments, "attachments", 40, "containers created with a region, with a hook that does nothing, and without")
	f.IntVar(&o.effort, "effort", 1, "of the crash tests: how many states are enumerated")
	f.IntVar(&o.cpu, "cpu", runtime.NumCPU()-1, "processor that the workloads and Redis run on; clients run on the others")
	f.BoolVar(&o.quick, "quick", false, "tiny sizes, one round: to try the benchmark itself")
	return c
}

// quickDefaults are the flags of --quick where nothing else is said.
var quickDefaults = map[string]string{
	"rounds": "1", "slices": "2", "slice": "5ms", "array": "200000", "elements": "2000", "stream": "100000", "rows": "2000", "redis-rounds": "1", "redis-slices": "1",
	"requests": "1000", "clients": "5", "attachments": "3",
}

// complete fills what follows from other flags and finds what is wrong before anything is built or started.
func (o *options) complete(c *cobra.Command) error {
	o.shrink = 1
	if o.quick {
		o.shrink = 100
		for name, value := range quickDefaults {
			if !c.Flags().Changed(name) {
				if err := c.Flags().Set(name, value); err != nil {
					return err
				}
			}
		}
	}
	if o.svg == "" {
		o.svg = o.out + "/scm-bench.svg"
	}
	for _, n := range []struct {
		flag            string
		value, from, to int
	}{
		{"rounds", o.rounds, 1, 1000}, {"slices", o.slices, 1, 1000}, {"array", o.array, 1000, 40_000_000}, {"elements", o.elements, 1, 500_000},
		{"stream", o.stream, 1000, 11_500_000}, {"rows", o.rows, 10, 20_000_000}, {"redis-rounds", o.redisRounds, 1, 1000}, {"redis-slices", o.redisSlices, 1, 1000},
		{"requests", o.requests, 100, 10_000_000}, {"clients", o.clients, 1, 1000}, {"attachments", o.attachments, 1, 10_000}, {"effort", o.effort, 1, 1000},
		{"cpu", o.cpu, 0, runtime.NumCPU() - 1},
	} {
		if n.value < n.from || n.value > n.to {
			return fmt.Errorf("--%s %d: must be between %d and %d", n.flag, n.value, n.from, n.to)
		}
	}
	if o.slice < time.Millisecond {
		return fmt.Errorf("--slice %s: must be at least 1ms", o.slice)
	}
	if _, err := lab.Choose("value of --huge", []string{o.huge}, []string{"never", "always", "within_size", "advise"}); err != nil {
		return err
	}
	var err error
	if o.workloads, err = lab.Choose("workload", o.workloads, workloads); err != nil {
		return err
	}
	_, err = lab.Choose("part for --skip", o.skip, parts)
	return err
}

func (o *options) does(part string) bool { return !slices.Contains(o.skip, part) }

// nvmBytes is the size of the filesystem on emulated memory. It takes what is written only.
func (o *options) nvmBytes() int64 { return 6 << 30 }

// bench is a measurement under way.
type bench struct {
	options  *options
	stand    *stand
	micros   table
	redis    table
	attach   *attachRow
	checks   *checkRow
	started  []string
	cleanups []func() error
	progress io.Writer
	begun    time.Time
}

func (b *bench) say(format string, args ...any) {
	fmt.Fprintf(b.progress, "%s  %s\n", time.Since(b.begun).Round(time.Second), fmt.Sprintf(format, args...))
}
