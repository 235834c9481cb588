// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scm

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"time"
)

// contender is a worker that takes part in some workloads.
type contender struct {
	name     string // "c container", unique
	language string
	place    place
	size     string // of its region
	program  string
	args     []string
	env      []string
	ops      []string
	// shares names the contender whose worker does the work, by other operations.
	shares string
	as     map[string]string
}

func (c *contender) worker() string {
	if c.shares != "" {
		return c.shares
	}
	return c.name
}

func (c *contender) op(workload string) string {
	if op := c.as[workload]; op != "" {
		return op
	}
	return workload
}

// Workloads, in the order of the paper's figures.
var (
	plainOps  = []string{"update", "copy", "scale", "add", "triad", "btree"}
	workloads = append(plainOps[:len(plainOps):len(plainOps)], "update-sync", "tx10", "tx10-single", "btree-tx", "persist")
)

// operations that a slice has where the memory is mapped; elsewhere as many as fit into the time of a slice, at most these.
var operations = map[string]int{
	"update": 2_000_000, "update-sync": 200_000, "copy": 2, "scale": 2, "add": 2, "triad": 2, "btree": 40_000,
	"tx10": 15_000, "tx10-single": 8_000, "btree-tx": 8_000, "persist": 200_000,
}

// regionSizes of workers in C, which have STREAM's arrays too, and of those in Go.
func (o *options) regionSizes() (c, other string) {
	if o.quick {
		return "16m", "16m"
	}
	return "512m", "256m"
}

func (b *bench) contenders() (all []contender) {
	o := b.options
	cpu, array, elements, stream := strconv.Itoa(o.cpu), strconv.Itoa(o.array), strconv.Itoa(o.elements), strconv.Itoa(o.stream)
	cSize, goSize := o.regionSizes()
	poolBytes := strconv.Itoa(512 << 20)
	if o.quick {
		poolBytes = strconv.Itoa(32 << 20)
	}
	c := append(slices.Clone(plainOps), "update-sync", "tx10", "btree-tx")
	g := []string{"update", "update-sync", "tx10", "btree-tx"}
	goArgs := []string{"--cpu", cpu, "--n", array, "--elements", elements, "--rows", strconv.Itoa(o.rows)}
	for _, p := range places {
		all = append(all, contender{
			name: "C " + string(p), language: "C", place: p, size: cSize, program: cWorker, args: []string{cpu, array, elements, stream}, ops: c,
		})
		ops := slices.Clone(g)
		if p == onHost || p == inMapping || p == inDRAM { // elsewhere a thousand inserts end in msync, which is another thing
			ops = append(ops, "btree", "tx10-single")
		}
		if p == onHost {
			ops = append(ops, "persist")
		}
		all = append(all, contender{name: "Go " + string(p), language: "Go", place: p, size: goSize, program: goWorker, args: goArgs, ops: ops})
	}
	all = append(all, contender{
		name: "assembly", language: "assembly", place: onHost, shares: "Go host", ops: []string{"persist"}, as: map[string]string{"persist": "persist-asm"},
	})
	for _, p := range []place{inVolume, inStorage} {
		all = append(all, contender{
			name: "file " + string(p), language: "Go", place: p, size: goSize, program: goWorker, args: append(slices.Clone(goArgs), "--kind", "file", "--file", here+"/plain"),
			ops: []string{"update", "update-sync", "tx10"},
		})
	}
	for _, p := range []contender{
		{name: "PMDK", program: pmdkWorker, ops: []string{"update-sync", "tx10", "btree-tx"}},
		{name: "PMDK wide", program: pmdkWide, ops: []string{"btree-tx"}},
	} {
		p.language, p.place, p.env = "C", onMemory, []string{"PMEM_IS_PMEM_FORCE=1"}
		p.args = []string{cpu, array, elements, "0", here + "/pool", poolBytes}
		all = append(all, p)
	}
	for _, p := range []place{onMemory, onFiles} {
		ops := []string{"tx10", "btree-tx"}
		all = append(all,
			contender{
				name: "bbolt " + string(p), language: "Go", place: p, program: goWorker,
				args: append(slices.Clone(goArgs), "--kind", "bolt", "--file", here+"/bolt"), ops: ops,
			},
			contender{
				name: "SQLite " + string(p), language: "C", place: p, program: sqliteWorker,
				args: []string{cpu, strconv.Itoa(o.rows), elements, here + "/sqlite"}, ops: ops,
			})
	}
	slices.SortStableFunc(all, func(a, b contender) int { return strings.Compare(a.name, b.name) })
	return all
}

// neighbours are compared most closely.
var neighbours = [][2]string{{"C host", "C container"}, {"Go host", "Go container"}, {"Go host", "assembly"}}

// micro measures the workloads of all contenders.
func (b *bench) micro(ctx context.Context) error {
	for round := range b.options.rounds {
		if err := b.microRound(ctx, round); err != nil {
			return fmt.Errorf("round %d: %w", round+1, err)
		}
	}
	return nil
}

// microRound starts all contenders anew, in another order each time, since what memory they get depends on it.
func (b *bench) microRound(ctx context.Context, round int) (err error) {
	all := b.contenders()
	rnd := rand.New(rand.NewPCG(uint64(round), 1))
	rnd.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	workers := map[string]*worker{}
	defer func() {
		for _, name := range b.started {
			if serr := workers[name].stop(); ctx.Err() == nil { // an interruption has ended them all
				err = errors.Join(err, serr)
			}
		}
		for _, clean := range slices.Backward(b.cleanups) {
			err = errors.Join(err, clean())
		}
		b.started, b.cleanups = nil, nil
	}()
	for i, c := range all {
		if c.shares != "" {
			continue
		}
		id := fmt.Sprintf("w%d-%d", round, i)
		cmd, cleanup, err := b.stand.command(ctx, start{place: c.place, id: id, size: c.size, env: c.env, args: append([]string{c.program}, c.args...)})
		if err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
		b.cleanups = append(b.cleanups, cleanup)
		w, err := launch(c.name, cmd)
		if err != nil {
			return err
		}
		workers[c.name] = w
		b.started = append(b.started, c.name)
	}
	for _, op := range b.options.workloads {
		var in []contender
		for _, c := range all {
			if slices.Contains(c.ops, op) {
				in = append(in, c)
			}
		}
		began := time.Now()
		if err := b.slices(ctx, round, op, in, workers, rnd); err != nil {
			return err
		}
		b.say("round %d of %d: %s, %d contenders, %s", round+1, b.options.rounds, op, len(in), time.Since(began).Round(100*time.Millisecond))
	}
	return nil
}

// slices gives each contender its turn in each slice, in another order each time.
func (b *bench) slices(ctx context.Context, round int, op string, in []contender, workers map[string]*worker, rnd *rand.Rand) error {
	counts := map[string]int{}
	for _, c := range in {
		n, err := b.calibrate(workers[c.worker()], c, op)
		if err != nil {
			return err
		}
		counts[c.name] = n
		s := b.micros.get(op, c.name)
		if s == nil {
			h := workers[c.worker()].hello
			if h.Durability == "" { // it knows nothing of what lies under its file
				if h.Durability, err = b.stand.durability(c.place); err != nil {
					return err
				}
			}
			s = &series{
				Workload: op, Contender: c.name, Language: c.language, Place: c.place, Granularity: h.Granularity, Durability: h.Durability, Why: h.Why, Mount: h.Mount,
			}
			b.micros = append(b.micros, s)
		}
		s.N, s.NS = n, append(s.NS, nil)
	}
	for range b.options.slices {
		for _, c := range turns(in, func(c contender) string { return c.name }, rnd, neighbours...) {
			if err := ctx.Err(); err != nil {
				return err
			}
			n := counts[c.name]
			ns, err := workers[c.worker()].do(c.op(op), n, max(1, n/20))
			if err != nil {
				return err
			}
			s := b.micros.get(op, c.name)
			s.NS[round] = append(s.NS[round], ns)
		}
	}
	return nil
}

// mapped tells whether a contender updates memory without any system call: it gets the same number of operations as the others of its kind.
func (c *contender) mapped() bool {
	return c.place == onHost || c.place == inMapping || c.place == inDRAM || strings.HasPrefix(c.name, "PMDK")
}

// calibrate says how many operations make a slice.
func (b *bench) calibrate(w *worker, c contender, op string) (int, error) {
	most := max(1, operations[op]/b.options.shrink)
	probe := min(most, 20)
	if c.mapped() {
		probe = max(1, most/20)
	}
	ns, err := w.do(c.op(op), probe, 1)
	if err != nil || c.mapped() {
		return most, err
	}
	return min(most, max(1, int(float64(b.options.slice.Nanoseconds())/ns))), nil
}
