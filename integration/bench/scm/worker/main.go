// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Worker does the workloads of the benchmark in Go, where it was started: on the host or in a container. It is a static program that
// speaks package wire on its standard input and output.
package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/integration/bench/scm/wire"
)

// workload does n operations.
type workload func(n int) error

// lazy makes a workload when it is first asked for.
type lazy struct {
	make func() (workload, error)
	run  workload
}

// place is where the workloads run, and what can be done there.
type place interface {
	hello() wire.Hello
	workloads() map[string]*lazy
	close() error
}

func main() {
	kind := flag.String("kind", "scm", "scm: a region as the environment says; bolt: a database in --file; file: a file of integers, --file")
	file := flag.String("file", "", "path of the file or database")
	n := flag.Int("n", 20_000_000, "integers in the array")
	elements := flag.Int("elements", 200_000, "elements of the tree before inserts are measured")
	rows := flag.Int("rows", 200_000, "rows of the table of integers in a database")
	cpu := flag.Int("cpu", -1, "processor to run on")
	flag.Parse()
	if err := serve(*kind, *file, *cpu, sizes{*n, *elements, *rows}); err != nil {
		say(wire.Hello{Error: err.Error()})
		os.Exit(1)
	}
}

type sizes struct{ array, tree, rows int }

func say(v any) {
	b, err := json.Marshal(v)
	if err == nil {
		_, err = os.Stdout.Write(append(b, '\n'))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "worker:", err)
		os.Exit(1)
	}
}

func serve(kind, file string, cpu int, z sizes) (err error) {
	// One thread on one processor, and no collector in the middle of a measurement: nothing here makes much garbage.
	runtime.LockOSThread()
	debug.SetGCPercent(400)
	if cpu >= 0 {
		var set unix.CPUSet
		set.Set(cpu)
		if err := unix.SchedSetaffinity(0, &set); err != nil {
			return fmt.Errorf("stay on processor %d: %w", cpu, err)
		}
	}
	var p place
	switch kind {
	case "scm":
		p, err = openRegion(z)
	case "bolt":
		p, err = openBolt(file, z)
	case "file":
		p, err = openFile(file, z)
	default:
		err = fmt.Errorf("no kind %q", kind)
	}
	if err != nil {
		return err
	}
	say(p.hello())
	known := p.workloads()
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		var q wire.Request
		if err := json.Unmarshal(in.Bytes(), &q); err != nil {
			return fmt.Errorf("read request: %w", err)
		}
		ns, err := answer(known, q)
		r := wire.Reply{NS: ns}
		if err != nil {
			r.Error = err.Error()
		}
		say(r)
	}
	return p.close()
}

func answer(known map[string]*lazy, q wire.Request) (int64, error) {
	w := known[q.Op]
	if w == nil {
		return 0, fmt.Errorf("no workload %q here", q.Op)
	}
	if w.run == nil {
		run, err := w.make()
		if err != nil {
			return 0, fmt.Errorf("prepare %q: %w", q.Op, err)
		}
		w.run = run
		runtime.GC()
	}
	if err := w.run(q.Warm); err != nil {
		return 0, fmt.Errorf("%s: %w", q.Op, err)
	}
	began := time.Now()
	err := w.run(q.N)
	took := time.Since(began)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", q.Op, err)
	}
	return took.Nanoseconds(), nil
}

// random is Marsaglia's xorshift64: a few instructions, so that it costs less than what it is used for.
type random uint64

// seed is any number but 0.
const seed = 88172645463325252

func (r *random) next() uint64 {
	x := uint64(*r)
	x ^= x << 13
	x ^= x >> 7
	x ^= x << 17
	*r = random(x)
	return x
}

// below is a number less than n (n < 2^32), by a multiplication instead of a division.
func (r *random) below(n int) int { return int((r.next() >> 32) * uint64(n) >> 32) }
