// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Command daxprobe prints the physical addresses, in hex, of two pages: one of its own text, as the kernel mapped it to run the program, and the
// first of the file that it is given, or of itself. The kernel shows physical addresses only to CAP_SYS_ADMIN.
package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"reflect"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

func main() {
	name := "/proc/self/exe"
	if len(os.Args) > 1 {
		name = os.Args[1]
	}
	text, err := physical(reflect.ValueOf(main).Pointer())
	if err != nil {
		fmt.Fprintf(os.Stderr, "daxprobe: find own text: %v\n", err)
		os.Exit(1)
	}
	file, err := firstPage(name)
	if err != nil {
		fmt.Fprintf(os.Stderr, "daxprobe: find first page of %q: %v\n", name, err)
		os.Exit(1)
	}
	fmt.Printf("text=%x file=%x\n", text, file)
}

// firstPage maps the beginning of a file, touches it, and returns its physical address.
func firstPage(name string) (uint64, error) {
	f, err := os.Open(name)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	page, err := unix.Mmap(int(f.Fd()), 0, os.Getpagesize(), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return 0, fmt.Errorf("map: %w", err)
	}
	defer func() { _ = unix.Munmap(page) }()
	first := &page[0]
	touched := *first // only then is there a page
	addr, err := physical(uintptr(unsafe.Pointer(first)))
	runtime.KeepAlive(touched)
	return addr, err
}

// physical looks an address of this process up in /proc/self/pagemap (Documentation/admin-guide/mm/pagemap.rst): bit 63 says that the
// page is present, bits 0 to 54 are its frame number, zero where the reader may not know it.
func physical(addr uintptr) (uint64, error) {
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return 0, err
	}
	defer f.Close()
	size := uint64(os.Getpagesize())
	var raw [8]byte
	if _, err := f.ReadAt(raw[:], int64(uint64(addr)/size*8)); err != nil {
		return 0, fmt.Errorf("read pagemap: %w", err)
	}
	entry := binary.NativeEndian.Uint64(raw[:])
	frame := entry & (1<<55 - 1)
	if entry>>63 == 0 || frame == 0 {
		return 0, errors.New("its frame is not shown; CAP_SYS_ADMIN is needed")
	}
	return frame*size + uint64(addr)%size, nil
}
