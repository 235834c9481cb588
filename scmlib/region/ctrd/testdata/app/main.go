// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// app counts in its region. "count" adds one and tells; "show" tells; "keep" counts without end; "wait" counts once, then waits.
package main

import (
	"fmt"
	"os"
	"time"

	"github.com/nhybrid/nhybrid/scmlib"
)

type state struct{ A, B uint64 }

func main() {
	if err := run(os.Args[1]); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

func run(what string) error {
	f, err := os.Stat(os.Getenv("SCM_REGION"))
	if err != nil {
		return err
	}
	r, err := scmlib.FromEnv(scmlib.Options{Create: true, Size: f.Size()})
	if err != nil {
		return err
	}
	root, err := scmlib.Root[state](r)
	if err != nil {
		return err
	}
	p := root.In(r)
	if p.A != p.B {
		return fmt.Errorf("torn: %d, %d", p.A, p.B)
	}
	count := func() error {
		return r.Update(func(tx *scmlib.Tx) error {
			if err := tx.Add(p); err != nil {
				return err
			}
			p.A++
			p.B++
			return nil
		})
	}
	for i := 0; what != "show" && (i == 0 || what == "keep"); i++ {
		if err := count(); err != nil {
			return err
		}
	}
	fmt.Println(p.A, f.Size())
	if what == "wait" {
		time.Sleep(time.Hour)
	}
	return r.Close()
}
