// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"encoding/hex"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/integration/pmem/internal/manifest"
)

const (
	whiteoutPrefix = ".wh."
	opaqueName     = ".wh..wh..opq"
)

// entry is one file of a layer.
type entry struct {
	name   string
	mode   uint32 // type and permissions, as in stat(2); a plain permission means a regular file
	data   []byte
	link   string // target of a symlink
	hard   string // name of the file of the same layer that this is a hard link to
	uid    int
	rdev   [2]int64
	xattrs map[string]string
}

// mtime is old, so that no file can have it by chance, and not of whole seconds.
var mtime = time.Unix(1_500_000_000, 123_456_789)

func dir(name string) entry { return entry{name: name, mode: unix.S_IFDIR | 0o755} }

func file(name, data string) entry {
	return entry{name: name, mode: unix.S_IFREG | 0o644, data: []byte(data)}
}

// layers of the test image: the first goes to HDD and the others to NVM under the policy of the guest (boundary=1). Each has
// the same probe, so that a program from either tier can tell where its own pages are. programs are those of buildPrograms.
func layers(programs map[string]string) ([][]entry, error) {
	busybox, err := readProgram("busybox")
	if err != nil {
		return nil, err
	}
	own := map[string][]byte{}
	for name, path := range programs {
		if own[name], err = os.ReadFile(path); err != nil {
			return nil, err
		}
	}
	// Without compression the size on the wire is the size on disk.
	blob := make([]byte, 3<<20)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(blob)

	base := []entry{dir("bin"), {name: "bin/busybox", mode: unix.S_IFREG | 0o755, data: busybox}}
	for _, applet := range []string{"sh", "cat", "chmod", "chown", "dd", "id", "ln", "mkdir", "mv", "rm", "sleep"} {
		base = append(base, entry{name: "bin/" + applet, mode: unix.S_IFLNK | 0o777, link: "busybox"})
	}
	for _, d := range []string{"dev", "etc", "proc", "run", "sys", "tmp"} {
		base = append(base, dir(d))
	}
	base = append(base,
		file("etc/passwd", "root:x:0:0:root:/:/bin/sh\nworker:x:1000:1000:worker:/:/bin/sh\n"),
		file("etc/group", "root:x:0:\nworkers:x:1000:\ncrew:x:2000:worker\n"),
		entry{name: "bin/probe-base", mode: unix.S_IFREG | 0o755, data: own["probe"]},
		dir("data"),
		file("data/gone", "a later layer deletes this\n"),
		file("data/changed", "old\n"),
		entry{name: "data/blob", mode: unix.S_IFREG | 0o644, data: blob},
		dir("data/opaque"), file("data/opaque/old", "hidden\n"),
		dir("data/removed"), dir("data/removed/sub"), file("data/removed/sub/f", "deleted with its directory\n"),
		dir("data/move"), file("data/move/inner", "moved with its directory\n"), dir("data/move/deep"), file("data/move/deep/leaf", "leaf\n"),
		file("data/mode", "its mode changes in a container\n"),
		file("data/owner", "its owner changes in a container\n"),
		file("data/write", "written to in a container\n"),
	)
	middle := []entry{
		dir("bin"), {name: "bin/probe-top", mode: unix.S_IFREG | 0o755, data: own["probe"]},
		{name: "bin/ledger-go", mode: unix.S_IFREG | 0o755, data: own["ledger-go"]},
		{name: "bin/ledger-c", mode: unix.S_IFREG | 0o755, data: own["ledger-c"]},
		dir("data"), file("data/"+whiteoutPrefix+"gone", ""), file("data/"+whiteoutPrefix+"removed", ""),
		dir("data/opaque"), file("data/opaque/"+opaqueName, ""), file("data/opaque/new", "seen\n"),
		file("data/changed", "new\n"),
	}
	top := []entry{
		dir("data"), dir("data/kinds"),
		file("data/kinds/empty", ""),
		file("data/kinds/large", strings.Repeat("too large to stand in the metadata\n", 1000)), // the others are not
		file("data/kinds/first", "two names\n"),
		{name: "data/kinds/second", mode: unix.S_IFREG | 0o644, hard: "data/kinds/first"},
		{name: "data/kinds/setuid", mode: unix.S_IFREG | unix.S_ISUID | 0o755, data: []byte("#!/bin/sh\n"), uid: 1000},
		{name: "data/kinds/fifo", mode: unix.S_IFIFO | 0o600},
		{name: "data/kinds/null", mode: unix.S_IFCHR | 0o666, rdev: [2]int64{1, 3}},
		{name: "data/kinds/dangling", mode: unix.S_IFLNK | 0o777, link: "/no/such/file"},
		{name: "data/kinds/attrs", mode: unix.S_IFREG | 0o644, data: []byte("with attributes\n"), xattrs: map[string]string{
			"user.note": "kept",
			// cap_net_bind_service=ep, version 2 (include/uapi/linux/capability.h: struct vfs_cap_data)
			"security.capability": "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
		}},
		file("data/kinds/"+strings.Repeat("n", 255), "a long name\n"),
		file("data/kinds/with space, \t\\and\"more", "an odd name\n"),
	}
	return [][]entry{base, middle, top}, nil
}

func readProgram(name string) ([]byte, error) {
	p, err := lookPath(name)
	if err != nil {
		return nil, err
	}
	return os.ReadFile(p)
}

// merged is the tree that a container of the layers must see.
func merged(layers [][]entry) manifest.Tree {
	tree := manifest.Tree{}
	for _, layer := range layers {
		for _, e := range layer {
			d, base := path.Split(e.name)
			switch {
			case base == opaqueName:
				kept := tree[path.Clean(d)]
				tree.Remove(path.Clean(d))
				tree[path.Clean(d)] = kept
				continue
			case strings.HasPrefix(base, whiteoutPrefix):
				tree.Remove(d + strings.TrimPrefix(base, whiteoutPrefix))
				continue
			case e.hard != "":
				f := tree[e.hard]
				f.Links++
				tree[e.hard], tree[e.name] = f, f
				continue
			}
			f := manifest.File{Mode: e.mode, UID: uint32(e.uid), GID: uint32(e.uid), Mtime: mtime.UnixNano(), Target: e.link, Links: 1}
			switch e.mode & unix.S_IFMT {
			case unix.S_IFDIR:
				f.Links = 0
			case unix.S_IFREG:
				f.Size, f.Digest = int64(len(e.data)), manifest.Digest(e.data)
			case unix.S_IFCHR:
				f.Rdev = unix.Mkdev(uint32(e.rdev[0]), uint32(e.rdev[1]))
			}
			for key, value := range e.xattrs {
				if f.Xattrs == nil {
					f.Xattrs = map[string]string{}
				}
				f.Xattrs[key] = hex.EncodeToString([]byte(value))
			}
			tree[e.name] = f
		}
	}
	return tree
}

// archive writes a layer as a tar.
func archive(layer []entry) ([]byte, error) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, e := range layer {
		h := &tar.Header{
			Name: e.name, Mode: int64(e.mode &^ unix.S_IFMT), Uid: e.uid, Gid: e.uid, ModTime: mtime, Size: int64(len(e.data)),
			Linkname: e.link, Devmajor: e.rdev[0], Devminor: e.rdev[1], Format: tar.FormatPAX, PAXRecords: map[string]string{},
		}
		for key, value := range e.xattrs {
			h.PAXRecords["SCHILY.xattr."+key] = value
		}
		switch e.mode & unix.S_IFMT {
		case unix.S_IFDIR:
			h.Typeflag, h.Name = tar.TypeDir, e.name+"/"
		case unix.S_IFLNK:
			h.Typeflag = tar.TypeSymlink
		case unix.S_IFIFO:
			h.Typeflag = tar.TypeFifo
		case unix.S_IFCHR:
			h.Typeflag = tar.TypeChar
		default:
			h.Typeflag = tar.TypeReg
		}
		if e.hard != "" {
			h.Typeflag, h.Linkname = tar.TypeLink, e.hard
		}
		if err := w.WriteHeader(h); err != nil {
			return nil, fmt.Errorf("write layer entry %q: %w", e.name, err)
		}
		if _, err := w.Write(e.data); err != nil {
			return nil, fmt.Errorf("write layer entry %q: %w", e.name, err)
		}
	}
	if err := w.Close(); err != nil {
		return nil, fmt.Errorf("write layer: %w", err)
	}
	return buf.Bytes(), nil
}

// pushImage makes the image of layers and pushes it to ref.
func pushImage(ref string, layers [][]entry) error {
	tag, err := name.NewTag(ref, name.Insecure)
	if err != nil {
		return fmt.Errorf("push image: %w", err)
	}
	image := empty.Image
	for _, entries := range layers {
		data, err := archive(entries)
		if err != nil {
			return err
		}
		layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil })
		if err != nil {
			return fmt.Errorf("make layer: %w", err)
		}
		if image, err = mutate.AppendLayers(image, layer); err != nil {
			return fmt.Errorf("make image: %w", err)
		}
	}
	config, err := image.ConfigFile()
	if err != nil {
		return fmt.Errorf("make image: %w", err)
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", "amd64"
	config.Config = v1.Config{Env: []string{"PATH=/bin"}, Cmd: []string{"/bin/sh"}}
	if image, err = mutate.ConfigFile(image, config); err != nil {
		return fmt.Errorf("make image: %w", err)
	}
	if err := remote.Write(tag, image); err != nil {
		return fmt.Errorf("push image: %w", err)
	}
	return nil
}
