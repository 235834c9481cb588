// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Command hddsim mounts an emulated HDD and keeps it until interrupted.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/nhybrid/nhybrid/integration/hddsim"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "hddsim:", err)
		os.Exit(1)
	}
}

func run() error {
	m := hddsim.HDD()
	o := hddsim.Options{Model: &m}
	flag.StringVar(&o.Dir, "dir", "", "directory of the disk, made and removed (required)")
	flag.Int64Var(&o.Size, "size", 2<<30, "bytes")
	flag.BoolVar(&o.Volatile, "volatile", false, "lose on SIGUSR1 what was not flushed")
	flag.DurationVar(&m.ReadSeek, "seek", m.ReadSeek, "cost of a read that does not follow the last request")
	flag.DurationVar(&m.WriteSeek, "wseek", m.WriteSeek, "cost of such a write")
	flag.DurationVar(&m.Flush, "flush", m.Flush, "cost of a flush after writes")
	flag.Float64Var(&m.ReadRate, "rbps", m.ReadRate, "bytes read a second")
	flag.Float64Var(&m.WriteRate, "wbps", m.WriteRate, "bytes written a second")
	flag.Int64Var(&m.Gap, "gap", m.Gap, "bytes forward that count as sequential")
	flag.Parse()
	if o.Dir == "" {
		return fmt.Errorf("-dir is missing; it is where the disk is to appear")
	}
	var err error
	if o.Dir, err = filepath.Abs(o.Dir); err != nil {
		return err
	}

	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer cancel()
	cut := make(chan os.Signal, 1)
	signal.Notify(cut, syscall.SIGUSR1)
	d, err := hddsim.Start(ctx, o)
	if err != nil {
		return err
	}
	fmt.Printf("mounted on %s (%s), counters in %s/fuse/counters\n", d.Mountpoint(), d.Device(), o.Dir)
	for {
		select {
		case <-cut:
			if err := d.PowerCut(); err != nil {
				return err
			}
			if err := d.PowerOn(ctx); err != nil {
				return err
			}
			fmt.Println("power was cut; mounted again")
		case <-ctx.Done():
			return d.Close()
		}
	}
}
