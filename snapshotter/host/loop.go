// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package host

import (
	"fmt"
	"os"

	"github.com/nhybrid/nhybrid/internal/loop"
)

// AttachLoop makes a read-only loop device of a file. The device goes by itself when its last user does: hold the result
// open until the mount stands, then close it.
func AttachLoop(file string) (*os.File, error) {
	backing, err := os.Open(file)
	if err != nil {
		return nil, fmt.Errorf("open for a loop device: %w", err)
	}
	defer backing.Close() // the device has a reference of its own
	return loop.Attach(backing)
}
