// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"time"
)

// checkRow is what the tests of crash consistency have said of themselves, of the Go library and of libscm.
type checkRow struct {
	Effort int                       `json:"effort"`
	Counts map[string]map[string]int `json:"counts"` // by package, by key
	Passed map[string]bool           `json:"passed"`
	Took   map[string]float64        `json:"took_s"`
}

// keys that the tests print as "key=number".
var checkKeys = []string{"states_enumerated", "states_failed", "mutants_total", "mutants_killed", "tx10_fences"}

// crashPackages are the packages whose tests count.
var crashPackages = []string{"scmlib", "scmlib/c"}

var counts = regexp.MustCompile(`\b([a-z0-9_]+)=(\d+)\b`)

// readCounts adds up what each key was said to be.
func readCounts(output []byte) map[string]int {
	sum := map[string]int{}
	for _, m := range counts.FindAllSubmatch(output, -1) {
		n, err := strconv.Atoi(string(m[2]))
		for _, k := range checkKeys {
			if err == nil && k == string(m[1]) {
				sum[k] += n
			}
		}
	}
	return sum
}

// crashTests runs the enumeration of persisted states and the mutants, in the repository. A test that fails is told, and counts with what it said.
func (b *bench) crashTests(ctx context.Context) error {
	row := &checkRow{Effort: b.options.effort, Counts: map[string]map[string]int{}, Passed: map[string]bool{}, Took: map[string]float64{}}
	b.checks = row
	var failed error
	for _, pkg := range crashPackages {
		began := time.Now()
		cmd := exec.CommandContext(ctx, "go", "test", "-count=1", "-timeout=2h", "-v", "-run", "^(TestCrash|TestMutants|TestTenUpdatesThreeFences)$", module+"/"+pkg)
		cmd.Env = append(os.Environ(), fmt.Sprintf("SCM_CRASH_EFFORT=%d", b.options.effort))
		out, err := cmd.CombinedOutput()
		row.Counts[pkg], row.Passed[pkg], row.Took[pkg] = readCounts(out), err == nil, time.Since(began).Seconds()
		if err != nil {
			failed = errors.Join(failed, fmt.Errorf("tests of %s: %w: %s", pkg, err, tail(out, 2000)))
		}
		b.say("crash tests of %s: %v, %s", pkg, row.Counts[pkg], time.Since(began).Round(100*time.Millisecond))
	}
	return failed
}

// sum is a count of all packages; false if no test has said it.
func (c *checkRow) sum(key string) (n int, ok bool) {
	if c == nil {
		return 0, false
	}
	for _, m := range c.Counts {
		if v, said := m[key]; said {
			n, ok = n+v, true
		}
	}
	return n, ok
}

func tail(b []byte, n int) []byte { return bytes.TrimSpace(b[max(0, len(b)-n):]) }
