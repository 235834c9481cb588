// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package image

import (
	"archive/tar"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

const busyboxPath = "/bin/busybox"

// epoch is the time of generated entries: fixed, so that equal content gives equal digests.
var epoch = time.Unix(1700000000, 123456789)

// Busybox makes an image of one layer with Debian's static busybox, its applets and what a container expects to find,
// and the given layers above. Its command is a shell.
func Busybox(above ...v1.Layer) (v1.Image, error) {
	base, err := busyboxLayer()
	if err != nil {
		return nil, err
	}
	return Assemble(v1.Config{Cmd: []string{"/bin/sh"}}, append([]v1.Layer{base}, above...), []string{"busybox"})
}

// Pause makes an image for pod sandboxes: busybox asleep.
func Pause() (v1.Image, error) {
	base, err := busyboxLayer()
	if err != nil {
		return nil, err
	}
	return Assemble(v1.Config{Entrypoint: []string{"/bin/sleep", "2147483647"}}, []v1.Layer{base}, []string{"pause"})
}

// busyboxLayer is made once a process.
var busyboxLayer = sync.OnceValues(func() (v1.Layer, error) {
	program, err := os.ReadFile(busyboxPath)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("make busybox image: %w: install the Debian package busybox-static (make deps)", err)
	} else if err != nil {
		return nil, fmt.Errorf("make busybox image: %w", err)
	}
	applets, err := exec.Command(busyboxPath, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("list applets of busybox: %w", err)
	}
	var entries []Entry
	for _, d := range []string{"bin", "dev", "etc", "proc", "root", "run", "sys", "usr", "var"} {
		entries = append(entries, dir(d, 0o755))
	}
	entries = append(entries, dir("tmp", 0o1777), file("bin/busybox", 0o755, program),
		file("etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")),
		file("etc/group", 0o644, []byte("root:x:0:\nnogroup:x:65534:\n")))
	for applet := range strings.FieldsSeq(string(applets)) {
		if applet != "busybox" {
			entries = append(entries, symlink("bin/"+applet, "busybox"))
		}
	}
	return Layer(entries)
})

func dir(name string, mode int64) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: mode, ModTime: epoch}}
}

func file(name string, mode int64, data []byte) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, ModTime: epoch}, Data: data}
}

func symlink(name, target string) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777, ModTime: epoch}}
}
