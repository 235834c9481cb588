// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// Bounds of the random moments at which the power goes: of work, and from the moment at which containers with regions begin to start, which
// takes them some seconds on an emulated processor.
const (
	longestWork  = 2 * time.Second
	longestStart = 6 * time.Second
)

// promises is the highest transaction that each program has said to be durable, by the program's language.
type promises map[string]uint64

// String is how the guest is told, on its kernel's command line.
func (p promises) String() string { return fmt.Sprintf("go:%d,c:%d", p["go"], p["c"]) }

// read takes over what was said during a boot.
func (p promises) read(ports map[string]string) error {
	for language, file := range ports {
		n, err := lastPromise(file)
		if err != nil {
			return err
		}
		p[language] = max(p[language], n)
	}
	return nil
}

// promises are the files in which QEMU writes down what programs say, by language.
func (m machine) promises(boot string) map[string]string {
	all := map[string]string{}
	for _, language := range []string{"go", "c"} {
		all[language] = filepath.Join(m.out, fmt.Sprintf("%s-%s-promises.%s", m.fs, boot, language))
	}
	return all
}

// lastPromise is the number on the last whole line of a file; 0 if there is none.
func lastPromise(file string) (uint64, error) {
	data, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("read promises: %w", err)
	}
	lines := strings.Split(string(data), "\n")
	if len(lines) < 2 {
		return 0, nil
	}
	n, err := strconv.ParseUint(lines[len(lines)-2], 10, 64)
	if err != nil {
		return 0, fmt.Errorf("read promises in %q: %w", file, err)
	}
	return n, nil
}

// cut waits for the moment to take the power away. when is "working": some time after both programs have made promises; "starting": some time
// from now; else now.
func cut(ctx context.Context, prefix, when string, ports map[string]string) {
	var wait time.Duration
	switch when {
	case "working":
		for _, file := range ports {
			for n := uint64(0); n == 0 && ctx.Err() == nil; time.Sleep(5 * time.Millisecond) {
				n, _ = lastPromise(file)
			}
		}
		wait = rand.N(longestWork)
	case "starting":
		wait = rand.N(longestStart)
	}
	progress("%s      the power goes in %v", prefix, wait.Round(time.Millisecond))
	select {
	case <-time.After(wait):
	case <-ctx.Done():
	}
}
