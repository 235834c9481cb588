// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package operator

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/placement/tier"
	"github.com/nhybrid/nhybrid/snapshotter/control"
	"github.com/nhybrid/nhybrid/snapshotter/store"
)

// warnings are what somebody should do something about. Each names the thing, says the cause in one sentence and, behind
// the last semicolon, the cure.
func (s backend) warnings(ctx context.Context, all []store.Entry) (list []string, err error) {
	layers := s.store.Layers()
	slices.SortFunc(layers, func(a, b store.Layer) int { return cmp.Compare(a.ID, b.ID) })
	failures := s.store.Failures()
	for _, l := range layers {
		switch failed := failures[l.ID]; {
		case l.Users == 0: // it goes
		case l.Damaged != "":
			what, ns, images := s.called(ctx, l.ID, all)
			list = append(list, what+" cannot be used: "+s.store.Trouble(l.ID, ns, images...))
		case failed != nil:
			what, _, _ := s.called(ctx, l.ID, all)
			list = append(list, fmt.Sprintf("work on %s has failed and is tried again: %s; %s", what, clause(failed.Error()), cureOf(failed)))
		}
	}
	for _, t := range tier.Tiers {
		room, err := s.store.Room(t)
		if err != nil {
			return nil, err
		}
		list = append(list, room.Shortages(t)...)
	}
	if s.store.Tiers.SameFilesystem() {
		list = append(list, control.OneFilesystem+", so that placement has no effect; give NVM a filesystem of its own")
	}
	if s.hot == nil {
		return list, nil
	}
	if _, err := s.hot.Stats(); err != nil {
		list = append(list, fmt.Sprintf("starts are not traced, so that what images need is only guessed: %s; nhybridctl doctor, as root, says what is missing, or set hot.trace = false", clause(err.Error())))
	}
	for host, err := range sorted(s.hot.Unanswered()) {
		list = append(list, fmt.Sprintf("registry %s was asked for the profile of an image in vain, so that what it needs is only guessed: %s; "+
			"mend how it is reached, or set hot.fetch_profiles = false", host, clause(err.Error())))
	}
	return list, nil
}

// sorted goes through a map in the order of its keys.
func sorted(m map[string]error) func(func(string, error) bool) {
	return func(yield func(string, error) bool) {
		for _, k := range slices.Sorted(maps.Keys(m)) {
			if !yield(k, m[k]) {
				return
			}
		}
	}
}

// clause is an error as a part of a sentence whose cure follows the last semicolon.
func clause(text string) string { return strings.ReplaceAll(control.Message(text), ";", ",") }

// cureOf is what helps against an error of a device.
func cureOf(err error) string {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return store.CureRoom
	}
	return "mend what the error names (dmesg shows errors of devices)"
}

// called names a layer by its number and the images that have it, in one of the namespaces that use it.
func (s backend) called(ctx context.Context, id store.LayerID, all []store.Entry) (name, namespace string, images []string) {
	name = "layer " + id.String()
	for _, sn := range all {
		if sn.Of == nil || sn.Layer != id {
			continue
		}
		namespace = sn.NS()
		names, _ := s.imageNames(ctx, []store.Entry{sn})
		if images = namesOf(sn, names); len(images) > 0 {
			return name + " of " + strings.Join(images, ", "), namespace, images
		}
	}
	return name, namespace, nil
}

// namesOf are the names of images that have the layer of a committed snapshot, from what imageNames returned.
func namesOf(sn store.Entry, names map[string][]string) []string {
	return names[sn.NS()+" "+store.ClientKey(sn.Info.Name)]
}
