// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package placement

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/containerd/errdefs"
)

// OnePassReport is what the one-pass model gives for a table of layers. See docs/placement.md for how to read it.
type OnePassReport struct {
	Options    Options        `json:"options"`
	Policies   []string       `json:"policies"` // the keys of all maps: drain, lass, nvm, hdd, and Options.Policy if it is another
	Images     []OnePassImage `json:"images"`
	Categories []OnePassGroup `json:"categories"` // by name
	All        OnePassGroup   `json:"all"`
}

// OnePassGroup is the figures of one image, or their means over some, by policy.
type OnePassGroup struct {
	Name       string             `json:"name"`
	Images     int                `json:"images"`     // how many
	Downloaded float64            `json:"downloaded"` // seconds until the last byte has arrived, with policy nvm
	NVMSaved   map[string]float64 `json:"nvm_saved"`  // 1 - UTotal/bytes of the image, as fractions
	TReturned  map[string]float64 `json:"t_returned"` // seconds until containerd says that the image is there
	TTotal     map[string]float64 `json:"t_total"`    // seconds until all bytes are on their devices
	UTotal     map[string]float64 `json:"u_total"`    // uncompressed bytes on NVM then
	Holes      map[string]float64 `json:"holes"`      // those of them that packs lack then
}

// OnePassImage is the figures of one image.
type OnePassImage struct {
	OnePassGroup
	Category     string `json:"category"`
	Layers       int    `json:"layers"`
	Compressed   int64  `json:"compressed"`   // bytes, shared blobs once
	Uncompressed int64  `json:"uncompressed"` // bytes, shared blobs once
	LDL          int    `json:"ldl"`          // index of the layer whose blob arrives last, with policy nvm
}

// SimulateOnePass predicts the pull of each image into an empty store, with each policy. The error is errdefs.ErrInvalidArgument for
// Options that make no sense.
func SimulateOnePass(images []Image, o Options) (OnePassReport, error) {
	o, err := o.complete()
	if err != nil {
		return OnePassReport{}, err
	}
	rep := OnePassReport{Options: o, Policies: []string{"drain", "lass", "nvm", "hdd"}, Images: []OnePassImage{}, Categories: []OnePassGroup{}}
	p, err := ParsePolicy(o.Policy)
	if err != nil {
		return OnePassReport{}, err
	}
	if !slices.Contains(rep.Policies, p.Name()) {
		rep.Policies = append(rep.Policies, p.Name())
	}
	byName := map[string][]OnePassGroup{}
	var all []OnePassGroup
	for _, img := range images {
		if len(img.Layers) == 0 {
			return OnePassReport{}, fmt.Errorf("simulate image %q: it has no layers: %w", img.Name, errdefs.ErrInvalidArgument)
		}
		i := predictAll(img, o, rep.Policies)
		rep.Images = append(rep.Images, i)
		byName[i.Category] = append(byName[i.Category], i.OnePassGroup)
		all = append(all, i.OnePassGroup)
	}
	for name, g := range byName {
		rep.Categories = append(rep.Categories, onePassMean(name, g))
	}
	slices.SortFunc(rep.Categories, func(a, b OnePassGroup) int { return strings.Compare(a.Name, b.Name) })
	rep.All = onePassMean("all", all)
	return rep, nil
}

func predictAll(img Image, o Options, policies []string) OnePassImage {
	i := OnePassImage{OnePassGroup: newOnePassGroup(img.Name), Category: img.Category, Layers: len(img.Layers)}
	i.Images = 1
	seen := map[string]bool{}
	for _, l := range img.Layers {
		if l.Digest == "" || !seen[l.Digest] {
			i.Compressed += l.Compressed
		}
		seen[l.Digest] = true
	}
	for _, name := range policies {
		p := onePass(img.Layers, o, mustPolicy(name))
		if name == "nvm" {
			i.Downloaded, i.LDL, i.Uncompressed = p.Downloaded, p.LDL, p.Bytes
		}
		i.NVMSaved[name], i.TReturned[name], i.TTotal[name] = p.NVMSaved(), p.Returned, p.Durable
		i.UTotal[name], i.Holes[name] = float64(p.NVMBytes), float64(p.HoleBytes)
	}
	return i
}

func newOnePassGroup(name string) OnePassGroup {
	return OnePassGroup{Name: name, NVMSaved: map[string]float64{}, TReturned: map[string]float64{}, TTotal: map[string]float64{},
		UTotal: map[string]float64{}, Holes: map[string]float64{}}
}

// onePassMean returns the means over groups of one image each.
func onePassMean(name string, of []OnePassGroup) OnePassGroup {
	g := newOnePassGroup(name)
	g.Images = len(of)
	for _, i := range of {
		g.Downloaded += i.Downloaded / float64(len(of))
		for _, m := range []struct{ sum, add map[string]float64 }{
			{g.NVMSaved, i.NVMSaved}, {g.TReturned, i.TReturned}, {g.TTotal, i.TTotal}, {g.UTotal, i.UTotal}, {g.Holes, i.Holes},
		} {
			for k, v := range m.add {
				m.sum[k] += v / float64(len(of))
			}
		}
	}
	return g
}

// WriteTable writes the report for a person: NVM saved and the seconds until durable, by category and, if images is set, by image.
func (r OnePassReport) WriteTable(w io.Writer, images bool) error {
	o := r.Options
	on := "their own disk"
	if o.ContentOnHDD {
		on = "the HDD"
	}
	fmt.Fprintf(w, "link %s, %d downloads at a time, %d unpacks at a time on %g cores of %s, NVM %s, HDD %s, blobs on %s,\ncontainerd's commits %g s a layer and %g s a blob, %.0f %% of files hot\n\n",
		FormatRate(o.Bandwidth), o.Concurrent, o.Unpacks, o.Cores, FormatRate(o.Unpack), FormatRate(o.NVMWrite), FormatRate(o.HDDWrite), on, o.Commit, o.BlobCommit, 100*o.Hot)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	n := len(r.Policies)
	fmt.Fprintln(t, "\t\tNVM saved, % of stored bytes"+strings.Repeat("\t", n)+"seconds until durable"+strings.Repeat("\t", n+1))
	names := strings.Join(r.Policies, "\t")
	fmt.Fprintln(t, "\timages\t"+names+"\tdownload\t"+names+"\t")
	row := func(g OnePassGroup) {
		fmt.Fprintf(t, "%s\t%d\t", g.Name, g.Images)
		for _, p := range r.Policies {
			fmt.Fprintf(t, "%.1f\t", 100*g.NVMSaved[p])
		}
		fmt.Fprintf(t, "%.2f\t", g.Downloaded)
		for _, p := range r.Policies {
			fmt.Fprintf(t, "%.2f\t", g.TTotal[p])
		}
		fmt.Fprintln(t)
	}
	if images {
		for _, i := range r.Images {
			row(i.OnePassGroup)
		}
	}
	for _, c := range r.Categories {
		row(c)
	}
	row(r.All)
	return t.Flush()
}
