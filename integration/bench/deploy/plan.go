// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"fmt"
	"slices"

	"github.com/nhybrid/nhybrid/integration/bench/lab"
	"github.com/nhybrid/nhybrid/placement"
)

// variant is one way to keep snapshots. containerd's content and metadata stand on the HDD in all of them.
type variant struct {
	Name string
	// Policy of nhybrid; "": containerd's overlayfs snapshotter.
	Policy string
	// NVM puts the overlayfs snapshotter's directory on NVM.
	NVM bool
	// Unpacks is how many layers containerd unpacks at a time.
	Unpacks int
	// Baseline is the variant with all snapshots on NVM that this one is measured against.
	Baseline string
	// Extra variants are measured only where they are asked for.
	Extra bool
}

// parallel is containerd's max_concurrent_unpacks of the parallel variants.
const parallel = 3

const (
	overlayHDD         = "overlayfs-hdd"
	overlayNVM         = "overlayfs-nvm"
	overlayNVMParallel = "overlayfs-nvm-parallel"
	lass               = "lass"
	drain              = "drain"
	lassParallel       = "lass-parallel"
	drainParallel      = "drain-parallel"
	allNVM             = "nvm"
	allHDD             = "hdd"
)

var variants = []variant{
	{Name: overlayHDD, Unpacks: 1},
	{Name: overlayNVM, Unpacks: 1, NVM: true},
	{Name: lass, Unpacks: 1, Policy: "lass", Baseline: overlayNVM},
	{Name: drain, Unpacks: 1, Policy: "drain", Baseline: overlayNVM},
	{Name: overlayNVMParallel, Unpacks: parallel, NVM: true},
	{Name: lassParallel, Unpacks: parallel, Policy: "lass", Baseline: overlayNVMParallel},
	{Name: drainParallel, Unpacks: parallel, Policy: "drain", Baseline: overlayNVMParallel},
	// What nhybrid costs where placement plays no part, and what it gains nothing by.
	{Name: allNVM, Unpacks: 1, Policy: "nvm", Baseline: overlayNVM, Extra: true},
	{Name: allHDD, Unpacks: 1, Policy: "hdd", Baseline: overlayNVM, Extra: true},
}

func variantNames() (names []string) {
	for _, v := range variants {
		names = append(names, v.Name)
	}
	return names
}

// chosenVariants are those that were asked for, or all but the extra ones.
func chosenVariants(wanted []string) ([]string, error) {
	if len(wanted) > 0 {
		return lab.Choose("variant", wanted, variantNames())
	}
	return slices.DeleteFunc(variantNames(), func(name string) bool { v, _ := variantByName(name); return v.Extra }), nil
}

func variantByName(name string) (variant, bool) {
	i := slices.IndexFunc(variants, func(v variant) bool { return v.Name == name })
	if i < 0 {
		return variant{}, false
	}
	return variants[i], true
}

// key is what a run is of.
type key struct {
	Round     int    `json:"round"` // from 1
	Image     string `json:"image"`
	Bandwidth string `json:"bandwidth"`
	Variant   string `json:"variant"`
}

func (k key) String() string {
	return fmt.Sprintf("round %d, %s, %s, %s", k.Round, k.Image, k.Bandwidth, k.Variant)
}

// cell is what runs are compared within.
func (k key) cell() key { return key{Image: k.Image, Bandwidth: k.Bandwidth} }

// plan lists the runs in their order. The variants of one image, bandwidth and round follow each other, so that what
// drifts with time touches them alike; each round begins with another variant, so that none always has the same one
// before it.
func plan(rounds int, images, bandwidths, variants []string) (keys []key) {
	for round := 1; round <= rounds; round++ {
		first := (round - 1) % len(variants)
		order := append(slices.Clone(variants[first:]), variants[:first]...)
		for _, image := range images {
			for _, bandwidth := range bandwidths {
				for _, v := range order {
					keys = append(keys, key{round, image, bandwidth, v})
				}
			}
		}
	}
	return keys
}

// rates reads bandwidths; "0" is no limit.
func rates(bandwidths []string) (map[string]float64, error) {
	m := map[string]float64{}
	for _, b := range bandwidths {
		if b == "0" {
			m[b] = 0
			continue
		}
		r, err := placement.ParseRate(b)
		if err != nil {
			return nil, err
		}
		m[b] = r
	}
	return m, nil
}
