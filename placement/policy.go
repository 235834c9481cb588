// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package placement

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// Policy decides where the data of layers is stored: of whole layers, or of each file while its bytes come. Policies have no state
// and may be used by several goroutines. No method blocks, fails or panics, whatever it is asked.
type Policy interface {
	// Name is what ParsePolicy accepts.
	Name() string
	// ByFile reports whether PlaceFile decides for each file by itself. Where it does not, Decide is asked once before the layer
	// is unpacked, and FileInput.Tier carries its answer to PlaceFile.
	ByFile() bool
	// Late reports whether Decide must not be asked before the blob of the layer is complete, so that unpacking waits for that.
	Late() bool
	// Decide places a whole layer. An Input that makes no sense gives HDD and says so.
	Decide(Input) Decision
	// PlaceFile places one file of a layer that is being unpacked.
	PlaceFile(File, FileInput) FileDecision
}

// PolicyNames lists what ParsePolicy accepts, for messages and shell completion.
var PolicyNames = []string{"lass", "drain", "nvm", "hdd", "boundary=N"}

// ParsePolicy returns the policy of that name. The error for any other is errdefs.ErrInvalidArgument and lists the choices.
func ParsePolicy(s string) (Policy, error) {
	switch s {
	case "lass":
		return policy{name: s, rule: lass, late: true}, nil
	case "drain":
		return policy{name: s, rule: drain, byFile: true}, nil
	case "nvm":
		return policy{name: s, rule: func(Input) (Tier, string) { return NVM, "policy nvm puts every layer there" }}, nil
	case "hdd":
		return policy{name: s, rule: func(Input) (Tier, string) { return HDD, "policy hdd puts every layer there" }}, nil
	}
	if v, ok := strings.CutPrefix(s, "boundary="); ok {
		n, err := strconv.ParseUint(v, 10, 16)
		if err != nil {
			return nil, fmt.Errorf("policy %q: the boundary must be a layer index, a whole number from 0 to 65535: %w", s, errdefs.ErrInvalidArgument)
		}
		return policy{name: fmt.Sprintf("boundary=%d", n), rule: boundary(int(n))}, nil
	}
	return nil, fmt.Errorf("unknown policy %q: choose one of %s (N: index of the lowest layer on NVM): %w",
		s, strings.Join(PolicyNames, ", "), errdefs.ErrInvalidArgument)
}

// rule is a policy without admission: the wanted tier, and why, as the part of a sentence that follows "layer 3 to NVM: ".
type rule func(Input) (Tier, string)

type policy struct {
	name   string
	rule   rule
	byFile bool
	late   bool
}

func (p policy) Name() string { return p.name }
func (p policy) ByFile() bool { return p.byFile }
func (p policy) Late() bool   { return p.late }

func (p policy) Decide(in Input) Decision {
	d := Decision{Tier: HDD, Policy: p.name, LDL: LDL(in), Admitted: true, Input: in}
	if in.Index < 0 || in.Index >= len(in.Layers) {
		d.Reason = fmt.Sprintf("layer %d to HDD: the image is known to have %d layers only", in.Index, len(in.Layers))
		return d
	}
	tier, why := p.rule(in)
	if tier == NVM {
		need, room := Footprint(in.Layers[in.Index].Size()), roomOnNVM(in)
		if need <= room {
			d.Tier = NVM
		} else {
			d.Admitted = false
			why = fmt.Sprintf("it would go to NVM (%s), but needs %s there and %s are left of %s free",
				why, FormatBytes(need), FormatBytes(room), FormatBytes(in.NVMFree))
		}
	}
	d.Reason = fmt.Sprintf("layer %d to %s: %s", in.Index, strings.ToUpper(d.Tier.String()), why)
	return d
}

// roomOnNVM returns the free bytes less the reserve and less what is promised to layers that are being written now. A
// layer that is half written counts in full, since the written half is not known here: too little room at worst.
func roomOnNVM(in Input) int64 {
	room := available(in.NVMFree, in.NVMReserve, in.NVMPromised)
	for i, l := range in.Layers {
		if i != in.Index && l.Storing && !l.Stored && l.Tier == NVM {
			room = available(room, Footprint(l.Size()))
		}
	}
	return room
}

// lass is the paper's Layer-Aware Storage Strategy (strategy 3: the boundary is the last-downloading layer), bound late:
// a layer goes to NVM if no other layer of its image is still downloading, because only then does its storing add to the time
// of the pull. It is exact for sequential unpacking, where it gives "the LDL and all above it", and for parallel unpacking,
// where the layers above the LDL that are stored before it need no NVM either.
func lass(in Input) (Tier, string) {
	if n, left := in.Downloading(); n > 0 {
		return HDD, fmt.Sprintf("it is stored while %s, %s to go, so its storing costs the pull no time%s",
			count(n, "other layer still downloads", "other layers still download"), FormatBytes(left), expected(in))
	}
	return NVM, "no other layer is downloading any more, so the pull waits for its storing" + known(in)
}

func expected(in Input) string {
	if k := LDL(in); k >= 0 && k != in.Index {
		return fmt.Sprintf(" (layer %d is expected last)", k)
	}
	return ""
}

func known(in Input) string {
	switch k := LDL(in); {
	case k < 0:
		return " (all layers were there before the pull)"
	case k == in.Index:
		return " (it is the last to download)"
	default:
		return fmt.Sprintf(" (layer %d was the last to download)", k)
	}
}

// boundary puts the layers from index n up on NVM: the paper's strategies 1 to 3, for n below, above and at the LDL.
func boundary(n int) rule {
	return func(in Input) (Tier, string) {
		if in.Index >= n {
			return NVM, fmt.Sprintf("it is at or above the boundary, layer %d", n)
		}
		return HDD, fmt.Sprintf("it is below the boundary, layer %d", n)
	}
}

// drain sends a layer to HDD if the disk will have it before the pull can be over:
//
//	W + B/R <= T        HDD, else NVM
//
//	W = u(i)/U          until this layer, i, is written (into the page cache)
//	B                   bytes that the disk must take until i is on it: the backlog, other layers of this image
//	                    that are being written to HDD, and u(i); where containerd keeps its blobs on the
//	                    same disk, also what other blobs lack
//	R                   bytes/s at which the disk takes them, lately measured
//	T                   the least time that the rest of the pull needs, this layer included
//
// With left the bytes of a blob that have not arrived, u the uncompressed sizes, b the bandwidth and U the rate of unpacking, T is
// the largest of these, P being the layers that still download:
//
//	sequential   Σ{j≥i} u(j)/U                                               all that is still to be unpacked
//	             Σ{j∈P, j≤p} left(j)/b + Σ{j≥p} u(j)/U      for each p in P
//	parallel     u(j)/U                                     for each j whose storing has not started, and i
//	             Σ{j∈P, u(j)≥u(p)} left(j)/b + u(p)/U       for each p in P
//
// Each is a lower bound, in whatever order the layers arrive: of the layers of P up to p, the one that arrives last does so no sooner
// than the link can carry them all, and then it and all above it, so at least p and all above p, must still be unpacked; in
// parallel at least the smallest of those taken. For a layer whose size is not read from the blob yet, T counts its
// compressed size. So a layer on HDD is never what the pull waits for, as far as the measured rates hold. Unlike lass this
// sends layers to NVM that would still be in the page cache when the pull is over, and layers to HDD that come after the last
// download but have enough unpacking above them.
//
// Where containerd keeps its blobs and so its database on the same disk, T is the time until the last other blob has arrived, no
// more: from then on containerd's own fsyncs there, a hundred and more a pull, are what the pull waits for, and whatever else
// the disk has to do makes each of them wait.
//
// Where R, U or, with something left to download, the bandwidth is unknown, there is nothing to compute with: it falls back to lass
// and says so.
func drain(in Input) (Tier, string) {
	me := in.Layers[in.Index]
	others, left := in.Downloading()
	var missing string
	switch {
	case !(in.HDDRate > 0):
		missing = "the rate of the HDD"
	case !(in.UnpackRate > 0):
		missing = "the rate of unpacking"
	case !(in.Bandwidth > 0) && others > 0:
		missing = "the bandwidth"
	}
	if missing != "" {
		tier, why := lass(in)
		return tier, fmt.Sprintf("%s is not known yet, so by lass: %s", missing, why)
	}

	b := float64(max(in.HDDBacklog, 0)) + float64(me.Size())
	for i, l := range in.Layers {
		if i != in.Index && l.Storing && !l.Stored && l.Tier == HDD {
			b += float64(l.Size())
		}
	}
	if in.ContentOnHDD {
		b += float64(left)
	}
	on := float64(me.Size())/in.UnpackRate + b/in.HDDRate
	rest, over := restOfPull(in), "the pull"
	if in.ContentOnHDD {
		rest, over = 0, "the download of the other layers"
		if left > 0 {
			rest = float64(left) / in.Bandwidth
		}
	}
	if on <= rest {
		return HDD, fmt.Sprintf("the disk has it in %s (%s to write at %s), before %s can be over, %s at best",
			seconds(on), FormatBytes(int64(b)), FormatRate(in.HDDRate), over, seconds(rest))
	}
	return NVM, fmt.Sprintf("the disk would have it in %s only (%s to write at %s), and %s may be over in %s",
		seconds(on), FormatBytes(int64(b)), FormatRate(in.HDDRate), over, seconds(rest))
}

// restOfPull is T of drain, in seconds. It wants UnpackRate > 0, and Bandwidth > 0 if another layer is downloading.
func restOfPull(in Input) float64 {
	left := in.left()
	unpack := make([]float64, len(in.Layers))
	var pending []int // bottom first
	for i, l := range in.Layers {
		// How much of a layer is written that is being stored already is not known: it may be nearly all.
		if i == in.Index || !l.Storing && !l.Stored && !(in.Sequential && i < in.Index) {
			unpack[i] = float64(l.least()) / in.UnpackRate
		}
		if i != in.Index && !in.here(i) {
			pending = append(pending, i)
		}
	}
	var t float64
	after := unpack // what must still be unpacked once layer i has arrived
	if in.Sequential {
		after = make([]float64, len(unpack))
		var above float64
		for i := len(unpack) - 1; i >= 0; i-- {
			above += unpack[i]
			after[i] = above
		}
		t = after[in.Index]
	} else {
		t = slices.Max(unpack)
		slices.SortStableFunc(pending, func(a, b int) int { return cmp.Compare(unpack[b], unpack[a]) })
	}
	// after falls along pending, in both orders.
	var carry float64
	for _, p := range pending {
		carry += float64(left[p]) / in.Bandwidth
		t = max(t, carry+after[p])
	}
	return t
}

func count(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

func seconds(s float64) string {
	if s < 10 {
		return fmt.Sprintf("%.2f s", s)
	}
	return fmt.Sprintf("%.0f s", s)
}
