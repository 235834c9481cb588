// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package loop attaches files to read-only loop devices, for kernels and filesystems from which EROFS mounts no file. A
// device goes by itself (autoclear) when its last user does: whoever attaches one holds it open until the mount stands.
// The functions are safe for concurrent use.
package loop

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// Attach makes a loop device of a file. The device has a reference of its own on the file.
func Attach(backing *os.File) (*os.File, error) {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("ask for a loop device: %w", err)
	}
	defer control.Close()

	config := unix.LoopConfig{
		Fd:   uint32(backing.Fd()),
		Info: unix.LoopInfo64{Flags: flags},
	}
	copy(config.Info.File_name[:len(config.Info.File_name)-1], backing.Name())
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
			return nil, fmt.Errorf("attach %q to loop device %d: %w", backing.Name(), n, err)
		}
	}
	return nil, fmt.Errorf("attach %q: every free loop device was taken by others: %w", backing.Name(), unix.EBUSY)
}

const flags = unix.LO_FLAGS_READ_ONLY | unix.LO_FLAGS_AUTOCLEAR

// shared is what Share knows of loop devices.
var shared struct {
	mu sync.Mutex
	// devices are paths in /dev by the file that each had when it was last looked at.
	// Those of earlier processes are looked for once.
	devices map[file]string
}

// file names a file of this machine.
type file struct{ dev, ino uint64 }

// Share returns the loop device of a file: one that [Attach] has made, of this process or an earlier one, or a new one.
func Share(backing *os.File) (*os.File, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(backing.Fd()), &st); err != nil {
		return nil, fmt.Errorf("stat %q: %w", backing.Name(), err)
	}
	want := file{st.Dev, st.Ino}
	shared.mu.Lock()
	defer shared.mu.Unlock()
	if shared.devices == nil {
		shared.devices = attached()
	}
	if path, ok := shared.devices[want]; ok {
		if device, has := open(path); device != nil {
			if has == want {
				return device, nil
			}
			device.Close()
		}
		delete(shared.devices, want) // cleared since
	}
	device, err := Attach(backing)
	if err == nil {
		shared.devices[want] = device.Name()
	}
	return device, err
}

// attached looks at all loop devices that have a file.
func attached() map[file]string {
	all := map[file]string{}
	paths, _ := filepath.Glob("/sys/block/loop*/loop/backing_file") // fails for a bad pattern only
	for _, path := range paths {
		path = filepath.Join("/dev", filepath.Base(filepath.Dir(filepath.Dir(path))))
		if device, has := open(path); device != nil {
			all[has] = path
			device.Close()
		}
	}
	return all
}

// open returns the device at path and its file if it shows the whole of one as [Attach] does, else nil. An open device keeps its file.
func open(path string) (*os.File, file) {
	device, err := os.OpenFile(path, os.O_RDONLY, 0)
	if err != nil {
		return nil, file{} // just cleared
	}
	info, err := unix.IoctlLoopGetStatus64(int(device.Fd()))
	if err == nil && info.Flags&flags == flags && info.Offset == 0 && info.Sizelimit == 0 {
		return device, file{info.Device, info.Inode}
	}
	device.Close()
	return nil, file{}
}
