// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"
)

// generator makes layers that meet: few names, little depth, all types.
type generator struct {
	*rand.Rand
	t     testing.TB
	names []string
	wild  bool // with entries that are mostly errors

	buffer []byte
}

func newGenerator(t testing.TB, seed uint64) *generator {
	g := &generator{Rand: rand.New(rand.NewPCG(seed, 7)), t: t, buffer: make([]byte, 4096)}
	g.wild = g.IntN(3) == 0
	all := []string{"a", "b", "c", "d", "e", "f", "x y", "\xff\xfe", "é", "new\nline", strings.Repeat("l", 255), ".wh", "..."}
	g.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	g.names = all[:3+g.IntN(len(all)-3)]
	return g
}

func (g *generator) one(of ...string) string { return of[g.IntN(len(of))] }

func (g *generator) path() string {
	p := g.one(g.names...)
	for g.IntN(5) < 3 && strings.Count(p, "/") < 5 {
		p += "/" + g.one(g.names...)
	}
	if g.IntN(12) == 0 {
		p = g.one("./", "/", "../", "../../", "a/../", ".//", "x/../../", "//") + p
	}
	return p
}

// layer leaves out most entries that would make the layer invalid: of entries
// at random too few layers would be left.
func (g *generator) layer() []byte {
	var entries []entry
	var tars [][]byte
	a := g.applier(nil)
	keep := g.IntN(4) == 0
	for range 1 + g.IntN(60) {
		e := g.entry()
		b := tarOf(g.t, e)
		if a.run(bytes.NewReader(b)) == nil || keep && g.IntN(20) == 0 {
			entries, tars = append(entries, e), append(tars, b)
		} else {
			a = g.applier(tars)
		}
	}
	return tarOf(g.t, entries...)
}

func (g *generator) applier(tars [][]byte) *applier {
	a := newApplier(g.t.Context(), &memoryPack{}, Options{}.withDefaults())
	a.data.buffer = g.buffer
	for _, b := range tars {
		_ = a.run(bytes.NewReader(b)) // entries that were kept may fail
	}
	return a
}

func (g *generator) entry() entry {
	h := tar.Header{Name: g.path(), Mode: int64(g.IntN(0o10000)), Uid: g.IntN(3) * 1000, Gid: g.IntN(3) * 1000,
		ModTime: time.Unix(int64(g.IntN(1_700_000_000)), 0)}
	h.Format = tar.FormatPAX
	switch g.IntN(12) {
	case 0:
		h.ModTime = h.ModTime.Add(time.Duration(g.IntN(1e9)))
	case 1:
		h.AccessTime = time.Unix(int64(g.IntN(1_700_000_000)), 5)
	case 2:
		h.ModTime = g.oddTime()
	}
	e := entry{Header: h}
	switch k := g.IntN(100); {
	case k < 25:
		e.Typeflag = tar.TypeReg
		e.data = strings.Repeat(g.one("data", "x", "\x00", "12345"), []int{0, 1, 3, 51, 100, 255, 256, 257, 900, 1024, 5000, 70000}[g.IntN(12)])
	case k < 50:
		e.Typeflag = tar.TypeDir
		e.Name += g.one("", "/", "/.", "//")
	case k < 62:
		e.Typeflag, e.Linkname = tar.TypeSymlink, g.target()
	case k < 72:
		e.Typeflag, e.Linkname = tar.TypeLink, g.linkname()
	case k < 76:
		e.Typeflag = []byte{tar.TypeChar, tar.TypeBlock, tar.TypeFifo}[g.IntN(3)]
		e.Devmajor, e.Devminor = int64(g.IntN(3)), int64(g.IntN(3))
		if g.IntN(5) == 0 {
			e.Devmajor, e.Devminor = int64(g.IntN(5000)), int64(g.IntN(2<<20))
		}
	case k < 86:
		e.Typeflag = tar.TypeReg
		e.Name = g.whiteout()
	case k < 91:
		e.Typeflag = tar.TypeReg
		e.Name = g.one("", g.path()+"/", g.path()+"/") + whiteoutOpaque
	case k < 94:
		return g.sparse(e.Name)
	case k < 96:
		return entry{Header: tar.Header{Typeflag: tar.TypeXGlobalHeader, Name: e.Name, PAXRecords: map[string]string{"comment": "x"}}}
	default:
		if g.wild {
			return g.odd(e)
		}
		e.Typeflag = tar.TypeDir
	}
	if g.IntN(5) == 0 {
		e.PAXRecords = g.xattrs()
	}
	if g.IntN(20) == 0 {
		e.Uid, e.Gid = 1<<31+g.IntN(1000), 1<<32-2
	}
	if g.IntN(40) == 0 {
		// -1 leaves the owner alone, larger numbers are cut to 32 bits.
		e.Format = tar.FormatGNU
		e.PAXRecords, e.ModTime, e.AccessTime = nil, e.ModTime.Truncate(time.Second), time.Time{}
		e.Uid, e.Gid = []int{-1, 1<<32 - 1, 1<<33 + 5}[g.IntN(3)], []int{-1, 1<<32 - 1, 7}[g.IntN(3)]
		if e.ModTime.Unix() < 0 {
			e.ModTime = time.Unix(1, 0)
		}
	}
	return e
}

func (g *generator) oddTime() time.Time {
	return []time.Time{time.Unix(-5, 0), time.Unix(0, 0), time.Unix(1<<33, 0), time.Unix(1<<34, 1), time.Unix(0, 1), time.Unix(1<<35, 0)}[g.IntN(6)]
}

func (g *generator) whiteout() string {
	p := g.path()
	dir, base := "", p
	if k := strings.LastIndexByte(p, '/'); k >= 0 {
		dir, base = p[:k+1], p[k+1:]
	}
	if g.IntN(4) > 0 {
		base = fmt.Sprint("hidden", g.IntN(100)) // one that does not exist
	}
	if g.wild && g.IntN(8) == 0 {
		base = g.one("", ".", "..", ".wh.x", ".wh.", ".wh..", "...")
	}
	return dir + whiteoutPrefix + base
}

func (g *generator) target() string {
	up := strings.Repeat("../", g.IntN(3))
	p := g.one(g.names...)
	if g.IntN(3) == 0 {
		p += "/" + g.one(g.names...)
	}
	return g.one("", "", "/", up, up, "./") + p + g.one("", "", "", "/", "/..", "/.")
}

func (g *generator) linkname() string {
	p := g.path()
	if g.IntN(10) == 0 {
		p += g.one("/", "/.", "/..", "//")
	}
	return p
}

func (g *generator) xattrs() map[string]string {
	out := map[string]string{}
	for range 1 + g.IntN(3) {
		name, value := g.one("user.a", "user.b=c"[:6], "user.mime_type", "security.x", "trusted.x", "trusted.overlay.opaque", "trusted.nhybrid.implied",
			"user.overlay.opaque", "nonsense", "system.nonsense", "user.long"+strings.Repeat("g", 200)), g.one("", "v", "\x00\x01", strings.Repeat("w", 300))
		switch g.IntN(8) {
		case 0:
			name, value = xattrCapability, g.capability()
		case 1:
			name, value = xattrAccess, g.acl()
		case 2:
			name, value = xattrDefault, g.acl()
		}
		if g.wild && g.IntN(20) == 0 {
			name, value = g.one("user.", "security.", strings.Repeat("n", 300), xattrCapability, xattrAccess), g.one("", "v", "bad")
		}
		out[paxXattr+name] = value
	}
	return out
}

func (g *generator) capability() string {
	b := make([]byte, 20)
	b[0], b[3] = byte(g.IntN(2)), 2
	binary.LittleEndian.PutUint32(b[4:], g.Uint32N(1<<20))
	if g.IntN(3) == 0 {
		b[3] = 3
		b = append(b, 0xe8, 3, 0, 0)
	}
	if g.wild && g.IntN(6) == 0 {
		b = b[:len(b)-1]
	}
	return string(b)
}

func (g *generator) acl() string {
	b := []byte{aclVersion, 0, 0, 0}
	add := func(tag int, id uint32) {
		b = binary.LittleEndian.AppendUint16(b, uint16(tag))
		b = binary.LittleEndian.AppendUint16(b, uint16(g.IntN(8)))
		b = binary.LittleEndian.AppendUint32(b, id)
	}
	extended := g.IntN(3) > 0
	add(aclUserObj, 1<<32-1)
	if extended && g.IntN(2) == 0 {
		add(aclUser, g.Uint32N(5000))
	}
	add(aclGroupObj, g.Uint32N(2)-1)
	if extended && g.IntN(2) == 0 {
		add(aclGroup, g.Uint32N(5000))
	}
	if extended {
		add(aclMask, 1<<32-1)
	}
	add(aclOther, 1<<32-1)
	if g.wild && g.IntN(6) == 0 {
		k := g.IntN(len(b))
		b[k] ^= 1 << g.IntN(8)
	}
	return string(b)
}

// sparse is a file in GNU's sparse format, version 1.0, as tar.Writer cannot write it.
func (g *generator) sparse(name string) entry {
	size := int64(512 * (1 + g.IntN(20)))
	off := int64(512 * g.IntN(int(size/512)))
	n := min(512, size-off)
	m := padded([]byte(fmt.Sprintf("1\n%d\n%d\n", off, n)))
	data := append(m, []byte(strings.Repeat("s", int(n)))...)
	return rawEntry("sparse", tar.TypeReg, data, int64(len(data)),
		"GNU.sparse.major", "1", "GNU.sparse.minor", "0", "GNU.sparse.name", strings.ReplaceAll(name, "\n", "_"), "GNU.sparse.realsize", fmt.Sprint(size))
}

// odd is an entry that mostly is an error.
func (g *generator) odd(e entry) entry {
	e.Typeflag = tar.TypeReg
	e.data = "odd"
	switch g.IntN(8) {
	case 0:
		return rawEntry("type", g.one("7", "V", "Z", "D", "S")[0], nil, 0)
	case 1:
		e.Name += strings.Repeat("n", 256)
	case 2:
		e.Name = strings.Repeat("p/", 300) + e.Name
	case 3:
		e.Typeflag, e.data, e.Linkname = tar.TypeSymlink, "", strings.Repeat("t/", 2048)
	case 4:
		return rawEntry("/", tar.TypeReg, []byte("data"), 4)
	case 5:
		return rawEntry("slash/", '0', []byte("data"), 4)
	case 6:
		return rawEntry("old/", 0, nil, 0)
	case 7:
		e.Name, e.Typeflag, e.data = g.one(".", "..", "../..", "./.", "/.."), tar.TypeDir, ""
	}
	return e
}
