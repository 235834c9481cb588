// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// attrs is all that a name of a layer is compared by.
type attrs struct {
	mode     uint32
	uid, gid uint32
	rdev     uint64
	sec      int64
	nsec     uint32
	size     int64
	target   string
	xattrs   map[string]string
	data     string
	first    string // of the names of the inode
	nlink    uint32 // names in the layer
	opaque   bool
	implied  bool
}

const whiteoutMode = unix.S_IFCHR

func (a attrs) whiteout() bool { return a.mode&unix.S_IFMT == unix.S_IFCHR && a.rdev == 0 }

// ofDir reads what stands in an upper directory or a mounted pack.
func ofDir(t testing.TB, root string) map[string]attrs {
	t.Helper()
	out := map[string]attrs{}
	first := map[uint64]string{}
	links := map[uint64]uint32{}
	inode := map[string]uint64{}
	var walk func(p string)
	walk = func(p string) {
		full := filepath.Join(root, p)
		var st syscall.Stat_t
		must(t, syscall.Lstat(full, &st))
		a := attrs{mode: st.Mode, uid: st.Uid, gid: st.Gid, sec: st.Mtim.Sec, nsec: uint32(st.Mtim.Nsec), xattrs: map[string]string{}}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFCHR, unix.S_IFBLK:
			a.rdev = st.Rdev
		case unix.S_IFREG:
			a.size = st.Size
			b, err := os.ReadFile(full)
			must(t, err)
			a.data = string(b)
		case unix.S_IFLNK:
			target, err := os.Readlink(full)
			must(t, err)
			a.target = target
		}
		for name, value := range xattrsOf(t, full) {
			switch {
			case name == pack.XattrOpaque:
				a.opaque = value == "y"
			case name == pack.XattrImplied:
				a.implied = value == "y"
			case strings.HasPrefix(name, "user.overlay."):
			default:
				a.xattrs[name] = value
			}
		}
		if a.whiteout() {
			a = attrs{mode: whiteoutMode}
		} else if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			inode[p] = st.Ino
			links[st.Ino]++
			if _, ok := first[st.Ino]; !ok {
				first[st.Ino] = p
			}
			a.first = first[st.Ino]
		}
		out[p] = a
		if st.Mode&unix.S_IFMT == unix.S_IFDIR {
			list, err := os.ReadDir(full)
			must(t, err)
			for _, e := range list {
				walk(filepath.Join(p, e.Name()))
			}
		}
	}
	walk("/")
	for p, ino := range inode {
		a := out[p]
		a.nlink = links[ino]
		out[p] = a
	}
	return out
}

func xattrsOf(t testing.TB, path string) map[string]string {
	t.Helper()
	buf := make([]byte, 1<<17)
	n, err := unix.Llistxattr(path, buf)
	must(t, err)
	out := map[string]string{}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		if name == "" {
			continue
		}
		value := make([]byte, 1<<16)
		k, err := unix.Lgetxattr(path, name, value)
		if name == xattrCapability && errors.Is(err, unix.EINVAL) {
			k, err = 0, nil // empty capabilities can be set and not read
		}
		must(t, err)
		out[name] = string(value[:k])
	}
	return out
}

// ofMeta reads the same from metadata and the data of a memory pack.
func ofMeta(t testing.TB, m *pack.Meta, data func(uint32) string) map[string]attrs {
	t.Helper()
	out := map[string]attrs{}
	first := map[*pack.Inode]string{}
	links := map[*pack.Inode]uint32{}
	var walk func(p string, n *pack.Node)
	walk = func(p string, n *pack.Node) {
		if n.Whiteout() {
			out[p] = attrs{mode: whiteoutMode}
			return
		}
		i := n.Inode
		a := attrs{mode: i.Mode, uid: i.UID, gid: i.GID, sec: i.Sec, nsec: i.Nsec, size: i.Size, rdev: i.Rdev,
			xattrs: map[string]string{}, opaque: i.Opaque, implied: i.Implied}
		for k, x := range i.Xattrs {
			if k > 0 && i.Xattrs[k-1].Name >= x.Name {
				t.Errorf("%q: xattrs are not sorted: %v", p, i.Xattrs)
			}
			a.xattrs[x.Name] = x.Value
		}
		if i.Mode&unix.S_IFMT == unix.S_IFLNK {
			a.target = i.Inline
		} else {
			a.data = i.Inline
		}
		if i.HasData() {
			a.data = data(i.Data.Number)
			if sum := pack.Sum(0, []byte(a.data)); sum != i.Sum {
				t.Errorf("%q: sum %08x, want %08x", p, i.Sum, sum)
			}
		}
		if !n.Dir() {
			links[i]++
			if _, ok := first[i]; !ok {
				first[i] = p
			}
			a.first, a.nlink = first[i], i.Nlink
		}
		out[p] = a
		for k, c := range n.Children {
			if k > 0 && n.Children[k-1].Name >= c.Name {
				t.Errorf("%q: children are not sorted", p)
			}
			walk(filepath.Join(p, c.Name), c)
		}
	}
	walk("/", m.Root)
	for i, n := range links {
		if i.Nlink != n {
			t.Errorf("%q has %d names and says %d", first[i], n, i.Nlink)
		}
	}
	return out
}

// differ says where got, of a pack, is not what theirs, of an upper directory,
// is. now is a time before the applier began: directories that have changed
// since then have times that the layer does not say.
func differ(got, theirs map[string]attrs, now int64) []string {
	var out []string
	add := func(p, format string, args ...any) {
		out = append(out, fmt.Sprintf("%q: ", p)+fmt.Sprintf(format, args...))
	}
	for _, p := range slices.Sorted(maps.Keys(theirs)) {
		a := theirs[p]
		b, ok := got[p]
		if !ok {
			add(p, "is missing")
			continue
		}
		b2 := b
		b2.implied = false
		if a.mode&unix.S_IFMT == unix.S_IFDIR && a.sec >= now || b.implied {
			a.sec, a.nsec, b2.sec, b2.nsec = 0, 0, 0, 0
		}
		if x, y := fmt.Sprintf("%#v", a), fmt.Sprintf("%#v", b2); x != y {
			add(p, "\n got %.600s\nwant %.600s", y, x)
		}
	}
	for _, p := range slices.Sorted(maps.Keys(got)) {
		if _, ok := theirs[p]; !ok {
			add(p, "is there and should not")
		}
	}
	return out
}

// memoryPack is a Pack in memory that checks how it is called.
type memoryPack struct {
	files []*memoryFile // by number less one
	open  bool
	block uint32
	fail  func(number uint32, written int) error // of Write
}

type memoryFile struct {
	size int64
	data []byte
	hole bool
	sum  uint32
}

func (p *memoryPack) cur() *memoryFile { return p.files[len(p.files)-1] }

func (p *memoryPack) Begin(size int64) (uint32, uint32, error) {
	if p.open || size <= 0 {
		return 0, 0, fmt.Errorf("begin %d bytes, open is %v", size, p.open)
	}
	p.open = true
	p.files = append(p.files, &memoryFile{size: size})
	block := p.block + 1
	p.block += uint32((size + pack.BlockSize - 1) / pack.BlockSize)
	return uint32(len(p.files)), block, nil
}

func (p *memoryPack) Write(b []byte) (int, error) {
	f := p.cur()
	if !p.open || f.hole || int64(len(f.data)+len(b)) > f.size {
		return 0, fmt.Errorf("write %d bytes to %+v", len(b), f)
	}
	f.data = append(f.data, b...)
	if p.fail != nil {
		if err := p.fail(uint32(len(p.files)), len(f.data)); err != nil {
			return 0, err
		}
	}
	f.sum = pack.Sum(f.sum, b)
	return len(b), nil
}

func (p *memoryPack) Hole(sum uint32) error {
	f := p.cur()
	if !p.open || f.hole || len(f.data) > 0 {
		return fmt.Errorf("hole in %+v", f)
	}
	f.hole, f.sum = true, sum
	return nil
}

func (p *memoryPack) End() (uint32, error) {
	f := p.cur()
	if !p.open || !f.hole && int64(len(f.data)) != f.size {
		return 0, fmt.Errorf("end of %d bytes, %d written", f.size, len(f.data))
	}
	p.open = false
	return f.sum, nil
}

func (p *memoryPack) data(n uint32) string { return string(p.files[n-1].data) }

func wantOf(blob, tarBytes []byte) Want {
	w := Want{Digest: digest.FromBytes(blob), Size: int64(len(blob))}
	if tarBytes != nil {
		w.DiffID = digest.NewDigestFromBytes(digest.SHA256, sum256(tarBytes))
	}
	return w
}

func sum256(b []byte) []byte { s := sha256.Sum256(b); return s[:] }

// unpackBytes unpacks a blob that is right about itself into memory.
func unpackBytes(ctx context.Context, blob []byte, opts Options) (*pack.Meta, Result, *memoryPack, error) {
	p := &memoryPack{}
	m, res, err := Layer(ctx, io.NopCloser(bytes.NewReader(blob)), p, wantOf(blob, nil), opts)
	return m, res, p, err
}
