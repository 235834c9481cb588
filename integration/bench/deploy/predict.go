// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"fmt"
	"math"

	"github.com/nhybrid/nhybrid/integration/bench/result"
	"github.com/nhybrid/nhybrid/integration/hddsim"
	"github.com/nhybrid/nhybrid/placement"
)

// unpackers is the daemon's default for layers unpacked at a time.
const unpackers = 3

// machine is what the one-pass model is told of the machine that a pull ran on.
type machine struct {
	// Unpack is how many uncompressed bytes the daemon makes in a second of processor time.
	Unpack float64 `json:"unpack"`
	// Cores is how many cores it would have had throughout, had the pull waited for nothing but processors: its share of the time
	// that all processors worked.
	Cores float64 `json:"cores"`
}

// machineOf is what a pull by nhybrid has shown of its machine; ok is false where the run was not measured so.
func machineOf(r run) (m machine, ok bool) {
	if r.DaemonCPUS <= 0 || r.BusyCPUS <= 0 || r.LinkRate.Three <= 0 || r.CPUs <= 0 {
		return m, false
	}
	share := min(r.DaemonCPUS/r.BusyCPUS, 1)
	return machine{Unpack: float64(r.DataBytes) / r.DaemonCPUS, Cores: share * float64(r.CPUs)}, true
}

// predict is what the one-pass model says of a run: with the link's rate from just before it, the rate of the emulated disk, and
// the processor time that it took. ok is false for runs that the model does not know.
func (r run) predict(defaultPolicy string) (p placement.Prediction, ok bool, err error) {
	v, _ := variantByName(r.Variant)
	m, ok := machineOf(r)
	if !v.Hybrid || !ok || len(r.Layers) == 0 {
		return p, false, nil
	}
	o := placement.DefaultOptions()
	o.Policy = v.Policy
	if o.Policy == "" {
		o.Policy = defaultPolicy
	}
	o.Bandwidth, o.Unpack, o.Cores, o.Unpacks = r.LinkRate.Three, m.Unpack, m.Cores, unpackers
	o.HDDWrite, o.ContentOnHDD = hddsim.HDD().WriteRate, true
	layers := make([]placement.ImageLayer, 0, len(r.Layers))
	for _, l := range r.Layers {
		layers = append(layers, placement.ImageLayer{Digest: l.Digest, Compressed: l.Compressed, Uncompressed: l.Data})
	}
	p, err = placement.Predict(layers, o)
	if err != nil {
		return p, false, fmt.Errorf("predict %s: %w", r.key, err)
	}
	return p, true, nil
}

// predicted is a run and what the model says of it.
type predicted struct {
	run
	model placement.Prediction
}

// timeError is by what fraction of the measured time until durable the model is wrong.
func (p predicted) timeError() float64 { return math.Abs(p.model.Durable/p.durable() - 1) }

// nvmError is by what fraction of the image's bytes the model is wrong about those on NVM.
func (p predicted) nvmError() float64 {
	return math.Abs(float64(p.model.NVMBytes-p.NVMDataBytes)) / float64(p.DataBytes)
}

func (rs runs) predicted(defaultPolicy string) (all []predicted, err error) {
	for _, r := range rs {
		p, ok, err := r.predict(defaultPolicy)
		if err != nil {
			return nil, err
		}
		if ok {
			all = append(all, predicted{r, p})
		}
	}
	return all, nil
}

// predictionFigures are medians over all pulls by nhybrid over a link, whatever their policy.
func predictionFigures(all []predicted, set func(string, float64)) {
	times, nvm := map[string][]float64{}, map[string][]float64{}
	for _, p := range all {
		times[p.Link] = append(times[p.Link], p.timeError())
		nvm[p.Link] = append(nvm[p.Link], p.nvmError())
	}
	for link := range times {
		set("predicted_time_error_"+suffix(link), result.Median(times[link]))
		set("predicted_nvm_error_"+suffix(link), result.Median(nvm[link]))
	}
}

// predictionTable sets both beside each other, run by run.
func predictionTable(all []predicted) result.Table {
	t := result.Table{
		Title: fmt.Sprintf("Measured and predicted by the one-pass model (HDD %s)", placement.FormatRate(hddsim.HDD().WriteRate)),
		Head: []string{"image", "link", "variant", "round", "unpacking", "cores", "downloaded s", "predicted", "returned s", "predicted", "durable s", "predicted",
			"NVM MB", "predicted", "of MB"},
	}
	seconds := func(s float64) string { return fmt.Sprintf("%.2f", s) }
	mb := func(n int64) string { return fmt.Sprintf("%.1f", float64(n)/1e6) }
	for _, p := range all {
		m, _ := machineOf(p.run)
		t.Rows = append(t.Rows, []string{
			p.Image, p.Link, p.Variant, fmt.Sprint(p.Round), placement.FormatRate(m.Unpack), fmt.Sprintf("%.2f", m.Cores),
			seconds(p.downloaded()), seconds(p.model.Downloaded), seconds(p.ReturnS), seconds(p.model.Returned), seconds(p.durable()), seconds(p.model.Durable),
			mb(p.NVMDataBytes), mb(p.model.NVMBytes), mb(p.DataBytes),
		})
	}
	return t
}

// downloaded is when the last byte of the layers had come over the link.
func (r run) downloaded() float64 {
	if r.LDL >= len(r.Layers) {
		return math.NaN()
	}
	return r.Layers[r.LDL].ArrivedS
}
