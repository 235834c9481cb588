// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package placement

import (
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/containerd/errdefs"
)

// Options are the world of a simulation. A zero field takes its value from DefaultOptions.
type Options struct {
	Bandwidth  float64 `json:"bandwidth"`  // of the link, bytes/s
	Concurrent int     `json:"concurrent"` // downloads at a time
	Unpacks    int     `json:"unpacks"`    // layers unpacked at a time, for parallel unpacking
	Unpack     float64 `json:"unpack"`     // uncompressed bytes/s at which one layer is decompressed and written to memory
	NVMWrite   float64 `json:"nvm_write"`  // bytes/s
	HDDWrite   float64 `json:"hdd_write"`  // bytes/s
	NVMSize    int64   `json:"nvm_size"`   // bytes free on NVM before each pull; 0 no limit
	// The rest is for the one-pass model alone; 0 in Commit, BlobCommit and Hot is none of it.
	Cores        float64 `json:"cores"`          // CPU cores that unpack
	Commit       float64 `json:"commit"`         // seconds that containerd takes to commit a layer, one after the other
	BlobCommit   float64 `json:"blob_commit"`    // seconds that containerd takes to commit a blob, beside other downloads
	ContentOnHDD bool    `json:"content_on_hdd"` // containerd's blobs stand on the disk of the HDD tier
	Hot          float64 `json:"hot"`            // share of the files of an image that are known to be hot, from 0 to 1
	// Taken is what the daemon takes some of this for when it places files.
	Taken Taken `json:"taken"`
	// Policy decides for the columns sequential and parallel, "" for lass. The columns drain, nvm and hdd are always those policies.
	Policy string `json:"policy"`
}

// Taken is what the daemon takes rates for that it has not measured yet, or measured at another time. 0: for what they are.
type Taken struct {
	HDDWrite float64 `json:"hdd_write"` // bytes/s
	Unpack   float64 `json:"unpack"`    // bytes/s, of all unpackers together
	Commit   float64 `json:"commit"`    // seconds, for each layer that is not committed
}

// DefaultOptions is containerd as it comes and the hardware of the paper: three downloads at a time, NVM at 1.3 GB/s, a disk
// at 140 MB/s, 100 Mbit/s. containerd's unpacking of one gzip layer on one core (Go's gzip, tar, small files) was measured at 130 to
// 145 MB/s, uncompressed, on a busy machine.
func DefaultOptions() Options {
	return Options{Bandwidth: 100e6 / 8, Concurrent: 3, Unpacks: 3, Unpack: 150e6, NVMWrite: 1.3e9, HDDWrite: 140e6, Policy: "lass",
		Cores: 2, Commit: 0.05, BlobCommit: 0.05}
}

// Report is what a simulation gives. See docs/placement.md for how to read it.
type Report struct {
	Options    Options       `json:"options"`
	Images     []ImageReport `json:"images"`
	Categories []Group       `json:"categories"` // by name
	All        Group         `json:"all"`
}

// Saved is how much less NVM is taken than with all on NVM, as a fraction (mean over the images of a group).
type Saved struct {
	Largest    float64 `json:"largest"`    // the paper's strategy 3 with the largest layer for the LDL
	Sequential float64 `json:"sequential"` // late binding by Options.Policy, sequential unpacking
	Parallel   float64 `json:"parallel"`   // the same, parallel unpacking
	Drain      float64 `json:"drain"`      // policy drain, sequential unpacking
}

// Group is the figures of one image, or their means over some. The maps have a key for each way to place:
//
//	strategy1, strategy2, strategy3           the paper's model (equations 6 to 8), the LDL from the simulated download
//	largest1, largest2, largest3              the same, the LDL taken to be the largest layer
//	sequential, parallel                      simulated, Options.Policy, late binding
//	drain, drain_parallel, nvm, hdd, nvm_parallel, hdd_parallel
//	                                          simulated, these policies
type Group struct {
	Name   string `json:"name"`
	Images int    `json:"images"` // how many
	// NVMSaved weighs layers by their compressed bytes, as the paper does.
	NVMSaved Saved `json:"nvm_saved"`
	// NVMSavedStored weighs them by the uncompressed bytes that NVM really takes; by all keys of UTotal.
	NVMSavedStored map[string]float64 `json:"nvm_saved_stored"`
	// NVMSavedPooled weighs by compressed bytes and images by their size: 1 - (sum on NVM)/(sum of all).
	NVMSavedPooled map[string]float64 `json:"nvm_saved_pooled"`
	// NVMSavedCompressed is NVMSaved for all keys.
	NVMSavedCompressed map[string]float64 `json:"nvm_saved_compressed"`
	// TTotal is seconds until the image is durable on its tiers. The paper's model has no time for unpacking, the simulation has.
	TTotal map[string]float64 `json:"t_total"`
	// TReturned is seconds until containerd says that the image is there; simulated only.
	TReturned map[string]float64 `json:"t_returned"`
	UTotal    map[string]float64 `json:"u_total"` // uncompressed bytes on NVM

	compressed float64            // all bytes, for pooling
	onNVM      map[string]float64 // compressed
}

// ImageReport is the figures of one image.
type ImageReport struct {
	Group
	Category     string `json:"category"`
	Layers       int    `json:"layers"`
	Compressed   int64  `json:"compressed"`   // bytes
	Uncompressed int64  `json:"uncompressed"` // bytes
	Largest      int    `json:"largest"`      // index of the layer with the largest blob, the lowest at a tie
	LDL          int    `json:"ldl"`          // index of the layer that the simulated link brings last
	// Tiers shows the simulated placements, bottom first: "HHN".
	Tiers map[string]string `json:"tiers"`
}

// Simulate replays the pull of each image into an empty store. The error is errdefs.ErrInvalidArgument for Options that make no sense.
func Simulate(images []Image, o Options) (Report, error) {
	o, err := o.complete()
	if err != nil {
		return Report{}, err
	}
	late, err := ParsePolicy(o.Policy)
	if err != nil {
		return Report{}, err
	}
	rep := Report{Options: o, Images: []ImageReport{}, Categories: []Group{}}
	for _, img := range images {
		if len(img.Layers) == 0 {
			return Report{}, fmt.Errorf("simulate image %q: it has no layers: %w", img.Name, errdefs.ErrInvalidArgument)
		}
		rep.Images = append(rep.Images, simulate(img, o, late))
	}
	byName := map[string][]Group{}
	var all []Group
	for _, i := range rep.Images {
		byName[i.Category] = append(byName[i.Category], i.Group)
		all = append(all, i.Group)
	}
	for name, g := range byName {
		rep.Categories = append(rep.Categories, mean(name, g))
	}
	slices.SortFunc(rep.Categories, func(a, b Group) int { return strings.Compare(a.Name, b.Name) })
	rep.All = mean("all", all)
	return rep, nil
}

func (o Options) complete() (Options, error) {
	d := DefaultOptions()
	for _, f := range []struct {
		name string
		v    *float64
		d    float64
	}{
		{"bandwidth", &o.Bandwidth, d.Bandwidth}, {"rate of unpacking", &o.Unpack, d.Unpack},
		{"number of cores", &o.Cores, d.Cores}, {"write rate of NVM", &o.NVMWrite, d.NVMWrite}, {"write rate of the HDD", &o.HDDWrite, d.HDDWrite},
	} {
		if *f.v == 0 {
			*f.v = f.d
		}
		if !(*f.v > 0) || math.IsInf(*f.v, 0) {
			return o, fmt.Errorf("simulate: the %s must be above 0: %w", f.name, errdefs.ErrInvalidArgument)
		}
	}
	if o.Concurrent == 0 {
		o.Concurrent = d.Concurrent
	}
	if o.Unpacks == 0 {
		o.Unpacks = d.Unpacks
	}
	if o.Concurrent < 0 || o.Unpacks < 0 || o.NVMSize < 0 {
		return o, fmt.Errorf("simulate: downloads and unpacks at a time and the size of NVM must not be negative: %w", errdefs.ErrInvalidArgument)
	}
	for _, f := range []struct {
		name string
		v    float64
	}{{"commit of a layer", o.Commit}, {"commit of a blob", o.BlobCommit}} {
		if !(f.v >= 0) || math.IsInf(f.v, 0) {
			return o, fmt.Errorf("simulate: the seconds for the %s must not be negative: %w", f.name, errdefs.ErrInvalidArgument)
		}
	}
	for _, v := range []float64{o.Taken.HDDWrite, o.Taken.Unpack, o.Taken.Commit} {
		if !(v >= 0) || math.IsInf(v, 0) {
			return o, fmt.Errorf("simulate: what the daemon takes rates for must not be negative: %w", errdefs.ErrInvalidArgument)
		}
	}
	if !(o.Hot >= 0 && o.Hot <= 1) {
		return o, fmt.Errorf("simulate: the share of hot files must lie between 0 and 1: %w", errdefs.ErrInvalidArgument)
	}
	if o.Policy == "" {
		o.Policy = d.Policy
	}
	return o, nil
}

func mustPolicy(name string) Policy {
	p, err := ParsePolicy(name)
	if err != nil {
		panic(err) // a name in this file
	}
	return p
}

func simulate(img Image, o Options, late Policy) ImageReport {
	r := ImageReport{Category: img.Category, Layers: len(img.Layers), Tiers: map[string]string{}, Group: newGroup(img.Name)}
	r.Images = 1
	sizes := make([]int64, len(img.Layers))
	for i, l := range img.Layers {
		sizes[i] = l.Uncompressed
		r.Compressed += l.Compressed
		r.Uncompressed += l.Uncompressed
		if l.Compressed > img.Layers[r.Largest].Compressed {
			r.Largest = i
		}
	}
	r.compressed = float64(r.Compressed)

	// put files what one way to place puts where.
	put := func(key string, onNVM func(int) bool) {
		var c, u float64
		for i, l := range img.Layers {
			if onNVM(i) {
				c += float64(l.Compressed)
				u += float64(l.Uncompressed)
			}
		}
		r.onNVM[key] = c
		r.UTotal[key] = u
		r.NVMSavedCompressed[key] = saved(c, float64(r.Compressed))
		r.NVMSavedStored[key] = saved(u, float64(r.Uncompressed))
		r.NVMSavedPooled[key] = r.NVMSavedCompressed[key]
	}
	var first outcome
	for _, w := range []struct {
		key        string
		policy     Policy
		sequential bool
	}{
		{"sequential", late, true}, {"parallel", late, false},
		{"drain", mustPolicy("drain"), true}, {"drain_parallel", mustPolicy("drain"), false},
		{"nvm", mustPolicy("nvm"), true}, {"nvm_parallel", mustPolicy("nvm"), false},
		{"hdd", mustPolicy("hdd"), true}, {"hdd_parallel", mustPolicy("hdd"), false},
	} {
		out := run(img, o, w.policy, w.sequential)
		if w.key == "sequential" {
			first = out
		}
		put(w.key, func(i int) bool { return out.tiers[i] == NVM })
		r.TTotal[w.key], r.TReturned[w.key] = out.durable, out.returned
		var b strings.Builder
		for _, t := range out.tiers {
			b.WriteString(strings.ToUpper(t.String()[:1]))
		}
		r.Tiers[w.key] = b.String()
	}
	r.LDL = first.ldl
	for prefix, ldl := range map[string]int{"strategy": r.LDL, "largest": r.Largest} {
		m := Model{Sizes: sizes, LDL: ldl, Download: first.downloaded, Alpha: 1 / o.HDDWrite, Beta: 1 / o.NVMWrite}
		for n := 1; n <= 3; n++ {
			key, bl := fmt.Sprintf("%s%d", prefix, n), m.Strategy(n)
			put(key, func(i int) bool { return i >= bl })
			r.TTotal[key] = m.TTotal(bl)
		}
	}
	r.NVMSaved = summary(r.NVMSavedCompressed)
	return r
}

// saved is 1 - part/whole; nothing can be saved of nothing.
func saved(part, whole float64) float64 {
	if whole == 0 {
		return 0
	}
	return (whole - part) / whole
}

func summary(m map[string]float64) Saved {
	return Saved{Largest: m["largest3"], Sequential: m["sequential"], Parallel: m["parallel"], Drain: m["drain"]}
}

func newGroup(name string) Group {
	return Group{Name: name, NVMSavedStored: map[string]float64{}, NVMSavedPooled: map[string]float64{}, NVMSavedCompressed: map[string]float64{},
		TTotal: map[string]float64{}, TReturned: map[string]float64{}, UTotal: map[string]float64{}, onNVM: map[string]float64{}}
}

// mean returns the means over groups of one image each.
func mean(name string, of []Group) Group {
	g := newGroup(name)
	g.Images = len(of)
	for _, i := range of {
		g.compressed += i.compressed
		for _, m := range []struct{ sum, add map[string]float64 }{
			{g.NVMSavedStored, i.NVMSavedStored}, {g.NVMSavedCompressed, i.NVMSavedCompressed},
			{g.TTotal, i.TTotal}, {g.TReturned, i.TReturned}, {g.UTotal, i.UTotal},
		} {
			for k, v := range m.add {
				m.sum[k] += v / float64(len(of))
			}
		}
		for k, v := range i.onNVM {
			g.onNVM[k] += v
		}
	}
	for k, v := range g.onNVM {
		g.NVMSavedPooled[k] = saved(v, g.compressed)
	}
	g.NVMSaved = summary(g.NVMSavedCompressed)
	return g
}

// WriteTable writes the report for a person: NVM saved and the seconds until durable, by category and, if images is set, by image.
func (r Report) WriteTable(w io.Writer, images bool) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	o := r.Options
	fmt.Fprintf(w, "link %s, %d downloads at a time, unpack %s (%d at a time if parallel), NVM %s, HDD %s, policy %s\n\n",
		FormatRate(o.Bandwidth), o.Concurrent, FormatRate(o.Unpack), o.Unpacks, FormatRate(o.NVMWrite), FormatRate(o.HDDWrite), o.Policy)
	fmt.Fprintln(t, "\t\tNVM saved, % of compressed bytes\t\t\t\tseconds until durable\t\t\t\t\t")
	fmt.Fprintln(t, "\timages\tlargest\tsequential\tparallel\tdrain\tall NVM\tsequential\tparallel\tdrain\tall HDD\t")
	row := func(g Group) {
		fmt.Fprintf(t, "%s\t%d\t%.1f\t%.1f\t%.1f\t%.1f\t%.2f\t%.2f\t%.2f\t%.2f\t%.2f\t\n", g.Name, g.Images,
			100*g.NVMSaved.Largest, 100*g.NVMSaved.Sequential, 100*g.NVMSaved.Parallel, 100*g.NVMSaved.Drain,
			g.TTotal["nvm"], g.TTotal["sequential"], g.TTotal["parallel"], g.TTotal["drain"], g.TTotal["hdd"])
	}
	if images {
		for _, i := range r.Images {
			row(i.Group)
		}
	}
	for _, c := range r.Categories {
		row(c)
	}
	row(r.All)
	return t.Flush()
}
