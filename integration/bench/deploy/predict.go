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

// commitTime is what a commit of a layer takes at least where containerd's database is on the HDD, in seconds: some
// transactions. The daemon counts with it when it places files. A blob's is taken for the same.
const commitTime = 0.1

// machine is what the one-pass model is told of the machine that a pull ran on.
type machine struct {
	// Unpack is how many uncompressed bytes a thread of the daemon makes in a second in which it does not wait for anything but
	// a processor: less than one processor could, where others use it.
	Unpack float64 `json:"unpack"`
	// Cores is how many such threads make as much as all processors.
	Cores float64 `json:"cores"`
}

// machineOf is what a pull by nhybrid has shown of its machine; ok is false where the run was not measured so.
func machineOf(r run) (m machine, ok bool) {
	if r.DaemonCPUS <= 0 || r.LinkRate.Three <= 0 || r.CPUs <= 0 {
		return m, false
	}
	share := r.DaemonCPUS / (r.DaemonCPUS + r.DaemonWaitS)
	return machine{Unpack: float64(r.DataBytes) / r.DaemonCPUS * share, Cores: float64(r.CPUs) / share}, true
}

// diskOf is the rate of the disk in a cell, in bytes a second of its work: that of the pull that gave it most. Its own rate it
// has for large requests only; journals, flushes and seeks between blobs and packs are in this one.
func (rs runs) diskOf(cell key) float64 {
	var most run
	for _, r := range rs {
		if r.cell() == cell && r.HDDToDurable.BusyMS > 0 && r.HDDToDurable.WrittenBytes > most.HDDToDurable.WrittenBytes {
			most = r
		}
	}
	if most.HDDToDurable.WrittenBytes == 0 {
		return hddsim.HDD().WriteRate
	}
	return diskRate(most)
}

// predict is what the one-pass model says of a run: with the rate of the disk, the link's from just before the run, the processor
// time that the daemon took and waited for, and what it took rates for when it placed files. ok is false for runs that the model
// does not know.
func (r run) predict(defaultPolicy string, disk float64) (p placement.Prediction, ok bool, err error) {
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
	o.HDDWrite, o.ContentOnHDD, o.Commit, o.BlobCommit = disk, true, commitTime, commitTime
	layers := make([]placement.ImageLayer, 0, len(r.Layers))
	var hdd, unpack []float64
	for _, l := range r.Layers {
		if l.HDDRate > 0 && l.UnpackRate > 0 {
			hdd, unpack = append(hdd, l.HDDRate), append(unpack, l.UnpackRate)
		}
		layers = append(layers, placement.ImageLayer{Digest: l.Digest, Compressed: l.Compressed, Uncompressed: l.Data})
	}
	if len(hdd) > 0 {
		o.Taken = placement.Taken{HDDWrite: result.Median(hdd), Unpack: result.Median(unpack), Commit: commitTime}
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
	disk  float64
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
		disk := rs.diskOf(r.cell())
		p, ok, err := r.predict(defaultPolicy, disk)
		if err != nil {
			return nil, err
		}
		if ok {
			all = append(all, predicted{r, disk, p})
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
		Title: "Measured and predicted by the one-pass model",
		Head: []string{"image", "link", "variant", "round", "HDD", "unpacking", "cores", "downloaded s", "predicted", "returned s", "predicted", "durable s", "predicted",
			"NVM MB", "predicted", "of MB"},
	}
	seconds := func(s float64) string { return fmt.Sprintf("%.2f", s) }
	mb := func(n int64) string { return fmt.Sprintf("%.1f", float64(n)/1e6) }
	for _, p := range all {
		m, _ := machineOf(p.run)
		t.Rows = append(t.Rows, []string{
			p.Image, p.Link, p.Variant, fmt.Sprint(p.Round), placement.FormatRate(p.disk), placement.FormatRate(m.Unpack), fmt.Sprintf("%.2f", m.Cores),
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
