// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Command ledger is a program with persistent memory, to be cut off at any moment. ../ledgerc is the same in C; each opens what the other has left.
//
//	ledger info [-granularity G] [-durability D] [PATH]   opens a region, made if need be, and says what it is
//	ledger verify [-unsafe] [PATH]                        opens a region, and fails unless it holds what whole transactions leave
//	ledger work [-unsafe] PORT [PATH]                     verifies, then goes on for ever; each line it writes to PORT is a promise
//	ledger hold [-unsafe] [PATH]                          verifies, then waits with the region open
//
// Without PATH the region is that of the environment.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/scmlib"
)

const (
	layout = "pmem-ledger"
	// size is that of a region that is made; those of containers have theirs.
	size = 1 << 20
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Printf("failed: %v\n", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) == 0 {
		return errors.New("use info, verify, work or hold")
	}
	var granularity, durability string
	var accept bool
	flags := flag.NewFlagSet(args[0], flag.ContinueOnError)
	flags.StringVar(&granularity, "granularity", "", "least granularity: byte, cacheline or page")
	flags.StringVar(&durability, "durability", "", "least durability: process or power")
	flags.BoolVar(&accept, "unsafe", false, "open even after an unsafe shutdown")
	if err := flags.Parse(args[1:]); err != nil {
		return err
	}
	o := scmlib.Options{Create: true, Layout: layout, AcceptUnsafe: accept}
	o.Require.Granularity = map[string]scmlib.Granularity{"byte": scmlib.Byte, "cacheline": scmlib.CacheLine, "page": scmlib.Page}[granularity]
	o.Require.Durability = map[string]scmlib.Durability{"process": scmlib.ProcessCrash, "power": scmlib.PowerLoss}[durability]
	rest := flags.Args()
	var port *os.File
	if args[0] == "work" {
		if len(rest) == 0 {
			return errors.New("work needs a port")
		}
		var err error
		if port, err = os.OpenFile(rest[0], os.O_WRONLY, 0); err != nil {
			return err
		}
		rest = rest[1:]
	}
	r, err := open(rest, o)
	if err != nil {
		return err
	}
	say(r.Info())
	if args[0] != "info" {
		err = use(r, args[0], port)
	}
	return errors.Join(err, r.Close())
}

func open(path []string, o scmlib.Options) (*scmlib.Region, error) {
	if len(path) == 0 {
		return scmlib.FromEnv(o)
	}
	if _, err := os.Stat(path[0]); errors.Is(err, os.ErrNotExist) {
		o.Size = size
	}
	return scmlib.Open(path[0], o)
}

// say prints what a region is; ../guest reads it, and ../ledgerc prints the same.
func say(i scmlib.Info) {
	bit := map[bool]int{true: 1}
	fmt.Printf("granularity %s\ndurability %s\nfilesystem %s\nmount %s\nwhy %s\ninstruction %s\n", i.Granularity, i.Durability, i.Filesystem, i.Mount, i.Why, i.Instruction)
	fmt.Printf("dax %d\nmapsync %d\neadr %d\nrecovered %d\ngeneration %d\n", bit[i.DAX], bit[i.MapSync], bit[i.EADR], i.Recovered, i.Generation)
}

func use(r *scmlib.Region, what string, port *os.File) error {
	l, err := openLedger(r)
	if err != nil {
		return err
	}
	count, err := l.verify()
	if err != nil {
		return err
	}
	fmt.Printf("count %d\n", count)
	switch what {
	case "verify":
		return nil
	case "hold":
		fmt.Println("holding")
		for {
			_ = unix.Pause()
		}
	}
	fmt.Println("working")
	line := make([]byte, 0, 24)
	for {
		if count, err = l.step(); err != nil {
			return err
		}
		// The host takes the line at once or a moment later (Linux virtio_console queues it): what it has was promised, and the last few promises may
		// not have left the machine when its power goes.
		line = append(strconv.AppendUint(line[:0], count, 10), '\n')
		if _, err := port.Write(line); err != nil {
			return err
		}
	}
}
