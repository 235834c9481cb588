// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package host

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// AttachLoop makes a read-only loop device of a file. The device goes by itself when its last user does: hold the result
// open until the mount stands, then close it.
func AttachLoop(file string) (*os.File, error) {
	backing, err := os.Open(file)
	if err != nil {
		return nil, fmt.Errorf("open for a loop device: %w", err)
	}
	defer backing.Close() // the device has a reference of its own
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("ask for a loop device: %w", err)
	}
	defer control.Close()

	config := unix.LoopConfig{
		Fd:   uint32(backing.Fd()),
		Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_READ_ONLY | unix.LO_FLAGS_AUTOCLEAR},
	}
	copy(config.Info.File_name[:len(config.Info.File_name)-1], file)
	// Between the question for a free device and its use another process may take it.
	for range 64 {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("ask for a loop device: %w", err)
		}
		device, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", n), os.O_RDONLY, 0)
		if err != nil {
			return nil, fmt.Errorf("open loop device: %w", err)
		}
		err = unix.IoctlLoopConfigure(int(device.Fd()), &config)
		if err == nil {
			return device, nil
		}
		device.Close()
		if !errors.Is(err, unix.EBUSY) {
			return nil, fmt.Errorf("attach %q to loop device %d: %w", file, n, err)
		}
	}
	return nil, fmt.Errorf("attach %q: every free loop device was taken by others: %w", file, unix.EBUSY)
}
