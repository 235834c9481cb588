// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"fmt"
	"os/exec"
	"slices"

	"github.com/nhybrid/nhybrid/integration/bench/lab"
	"github.com/nhybrid/nhybrid/placement"
)

// variant is one way to keep snapshots. containerd's content and metadata stand on the HDD in all of them.
type variant struct {
	Name string
	// Hybrid is nhybrid's snapshotter; else it is containerd's overlayfs snapshotter.
	Hybrid bool
	// Policy of nhybrid; "": the one that a daemon has by default.
	Policy string
	// NVM puts the overlayfs snapshotter's directory on NVM.
	NVM bool
	// Best is containerd as fast as it can be made by configuration: unpacks layers at a time, decompressed by igzip. Else it
	// unpacks one layer at a time, which is its default, and decompresses by itself.
	Best bool
	// Extra variants are measured only where they are asked for.
	Extra bool
}

// unpacks is containerd's max_concurrent_unpacks of the best variants.
const unpacks = 3

const (
	overlayHDD     = "hdd"
	overlayNVM     = "nvm"
	overlayHDDBest = "hdd-best"
	overlayNVMBest = "nvm-best"
	hybrid         = "default"
	lass           = "lass"
	allHDD         = "all-hdd"
	allNVM         = "all-nvm"
	hybridBest     = "default-best"
	lassBest       = "lass-best"
)

var variants = []variant{
	{Name: overlayHDD},
	{Name: overlayNVM, NVM: true},
	{Name: overlayHDDBest, Best: true},
	{Name: overlayNVMBest, NVM: true, Best: true},
	{Name: hybrid, Hybrid: true},
	{Name: lass, Hybrid: true, Policy: "lass"},
	{Name: allHDD, Hybrid: true, Policy: "hdd"},
	{Name: allNVM, Hybrid: true, Policy: "nvm"},
	{Name: hybridBest, Hybrid: true, Best: true, Extra: true},
	{Name: lassBest, Hybrid: true, Policy: "lass", Best: true, Extra: true},
}

func variantNames() (names []string) {
	for _, v := range variants {
		names = append(names, v.Name)
	}
	return names
}

// chosenVariants are those that were asked for, or all but the extra ones.
func chosenVariants(wanted []string) ([]string, error) {
	if len(wanted) == 0 {
		return slices.DeleteFunc(variantNames(), func(name string) bool { v, _ := variantByName(name); return v.Extra }), nil
	}
	return lab.Choose("variant", wanted, variantNames())
}

// checkIgzip finds out before anything is pulled that the best variants can be measured.
func checkIgzip(chosen []string) error {
	for _, name := range chosen {
		if v, _ := variantByName(name); v.Best {
			if _, err := exec.LookPath("igzip"); err != nil {
				return fmt.Errorf("variant %q: %w; install Debian's package isal", name, err)
			}
		}
	}
	return nil
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
	Round   int    `json:"round"` // from 1
	Image   string `json:"image"`
	Link    string `json:"link"` // bandwidth as --links has it
	Variant string `json:"variant"`
}

func (k key) String() string {
	return fmt.Sprintf("round %d, %s, %s, %s", k.Round, k.Image, k.Link, k.Variant)
}

// cell is what runs are compared within.
func (k key) cell() key { return key{Image: k.Image, Link: k.Link} }

// plan lists the runs in their order. The variants of one image, link and round follow each other, so that what
// drifts with time touches them alike; each round begins with another variant, so that none always has the same one
// before it.
func plan(rounds int, images, links, variants []string) (keys []key) {
	for round := 1; round <= rounds; round++ {
		first := (round - 1) % len(variants)
		order := append(slices.Clone(variants[first:]), variants[:first]...)
		for _, image := range images {
			for _, link := range links {
				for _, v := range order {
					keys = append(keys, key{round, image, link, v})
				}
			}
		}
	}
	return keys
}

// linkRate reads a bandwidth, in bytes a second; "0" is no limit.
func linkRate(link string) (float64, error) {
	if link == "0" {
		return 0, nil
	}
	return placement.ParseRate(link)
}

// suffix names a link at the end of a figure.
func suffix(link string) string {
	rate, err := linkRate(link)
	if err != nil {
		return link
	}
	return lab.LinkSuffix(rate)
}
