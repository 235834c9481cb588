// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"context"
	"errors"

	"github.com/nhybrid/nhybrid/hif/static"
)

// prediction is how well static analysis tells what a start opens.
type prediction struct {
	Files  score `json:"files"`
	Layers score `json:"layers"`
}

// score is that of one method.
type score struct {
	Predicted int     `json:"predicted"`
	Bytes     int64   `json:"bytes"`
	Precision float64 `json:"precision"`
	Recall    float64 `json:"recall"`
}

// predict analyses an image by file and by layers and compares both with the files that a start has used.
func (v *view) predict(ctx context.Context, files map[string]file, used []string) (p prediction, err error) {
	root, err := static.OpenDir(v.dir)
	if err != nil {
		return p, err
	}
	defer func() { err = errors.Join(err, root.Close()) }()
	found, err := static.Analyze(ctx, root, v.config.Config, static.Options{})
	if err != nil && !errors.Is(err, static.ErrIncomplete) {
		return p, err
	}
	var fine, coarse []string
	for _, f := range found {
		// Empty files have no data and stand in no trace.
		if files[f.Path].size > 0 {
			fine = append(fine, f.Path)
		}
	}
	kinds := static.Layers(v.config.History, len(v.layers))
	for name, f := range files {
		if f.layer >= 0 && kinds[f.layer].Hot() {
			coarse = append(coarse, name)
		}
	}
	rate := func(predicted []string) (s score) {
		s.Predicted = len(predicted)
		for _, name := range predicted {
			s.Bytes += files[name].size
		}
		s.Precision, s.Recall = static.Score(predicted, used)
		return s
	}
	return prediction{rate(fine), rate(coarse)}, nil
}
