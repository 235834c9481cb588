// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build !amd64

package main

import "errors"

func (p *region) barePersist(*int32, int) error {
	return errors.New("the bare sequence of instructions is written for amd64 only")
}
