// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// directoryNVM stores files in a directory and fails when told to.
type directoryNVM struct {
	dir     string
	room    int64 // bytes that fit; no limit if negative
	cause   error
	creates bool // Create fails as well when there is no room
	readErr error
	live    map[uint32]bool
	closed  int
}

func newNVM(t *testing.T, room int64) *directoryNVM {
	return &directoryNVM{dir: t.TempDir(), room: room, cause: unix.ENOSPC, live: map[uint32]bool{}}
}

func (d *directoryNVM) path(n uint32) string { return filepath.Join(d.dir, fmt.Sprint(n)) }

func (d *directoryNVM) Create(n uint32, _ bool) (NVMFile, error) {
	if d.room == 0 && d.creates {
		return nil, d.cause
	}
	f, err := os.OpenFile(d.path(n), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	d.live[n] = true
	return &nvmFile{f, d}, nil
}

func (d *directoryNVM) Remove(n uint32) error {
	if !d.live[n] {
		return fmt.Errorf("file %d is not there", n)
	}
	delete(d.live, n)
	return os.Remove(d.path(n))
}

type nvmFile struct {
	*os.File
	nvm *directoryNVM
}

// Write takes what there is room for, as write(2) does.
func (f *nvmFile) Write(p []byte) (int, error) {
	d := f.nvm
	if d.room < 0 {
		return f.File.Write(p)
	}
	n, err := f.File.Write(p[:min(int64(len(p)), d.room)])
	d.room -= int64(n)
	if err == nil && n < len(p) {
		err = d.cause
	}
	return n, err
}

func (f *nvmFile) ReadAt(p []byte, off int64) (int, error) {
	if f.nvm.readErr != nil {
		return 0, f.nvm.readErr
	}
	return f.File.ReadAt(p, off)
}

func (f *nvmFile) Close() error { f.nvm.closed++; return f.File.Close() }

// layerOfFiles has files of all sizes around those of buffers and blocks.
func layerOfFiles(t *testing.T) (map[string]string, []byte) {
	files := map[string]string{}
	var entries []entry
	rnd := rand.NewChaCha8([32]byte{1})
	for k, size := range []int{1, 4095, 4096, 4097, chunkSize - 1, chunkSize, chunkSize + 1, 3*chunkSize + 5, pack.InlineMax, 100_000, 0, pack.InlineMax + 1} {
		b := make([]byte, size)
		_, err := rnd.Read(b)
		must(t, err)
		files[fmt.Sprintf("/f%d", k)] = string(b)
		entries = append(entries, reg(fmt.Sprintf("f%d", k), string(b)))
	}
	return files, tarOf(t, entries...)
}

// TestNVMFull lets NVM fail at every kind of place: nothing is lost.
func TestNVMFull(t *testing.T) {
	files, layer := layerOfFiles(t)
	places := map[string]func(File) Placement{
		"nvm":   func(File) Placement { return ToNVM },
		"both":  func(File) Placement { return ToBoth },
		"mixed": func(f File) Placement { return Placement(f.Number % 3) },
	}
	for name, place := range places {
		for _, room := range []int64{-1, 0, 1, 5000, 12_289, 12_290, 200_000, 300_000, 600_000, 900_000, 1_100_000} {
			for _, creates := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s %d %v", name, room, creates), func(t *testing.T) {
					nvm := newNVM(t, room)
					nvm.creates = creates
					m, res, p, err := unpackBytes(t.Context(), layer, Options{Layer: 7, Place: place, NVM: nvm})
					must(t, err)
					var holes uint32
					var onNVM int64
					got := ofMeta(t, m, func(n uint32) string {
						f := p.files[n-1]
						if nvm.live[n] {
							b, err := os.ReadFile(nvm.path(n))
							must(t, err)
							onNVM += int64(len(b))
							if !f.hole && string(b) != string(f.data) {
								t.Errorf("file %d differs on the two tiers", n)
							}
							if f.hole {
								holes++
							}
							return string(b)
						}
						return string(f.data)
					})
					for p, want := range files {
						if got[p].data != want {
							t.Errorf("%s: %d bytes, want %d, or others", p, len(got[p].data), len(want))
						}
					}
					if res.Holes != holes || res.NVMBytes != onNVM || (res.NVMError == nil) != (room < 0) {
						t.Errorf("result is %+v, %d holes and %d bytes on NVM", res, holes, onNVM)
					}
					if res.NVMError != nil && !errors.Is(res.NVMError, unix.ENOSPC) {
						t.Errorf("error is %v", res.NVMError)
					}
				})
			}
		}
	}
}

func TestNVMAlone(t *testing.T) {
	files, layer := layerOfFiles(t)
	nvm := newNVM(t, -1)
	var asked []File
	_, res, p, err := unpackBytes(t.Context(), layer, Options{NVM: nvm, Place: func(f File) Placement { asked = append(asked, f); return ToNVM }})
	must(t, err)
	for k, f := range asked {
		if want := files["/"+f.Path]; int64(len(want)) != f.Size || int(f.Number) != k+1 || f.Mode != 0o644 {
			t.Errorf("asked of %+v", f)
		}
		if !p.files[k].hole {
			t.Errorf("file %d is in the pack", k+1)
		}
	}
	if len(asked) != 9 || res.Holes != 9 || res.NVMBytes != res.DataBytes-pack.InlineMax-1 || nvm.closed != 9 {
		t.Errorf("result is %+v, %d asked, %d closed", res, len(asked), nvm.closed)
	}
}

// What NVM has taken and does not give back is lost, and no other error says so.
func TestNVMBroken(t *testing.T) {
	_, layer := layerOfFiles(t)
	for _, place := range []Placement{ToNVM, ToBoth} {
		nvm := newNVM(t, 1_100_000)
		nvm.cause, nvm.readErr = unix.EIO, unix.EIO
		_, _, _, err := unpackBytes(t.Context(), layer, Options{NVM: nvm, Place: func(File) Placement { return place }})
		if place == ToBoth {
			must(t, err)
			continue
		}
		if !errors.Is(err, unix.EIO) || errdefs.IsInvalidArgument(err) || strings.Contains(err.Error(), "\n") {
			t.Errorf("error is %v", err)
		}
	}
}

// large is a file that is just too large to stand in the metadata.
func large(name, data string) entry {
	return reg(name, strings.Repeat(" ", pack.InlineMax+1-len(data))+data)
}

// Files that the layer replaces leave NVM, but for those with another name.
func TestReplacedLeaveNVM(t *testing.T) {
	dir := func(name string) entry { return entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: name}} }
	layer := tarOf(t,
		large("a", "1"), large("a", "2"), reg("a", "small"), large("a", "3"), // 1 and 2 are replaced
		large("d/x", "4"), large("d/y", "5"), large("d/e/z", "6"), reg("d/small", "x"), // with their directory
		entry{Header: tar.Header{Typeflag: tar.TypeLink, Name: "kept", Linkname: "d/y"}},
		large("d", "7"), dir("d"), // and that file again
		large("l", "8"), entry{Header: tar.Header{Typeflag: tar.TypeLink, Name: "l2", Linkname: "l"}}, large("l", "9"), large("l2", "10"),
	)
	nvm := newNVM(t, -1)
	m, res, _, err := unpackBytes(t.Context(), layer, Options{NVM: nvm, Place: func(f File) Placement {
		if f.Number == 4 {
			return ToPack
		}
		return ToNVM
	}})
	must(t, err)
	want := []uint32{3, 5, 9, 10}
	if got := slices.Sorted(maps.Keys(nvm.live)); !slices.Equal(got, want) {
		t.Errorf("on NVM are %v, want %v", got, want)
	}
	if res.NVMBytes != 4*(pack.InlineMax+1) || res.Holes != 4 || res.Files != 12 || m.Numbers != 10 {
		t.Errorf("result is %+v", res)
	}
	got := ofMeta(t, m, func(n uint32) string {
		b, err := os.ReadFile(nvm.path(n))
		must(t, err)
		return string(b)
	})
	if got["/kept"].data != large("", "5").data || got["/kept"].nlink != 1 {
		t.Errorf("kept is %+v", got["/kept"])
	}
}

// The same blob gives the same pack, and a mounted one has the holes that were
// filled from NVM.
func TestFillsHoles(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounts need root")
	}
	files, layer := layerOfFiles(t)
	nvm := newNVM(t, 300_000)
	path := filepath.Join(t.TempDir(), "p")
	w, err := pack.Create(path, pack.WriterOptions{})
	must(t, err)
	defer w.Close()
	m, res, err := Layer(t.Context(), io.NopCloser(bytes.NewReader(layer)), w, wantOf(layer, layer),
		Options{Layer: 1, NVM: nvm, Place: func(f File) Placement { return Placement(f.Number % 2) }})
	must(t, err)
	_, err = w.Finish(m, pack.Identity{Layer: 1})
	must(t, err)
	p, err := pack.Open(path)
	must(t, err)
	defer p.Close()
	x, err := p.Index()
	must(t, err)
	filled := uint32(0)
	for n := uint32(1); n <= x.Len(); n++ {
		if e, ok := x.At(n); ok && e.Hole {
			f, err := os.Open(nvm.path(n))
			must(t, err)
			must(t, pack.Fill(t.Context(), w.File(), e, f, nil))
			must(t, f.Close())
			filled++
		}
	}
	if filled == 0 || filled != res.Holes {
		t.Errorf("%d holes filled, %+v", filled, res)
	}
	must(t, p.Verify(t.Context(), nil, nil))
	dir := t.TempDir()
	must(t, unix.Mount(path, dir, "erofs", unix.MS_RDONLY, ""))
	defer func() { must(t, unix.Unmount(dir, 0)) }()
	got := ofDir(t, dir)
	for name, want := range files {
		if got[name].data != want {
			t.Errorf("%s differs", name)
		}
	}
}
