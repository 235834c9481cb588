// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Command verify runs in a container: verify LIST [DURATION]. LIST is JSON, a list of workload.File. It uses these files for
// so long, or reads each once, prints a workload.Result as JSON, and fails if anything was wrong.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"time"

	"github.com/nhybrid/nhybrid/integration/workload"
)

func main() {
	wrong, err := run(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "verify:", err)
		os.Exit(2)
	}
	if wrong {
		os.Exit(1)
	}
}

func run(args []string) (wrong bool, err error) {
	if len(args) < 1 || len(args) > 2 {
		return false, fmt.Errorf("%d arguments; say LIST [DURATION]", len(args))
	}
	b, err := os.ReadFile(args[0])
	if err != nil {
		return false, err
	}
	var files []workload.File
	if err := json.Unmarshal(b, &files); err != nil {
		return false, err
	}
	var r workload.Result
	if len(args) == 1 {
		r = workload.Once(files)
	} else {
		d, err := time.ParseDuration(args[1])
		if err != nil {
			return false, err
		}
		ctx, cancel := context.WithTimeout(context.Background(), d)
		defer cancel()
		r = workload.Run(ctx, files, 2)
	}
	return len(r.Errors) > 0, json.NewEncoder(os.Stdout).Encode(r)
}
