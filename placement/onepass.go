// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package placement

import (
	"fmt"

	"github.com/containerd/errdefs"
)

// Prediction is what the one-pass model says of one pull. Times are seconds since its start.
type Prediction struct {
	Downloaded float64 `json:"downloaded"` // the last byte has arrived
	Returned   float64 `json:"returned"`   // the last layer is committed: containerd says the image is there
	Durable    float64 `json:"durable"`    // and all bytes are on their devices
	NVMBytes   int64   `json:"nvm_bytes"`  // uncompressed bytes of layers on NVM when durable
	HoleBytes  int64   `json:"hole_bytes"` // those of them that the packs lack
	Bytes      int64   `json:"bytes"`      // uncompressed bytes of all layers, shared ones once
	LDL        int     `json:"ldl"`        // index of the layer whose blob arrived last; -1 without layers
}

// NVMSaved returns 1 - NVMBytes/Bytes.
func (p Prediction) NVMSaved() float64 { return saved(float64(p.NVMBytes), float64(p.Bytes)) }

// Predict returns what the one-pass model says of a pull of these layers, bottom first, into an empty store with Options.Policy.
// The error is errdefs.ErrInvalidArgument for options or layers that make no sense.
func Predict(layers []ImageLayer, o Options) (Prediction, error) {
	o, err := o.complete()
	if err != nil {
		return Prediction{}, err
	}
	p, err := ParsePolicy(o.Policy)
	if err != nil {
		return Prediction{}, err
	}
	if len(layers) == 0 {
		return Prediction{}, fmt.Errorf("predict a pull: it has no layers: %w", errdefs.ErrInvalidArgument)
	}
	for i, l := range layers {
		if l.Compressed < 0 || l.Uncompressed < 0 || l.Compressed > maxLayerBytes || l.Uncompressed > maxLayerBytes {
			return Prediction{}, fmt.Errorf("predict a pull: layer %d has no size: %w", i, errdefs.ErrInvalidArgument)
		}
	}
	return onePass(layers, o, p), nil
}

// onePass runs the model for options and layers that were checked.
func onePass(layers []ImageLayer, o Options, p Policy) Prediction {
	s := newPass(layers, o, p)
	for s.settle(); s.step(); s.settle() {
	}
	s.out.Durable = max(s.out.Durable, s.out.Returned)
	return s.out
}
