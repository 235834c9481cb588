// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/opencontainers/image-spec/identity"
	ispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/integration/image/catalog"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// view is an image as its containers see it, mounted read-only.
type view struct {
	place *place
	key   string
	dir   string
	// layers are the directories of the layers, lowest first; of the overlayfs snapshotter only.
	layers []string
	config ispec.Image
}

// view mounts an image on a new directory below the given one.
func (p *place) view(ctx context.Context, img catalog.Image, below string) (_ *view, err error) {
	c, err := p.rig.Client()
	if err != nil {
		return nil, err
	}
	ctx = p.rig.Context(ctx)
	own, err := c.GetImage(ctx, p.rig.Ref(ref(img.Name)))
	if err != nil {
		return nil, err
	}
	diffs, err := own.RootFS(ctx)
	if err != nil {
		return nil, err
	}
	v := &view{place: p, dir: filepath.Join(below, "view-"+p.variant), key: "view-" + img.Name}
	if v.config, err = own.Spec(ctx); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("look at image %s with %s: %w", img.Name, p.variant, err), v.close(ctx))
		}
	}()
	mounts, err := c.SnapshotService(p.snapshotter).View(ctx, v.key, identity.ChainID(diffs).String(),
		snapshots.WithLabels(map[string]string{"containerd.io/gc.root": time.Now().UTC().Format(time.RFC3339)}))
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(v.dir, 0o755); err != nil {
		return nil, err
	}
	if err := mount.All(mounts, v.dir); err != nil {
		return nil, err
	}
	if p.variant == hybrid {
		return v, nil
	}
	for _, m := range mounts {
		if m.Type == "bind" { // an image of one layer
			v.layers = []string{m.Source}
		}
		for _, o := range m.Options {
			if dirs, ok := strings.CutPrefix(o, "lowerdir="); ok {
				v.layers = strings.Split(dirs, ":")
			}
		}
	}
	slices.Reverse(v.layers)
	if len(v.layers) != len(diffs) {
		return nil, fmt.Errorf("%d layers in the mount %v, %d in the image", len(v.layers), mounts, len(diffs))
	}
	return v, nil
}

func (v *view) close(ctx context.Context) error {
	ctx = v.place.rig.Context(context.WithoutCancel(ctx))
	err := mount.UnmountAll(v.dir, unix.UMOUNT_NOFOLLOW)
	if c, clientErr := v.place.rig.Client(); clientErr == nil {
		err = errors.Join(err, c.SnapshotService(v.place.snapshotter).Remove(ctx, v.key))
	}
	return errors.Join(err, os.RemoveAll(v.dir))
}

// file is a regular file of an image that is not empty.
type file struct {
	size  int64
	layer int
	inode uint64 // the same for all names of a file
}

// list are the regular files of an image that are not empty, by their paths without the leading slash.
func (v *view) list() (map[string]file, error) {
	files := map[string]file{}
	err := filepath.WalkDir(v.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err != nil || info.Size() == 0 {
			return err
		}
		files[strings.TrimPrefix(path, v.dir+"/")] = file{size: info.Size(), layer: -1}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for i := len(v.layers) - 1; i >= 0; i-- {
		for name, f := range files {
			if f.layer >= 0 {
				continue
			}
			var st unix.Stat_t
			if unix.Lstat(filepath.Join(v.layers[i], name), &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFREG {
				files[name] = file{f.size, i, st.Ino}
			}
		}
	}
	return files, nil
}

// inode finds a file of a layer; 0: no such file.
func (v *view) inode(layer int, path string) uint64 {
	if layer < 0 || layer >= len(v.layers) {
		return 0
	}
	var st unix.Stat_t
	if unix.Lstat(filepath.Join(v.layers[layer], path), &st) != nil {
		return 0
	}
	return st.Ino
}

// used are the files of the image that a log of strace tells of, sorted. Those that stand in the metadata are left out:
// they are nobody's to plan.
func (v *view) used(o *opened, files map[string]file) ([]string, error) {
	seen := map[string]bool{}
	for _, path := range o.files {
		if name := strings.TrimPrefix(path, "/"); files[name].size > 0 {
			seen[name] = true
		}
	}
	for _, path := range o.programs {
		if err := v.addProgram(seen, files, path, 0); err != nil {
			return nil, err
		}
	}
	var names []string
	for name := range seen {
		if files[name].size > pack.InlineMax {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, nil
}

// addProgram adds a program with what the kernel opens for it. One that the image does not have was made by the start.
func (v *view) addProgram(seen map[string]bool, files map[string]file, path string, depth int) error {
	const nesting = 5 // of #!, as in the kernel (BINPRM)
	name, err := resolve(v.dir, path)
	if err != nil || name == "" || files[name].size == 0 || seen[name] || depth > nesting {
		return err
	}
	seen[name] = true
	f, err := os.Open(filepath.Join(v.dir, name))
	if err != nil {
		return err
	}
	defer f.Close()
	head := make([]byte, 256)
	n, err := f.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if line, ok := bytes.CutPrefix(head[:n], []byte("#!")); ok {
		line, _, _ = bytes.Cut(line, []byte("\n"))
		if words := strings.Fields(string(line)); len(words) > 0 {
			return v.addProgram(seen, files, words[0], depth+1)
		}
		return nil
	}
	program, err := elf.NewFile(f)
	if err != nil {
		return nil // neither: the shell reads it
	}
	for _, p := range program.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		interpreter, err := io.ReadAll(p.Open())
		if err != nil {
			return fmt.Errorf("read the interpreter of %q: %w", name, err)
		}
		return v.addProgram(seen, files, strings.TrimRight(string(interpreter), "\x00"), depth+1)
	}
	return nil
}
