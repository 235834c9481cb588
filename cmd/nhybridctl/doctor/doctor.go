// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package doctor looks for what is wrong with an installation and says how to cure it.
package doctor

import "fmt"

// Level is how bad a finding is.
type Level string

const (
	OK   Level = "ok"
	Warn Level = "warn" // works, but not as well or not for everyone
	Fail Level = "fail" // does not work
)

// Finding is one thing that was looked at. Text and Cure are one line each; Cure is empty where nothing is to be done.
type Finding struct {
	Area  string `json:"area"` // kernel, trace, nvm, hdd, tiers, regions, mounts, config, daemon, images or containerd
	Level Level  `json:"level"`
	Text  string `json:"text"`
	Cure  string `json:"cure"`
}

// findings collects those of one area.
type findings struct {
	area string
	all  []Finding
}

func (f *findings) ok(format string, args ...any) { f.add(OK, "", format, args...) }

func (f *findings) add(level Level, cure, format string, args ...any) {
	f.all = append(f.all, Finding{Area: f.area, Level: level, Text: fmt.Sprintf(format, args...), Cure: cure})
}
