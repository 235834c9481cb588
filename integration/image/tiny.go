// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package image

import (
	"archive/tar"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// TinySpec describes an image of generated files. Equal specs give equal digests.
type TinySpec struct {
	// Seed varies the content.
	Seed uint64
	// Layers are the bytes of file content of each layer, bottom first. The content does not compress.
	Layers []int64
	// Files is the number of files that the bytes of a layer are spread over. 0: 8.
	Files int
	// Runnable puts the layer of Busybox below.
	Runnable bool
	// Nasty adds to each layer one of every kind of entry that is easily got wrong; see nasty.
	Nasty bool
	// Hostile adds entries with overlay's own xattrs, which an image must not be able to set.
	Hostile bool
	// Config of the image; the command is a shell where nothing else is said.
	Config v1.Config
}

// Tiny makes an image of generated files in memory. File j of layer i is /data/i/j; /data/shared is in every layer,
// with the layer's index as its content.
func Tiny(spec TinySpec) (v1.Image, error) {
	if len(spec.Layers) == 0 && !spec.Runnable {
		return nil, errors.New("make tiny image: no layers; set TinySpec.Layers or Runnable")
	}
	var layers []v1.Layer
	var history []string
	if spec.Runnable {
		base, err := busyboxLayer()
		if err != nil {
			return nil, err
		}
		layers, history = append(layers, base), append(history, "busybox")
	}
	for i, size := range spec.Layers {
		l, err := Layer(tinyEntries(spec, i, size))
		if err != nil {
			return nil, err
		}
		layers, history = append(layers, l), append(history, fmt.Sprintf("%d bytes", size))
	}
	if spec.Config.Cmd == nil && spec.Config.Entrypoint == nil {
		spec.Config.Cmd = []string{"/bin/sh"}
	}
	return Assemble(spec.Config, layers, history)
}

func tinyEntries(spec TinySpec, i int, size int64) []Entry {
	var seed [32]byte
	binary.LittleEndian.PutUint64(seed[:], spec.Seed)
	binary.LittleEndian.PutUint64(seed[8:], uint64(i))
	random := rand.NewChaCha8(seed)

	entries := []Entry{
		dir("data", 0o755), dir(fmt.Sprintf("data/%d", i), 0o755),
		file("data/shared", 0o644, fmt.Appendf(nil, "%d\n", i)),
	}
	files := max(1, spec.Files)
	if spec.Files == 0 {
		files = 8
	}
	for j := range files {
		data := make([]byte, size*int64(j+1)/int64(files)-size*int64(j)/int64(files))
		_, _ = random.Read(data) // never fails
		entries = append(entries, file(fmt.Sprintf("data/%d/%d", i, j), 0o644, data))
	}
	if spec.Nasty {
		entries = append(entries, nasty(i)...)
	}
	if spec.Hostile {
		entries = append(entries, hostile(i)...)
	}
	return entries
}

// nasty is one of each kind, below /nasty. From the second layer on it also removes and replaces what the layer
// below has: a file, a directory by a whiteout, a directory's content by an opaque mark, a directory by a file and back.
func nasty(i int) []Entry {
	own := fmt.Sprintf("nasty/%d", i)
	with := func(e Entry, change func(*tar.Header)) Entry { change(&e.Header); return e }
	device := func(name string, kind byte, major, minor int64) Entry {
		return Entry{Header: tar.Header{Typeflag: kind, Name: name, Mode: 0o640, Devmajor: major, Devminor: minor, ModTime: epoch}}
	}
	below := fmt.Sprintf("nasty/%d", i-1)
	entries := []Entry{
		dir("nasty", 0o755), dir(own, 0o2775), dir(own+"/dir", 0o700), file(own+"/dir/inside", 0o600, []byte("inside")),
		dir(own+"/opaque", 0o755), file(own+"/opaque/old", 0o644, []byte("old")),
		dir(own+"/gone", 0o755), file(own+"/gone/deep", 0o644, []byte("deep")),
		file(own+"/removed", 0o644, []byte("removed")),
		file(own+"/empty", 0o444, nil),
		file(own+"/setuid", 0o4755, []byte("#!/bin/sh\n")),
		file(own+"/setgid", 0o2755, []byte("#!/bin/sh\n")),
		file(own+"/sparse", 0o644, make([]byte, 1<<20)),
		file(own+"/"+strings.Repeat("n", 255), 0o644, []byte("long name")),
		file(own+"/odd \t\"'\\ \u00e4\u4e16", 0o644, []byte("odd name")),
		{Header: tar.Header{Typeflag: tar.TypeLink, Name: own + "/hardlink", Linkname: own + "/setuid", Mode: 0o4755, ModTime: epoch}},
		{Header: tar.Header{Typeflag: tar.TypeLink, Name: own + "/dir/hardlink", Linkname: own + "/removed", ModTime: epoch}},
		symlink(own+"/dangling", "/does/not/exist"),
		symlink(own+"/relative", "dir/inside"),
		device(own+"/null", tar.TypeChar, 1, 3),
		device(own+"/loop", tar.TypeBlock, 7, 0),
		device(own+"/fifo", tar.TypeFifo, 0, 0),
		with(file(own+"/owned", 0o640, []byte("owned")), func(h *tar.Header) { h.Uid, h.Gid = 1234567, 7654321 }),
		with(file(own+"/xattrs", 0o644, []byte("xattrs")), func(h *tar.Header) {
			h.PAXRecords = map[string]string{
				"SCHILY.xattr.user.test": "value\xff",
				// cap_net_raw=ep in the kernel's form: vfs_cap_data revision 2 (include/uapi/linux/capability.h).
				"SCHILY.xattr.security.capability": "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
			}
		}),
		dir(own+"/becomes-file", 0o755),
		file(own+"/becomes-dir", 0o644, nil),
	}
	if i == 0 {
		return entries
	}
	return append(entries,
		file(below+"/.wh.removed", 0, nil), file(below+"/.wh.gone", 0, nil),
		dir(below+"/opaque", 0o750), file(below+"/opaque/.wh..wh..opq", 0, nil), file(below+"/opaque/new", 0o644, []byte("new")),
		file(below+"/becomes-file", 0o644, []byte("file")), dir(below+"/becomes-dir", 0o711),
	)
}

// hostile tries to point into the data of other layers.
func hostile(i int) []Entry {
	e := file(fmt.Sprintf("hostile-%d", i), 0o644, []byte("harmless"))
	e.PAXRecords = map[string]string{}
	for _, prefix := range []string{"trusted.overlay.", "user.overlay."} {
		e.PAXRecords["SCHILY.xattr."+prefix+"metacopy"] = "\x00"
		e.PAXRecords["SCHILY.xattr."+prefix+"redirect"] = "/1/etc/shadow"
	}
	d := dir(fmt.Sprintf("hostile-dir-%d", i), 0o755)
	d.PAXRecords = map[string]string{"SCHILY.xattr.trusted.overlay.opaque": "y", "SCHILY.xattr.user.overlay.opaque": "y"}
	return []Entry{e, d}
}
