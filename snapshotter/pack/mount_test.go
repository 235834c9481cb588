// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// twoLayers are layers with files of all sizes around the limit of inline ones and around a block. Some of the data
// files are on NVM.
func twoLayers(t *testing.T) (*stack, map[string][]byte) {
	i := 0
	s := newStack(t, func() bool { i++; return i%3 == 0 })
	want := map[string][]byte{}
	for layer := range 2 {
		dir := t.TempDir()
		for _, size := range []int{0, 1, InlineMax - 1, InlineMax, InlineMax + 1, 4095, 4096, 4097, 70000, 3 << 20} {
			name := fmt.Sprintf("d%d/f%d", layer, size)
			want[name] = bytes.Repeat([]byte{byte(size), byte(layer + 1), 3}, size/3+1)[:size]
			noError(t, os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755))
			noError(t, os.WriteFile(filepath.Join(dir, name), want[name], 0o644))
		}
		s.add(dir)
	}
	return s, want
}

// TestTiers: a file that comes to NVM under a running container is read from there
// by those who open it anew, and from the pack when it has gone again.
func TestTiers(t *testing.T) {
	asRoot(t)
	for _, useLoop := range []bool{false, true} {
		t.Run(fmt.Sprintf("loop %t", useLoop), func(t *testing.T) {
			s, want := twoLayers(t)
			s.loop = useLoop
			view := s.mount()
			root := mountContainer(t, view, s.nvm)
			check := func(when, root string) {
				t.Helper()
				for name, data := range want {
					if got, err := os.ReadFile(filepath.Join(root, name)); err != nil || !bytes.Equal(got, data) {
						t.Fatalf("%s: %q has %d bytes, %v", when, name, len(got), err)
					}
				}
			}
			check("stored", root)
			// Promotion. Other bytes of the same length show where a read goes.
			l := s.layers[0]
			ref := l.dataFiles()[5].Data
			if l.files[4] != "d0/f4097" {
				t.Fatalf("number 5 is %q", l.files[4])
			}
			hot := s.nvm + "/d" + ref.Redirect()
			other := bytes.Repeat([]byte{0xee}, len(want["d0/f4097"]))
			noError(t, os.MkdirAll(filepath.Dir(hot), 0o755))
			noError(t, os.WriteFile(hot, other, 0o600))
			fresh := mountContainer(t, view, s.nvm)
			if got, err := os.ReadFile(filepath.Join(fresh, "d0/f4097")); err != nil || !bytes.Equal(got, other) {
				t.Errorf("a promoted file is read from elsewhere: %v", err)
			}
			noError(t, os.Remove(hot))
			check("demoted, a new container", mountContainer(t, view, s.nvm))
			// The holes are filled before files leave NVM.
			noError(t, os.RemoveAll(s.nvm+"/d/10"))
			for n := range l.files {
				noError(t, fill(l, uint32(n+1), want[l.files[n]]))
			}
			check("all of a layer demoted", mountContainer(t, view, s.nvm))
			check("all of a layer demoted, the container from before", root)
		})
	}
}

// fill writes a data file into its place in the pack.
func fill(l *testLayer, n uint32, data []byte) error {
	f, err := os.OpenFile(l.pack, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(data, int64(l.dataFiles()[n].Block)*BlockSize)
	return errors.Join(err, f.Close())
}

// loopsOf are the names of the loop devices of a file.
func loopsOf(t *testing.T, path string) (devices []string) {
	t.Helper()
	var st unix.Stat_t
	noError(t, unix.Stat(path, &st))
	all, err := filepath.Glob("/dev/loop[0-9]*")
	noError(t, err)
	for _, d := range all {
		f, err := os.Open(d)
		if err != nil {
			continue
		}
		if info, err := unix.IoctlLoopGetStatus64(int(f.Fd())); err == nil && info.Device == st.Dev && info.Inode == st.Ino {
			devices = append(devices, d)
		}
		f.Close()
	}
	return devices
}

// TestLoopsAreShared: views of chains with a common layer have one loop device for
// its pack, which goes with the last of them.
func TestLoopsAreShared(t *testing.T) {
	asRoot(t)
	s, want := twoLayers(t)
	s.loop = true
	first := s.mount()
	dir := t.TempDir()
	noError(t, os.WriteFile(filepath.Join(dir, "top"), bytes.Repeat([]byte("top"), InlineMax), 0o644))
	s.add(dir)
	second := s.mount()
	for _, l := range s.layers {
		if d := loopsOf(t, l.pack); len(d) != 1 {
			t.Errorf("layer %d has loop devices %q", l.Layer, d)
		}
	}
	noError(t, UnmountView(first))
	if Mounted(first) || exists(first) {
		t.Error("the first view is still there")
	}
	if d := loopsOf(t, s.layers[0].pack); len(d) != 1 {
		t.Errorf("with one view left the pack has loop devices %q", d)
	}
	root := mountContainer(t, second, s.nvm)
	for name, data := range want {
		if got, err := os.ReadFile(filepath.Join(root, name)); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%q has %d bytes, %v", name, len(got), err)
		}
	}
	noError(t, unix.Unmount(root, unix.MNT_DETACH))
	noError(t, unix.Mount("none", root, "tmpfs", 0, "")) // for the cleanup
	noError(t, UnmountView(second))
	noError(t, UnmountView(second)) // again: nothing to do
	for _, l := range s.layers {
		// The kernel lets go of a mount when all descriptors of it are closed, some of them by others.
		for end := time.Now().Add(10 * time.Second); len(loopsOf(t, l.pack)) > 0 && time.Now().Before(end); {
			time.Sleep(time.Millisecond)
		}
		if d := loopsOf(t, l.pack); len(d) != 0 {
			t.Errorf("layer %d still has loop devices %q", l.Layer, d)
		}
	}
}

// TestIDMapped: a clone of a view with other owners carries containers, though
// h/ is for its owner alone.
func TestIDMapped(t *testing.T) {
	asRoot(t)
	s, want := twoLayers(t)
	view := s.mount()
	ns, err := mount.GetUsernsFD("0:65536:65536", "0:65536:65536")
	noError(t, err)
	defer ns.Close()
	clone := t.TempDir()
	noError(t, mount.IDMapMount(view, clone, int(ns.Fd())))
	t.Cleanup(func() { unmount(t, clone) })
	root := mountContainer(t, clone, s.nvm)
	for name, data := range want {
		path := filepath.Join(root, name)
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%q has %d bytes, %v", name, len(got), err)
		}
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil || st.Uid != 65536 {
			t.Errorf("%q belongs to %d, %v", name, st.Uid, err)
		}
	}
}

// TestMountRefuses: what is not mounted is said with its class.
func TestMountRefuses(t *testing.T) {
	asRoot(t)
	s, _ := twoLayers(t)
	image, stats := writeTo(t, s.layers)
	packs := packsOf(s.layers, stats.Devices)
	point := filepath.Join(t.TempDir(), "p")
	for what, test := range map[string]struct {
		view  string
		packs []string
		is    func(error) bool
	}{
		"too few packs":  {image, packs[:1], errdefs.IsInvalidArgument},
		"too many packs": {image, append(packs[:2:2], packs[0]), errdefs.IsInvalidArgument},
		"a missing pack": {image, []string{packs[0], packs[1] + "x"}, func(err error) bool { return errors.Is(err, os.ErrNotExist) }},
		"no view":        {image + "x", packs, func(err error) bool { return errors.Is(err, os.ErrNotExist) }},
		"a pack as view": {packs[0], packs, errdefs.IsInvalidArgument},
	} {
		for _, useLoop := range []bool{false, true} {
			if _, err := MountView(test.view, point, test.packs, useLoop); !test.is(err) {
				t.Errorf("%s: %v", what, err)
			}
		}
	}
	if Mounted(point) {
		t.Fatal("a view is mounted after all")
	}
	_, err := MountView(image, point, packs, false)
	noError(t, err)
	if _, err := MountView(image, point, packs, false); !errdefs.IsAlreadyExists(err) {
		t.Errorf("mounted twice: %v", err)
	}
	// Nobody but root is to reach the data of all files.
	for _, dir := range []string{"", "h", "h/10"} {
		if fi, err := os.Stat(filepath.Join(point, dir)); err != nil || fi.Mode().Perm() != 0o700 {
			t.Errorf("%q: %v, %v", dir, fi.Mode(), err)
		}
	}
	noError(t, UnmountView(point))
	if Mounted(point) || exists(point) {
		t.Error("the view is still there")
	}
	long := filepath.Join(t.TempDir(), strings.Repeat("l", 200), strings.Repeat("m", 100))
	noError(t, os.MkdirAll(long, 0o755))
	noError(t, os.Link(image, filepath.Join(long, "view")))
	_, err = MountView(filepath.Join(long, "view"), point, packs, false)
	noError(t, err)
	noError(t, UnmountView(point))
}
