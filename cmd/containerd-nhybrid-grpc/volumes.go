// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/log"

	"github.com/nhybrid/nhybrid/placement/tier"
)

// volumes keeps on HDD the names of the volumes that NVM holds, to name those that went when NVM was lost: nothing else
// knows of them then.
type volumes struct {
	known string // file with the names that there were last, one a line
	lost  string // likewise of those that are gone; who looks after the node deletes it
	store string // directory of the store of regions

	mu  sync.Mutex
	now []string
}

func newVolumes(root, store string) *volumes {
	return &volumes{known: filepath.Join(root, "volumes"), lost: filepath.Join(root, "volumes.lost"), store: store}
}

// told takes in which volumes there are; the first time it finds out which are gone.
func (v *volumes) told(ctx context.Context, names []string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	first := v.now == nil
	v.now = append([]string{}, names...)
	err := func() error {
		if first {
			if err := v.miss(ctx); err != nil {
				return err
			}
		}
		return writeLines(v.known, v.now)
	}()
	if err != nil {
		log.G(ctx).WithError(err).Warn("should NVM be lost, it will not be known which volumes went with it")
	}
}

// miss records the volumes that were known to an earlier run and have no directory any more.
func (v *volumes) miss(ctx context.Context) error {
	before, err := readLines(v.known)
	if err != nil {
		return err
	}
	lost, err := readLines(v.lost)
	if err != nil {
		return err
	}
	had := len(lost)
	for _, name := range before {
		if !slices.Contains(v.now, name) && !slices.Contains(lost, name) && !v.stands(name) {
			log.G(ctx).WithField("volume", name).Error("a volume stood on an NVM device that was lost, and is gone")
			lost = append(lost, name)
		}
	}
	if len(lost) == had {
		return nil
	}
	return writeLines(v.lost, lost)
}

// stands reports whether something is left of a volume: one that cannot be read is not gone.
func (v *volumes) stands(name string) bool {
	dirs, err := filepath.Glob(filepath.Join(v.store, "k", "volume+*"))
	return err == nil && slices.ContainsFunc(dirs, func(d string) bool { return strings.HasSuffix(d, "+"+name) })
}

// warnings names the volumes that are gone and were not made anew.
func (v *volumes) warnings() []string {
	v.mu.Lock()
	defer v.mu.Unlock()
	lost, err := readLines(v.lost)
	if err != nil {
		return []string{fmt.Sprintf("which volumes went with a lost NVM cannot be read: %v; mend or delete that file", err)}
	}
	lost = slices.DeleteFunc(lost, func(name string) bool { return slices.Contains(v.now, name) })
	if len(lost) == 0 {
		return nil
	}
	return []string{fmt.Sprintf("volumes %s stood on an NVM device that was lost, and are gone with what they held; "+
		"make them anew (nhybridctl scm create, import or pull), or delete %s to forget them", strings.Join(lost, ", "), v.lost)}
}

func readLines(path string) ([]string, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	return strings.Fields(string(b)), err
}

func writeLines(path string, lines []string) error {
	return tier.WriteFile(path, func(f *os.File) error {
		for _, l := range lines {
			if _, err := fmt.Fprintln(f, l); err != nil {
				return err
			}
		}
		return nil
	})
}
