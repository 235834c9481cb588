// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

var (
	seedFlag   = flag.Uint64("seed", 0, "seed of the property tests, 0 for a new one")
	roundsFlag = flag.Int("rounds", 10, "rounds of the property tests")
)

// gen makes random layers on disk.
type gen struct {
	*rand.Rand
	t     testing.TB
	below map[string]bool // paths in the layers made so far, true for directories
	depth int             // of directories in a layer, 0 for 3
}

// name makes names that are hard on somebody: sorting around "." and "..", control characters, no UTF-8, the longest.
func (g *gen) name() string {
	switch g.IntN(12) {
	case 0:
		return string([]byte{byte(1 + g.IntN(45)), byte(1 + g.IntN(46))})
	case 1:
		return []string{"...", "..a", ".-", ".a", "-", "!", "\n", " ", ",", ":", "\\", "a\nb", ".wh.x", ".wh..wh..opq"}[g.IntN(14)]
	case 2:
		return strings.Repeat(string(rune('a'+g.IntN(3))), 255)
	case 3:
		b := make([]byte, 1+g.IntN(40))
		for i := range b {
			if b[i] = byte(1 + g.IntN(255)); b[i] == '/' {
				b[i] = 0xff
			}
		}
		if s := string(b); s != "." && s != ".." {
			return s
		}
		return "dot"
	}
	return fmt.Sprintf("%c%d", 'a'+g.IntN(3), g.IntN(4)) // often the same in several layers
}

func (g *gen) time() unix.Timespec {
	sec := []int64{0, -1, -86400 * 365 * 30, 1 << 31, 1<<32 + 5, 1700000000}[g.IntN(6)] + g.Int64N(1000)
	return unix.Timespec{Sec: sec, Nsec: g.Int64N(1e9)}
}

func newRand(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 0)) }

// layer makes one layer in dir.
func (g *gen) layer(dir string) {
	var regular []string // for hard links
	had := maps.Clone(g.below)
	g.dir(dir, "", cmp.Or(g.depth, 3), &regular, had)
	for p, isDir := range had {
		g.below[p] = isDir
	}
}

func (g *gen) dir(root, rel string, depth int, regular *[]string, had map[string]bool) {
	// What a layer deletes should often be there.
	var present []string
	for p := range g.below {
		if p != "" && filepath.Dir("/"+p) == filepath.Clean("/"+rel) {
			present = append(present, filepath.Base(p))
		}
	}
	slices.Sort(present)
	for range g.IntN(12) {
		name := g.name()
		if len(present) > 0 && g.IntN(2) == 0 {
			name = present[g.IntN(len(present))]
		}
		p := strings.TrimPrefix(rel+"/"+name, "/")
		full := root + "/" + p
		if exists(full) {
			continue
		}
		had[p] = false
		switch k := g.IntN(15); {
		case k < 3:
			noError(g.t, unix.Mknod(full, unix.S_IFCHR, 0))
			continue
		case k < 7 && depth > 0 || slices.Contains(present, name) && g.below[p] && g.IntN(2) == 0:
			had[p] = true
			noError(g.t, os.Mkdir(full, 0o700))
			if depth > 0 {
				g.dir(root, p, depth-1, regular, had)
			}
			if g.IntN(4) == 0 {
				noError(g.t, unix.Setxattr(full, XattrOpaque, []byte("y"), 0))
			}
		case k < 9 && len(*regular) > 0:
			noError(g.t, os.Link((*regular)[g.IntN(len(*regular))], full))
			continue
		case k == 9:
			noError(g.t, os.Symlink(strings.Repeat("t/", g.IntN(700))+"x", full))
			if g.IntN(3) == 0 {
				*regular = append(*regular, full)
			}
		case k == 10:
			noError(g.t, unix.Mknod(full, unix.S_IFIFO|0o640, 0))
		case k == 11:
			noError(g.t, unix.Mknod(full, unix.S_IFSOCK|0o640, 0))
		case k == 12:
			noError(g.t, unix.Mknod(full, []uint32{unix.S_IFCHR, unix.S_IFBLK}[g.IntN(2)]|0o600,
				int(unix.Mkdev(1+g.Uint32N(4095), g.Uint32N(1<<20)))))
		default:
			g.file(full)
			if g.IntN(2) == 0 {
				*regular = append(*regular, full)
			}
		}
		g.attrs(full)
	}
	g.attrs(filepath.Join(root, rel))
}

func (g *gen) file(path string) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	noError(g.t, err)
	defer f.Close()
	switch g.IntN(6) {
	case 0: // empty
	case 5: // inline, or almost
		_, err = f.Write(bytes.Repeat([]byte{byte(g.IntN(256))}, g.IntN(InlineMax+2)))
	case 1: // sparse
		_, err = f.WriteAt([]byte("end"), g.Int64N(1<<20))
	default:
		_, err = f.Write(bytes.Repeat([]byte{byte(g.IntN(256)), byte(g.IntN(256)), 7}, 1+g.IntN(4000)))
	}
	noError(g.t, err)
}

func (g *gen) attrs(path string) {
	var st unix.Stat_t
	noError(g.t, unix.Lstat(path, &st))
	link := st.Mode&unix.S_IFMT == unix.S_IFLNK
	noError(g.t, unix.Lchown(path, g.IntN(3)*65536, g.IntN(3)*70000))
	if !link {
		noError(g.t, unix.Chmod(path, g.Uint32N(0o10000)))
	}
	set := func(name string, size int) {
		v := make([]byte, size)
		for i := range v {
			v[i] = byte(g.IntN(256))
		}
		noError(g.t, unix.Lsetxattr(path, name, v, 0))
	}
	plain := !link && (st.Mode&unix.S_IFMT == unix.S_IFREG || st.Mode&unix.S_IFMT == unix.S_IFDIR)
	if g.IntN(4) == 0 {
		set("trusted.t"+fmt.Sprint(g.IntN(9)), g.IntN(100))
	}
	if g.IntN(6) == 0 && plain {
		set("user."+strings.Repeat("n", 1+g.IntN(200)), g.IntN(300))
		set("user.overlay.redirect", 20)
		set("user.overlay.metacopy", 0)
	}
	if g.IntN(8) == 0 && plain {
		set("trusted.overlay.origin", 8)
		set(XattrImplied, 1)
	}
	if g.IntN(6) == 0 && st.Mode&unix.S_IFMT == unix.S_IFREG {
		noError(g.t, unix.Setxattr(path, "security.capability", capability(), 0))
	}
	if g.IntN(6) == 0 && plain {
		noError(g.t, unix.Setxattr(path, "system.posix_acl_access", namedACL(7, g.Uint32N(1000)), 0))
	}
	if g.IntN(4) == 0 && st.Mode&unix.S_IFMT == unix.S_IFDIR {
		noError(g.t, unix.Setxattr(path, "system.posix_acl_default", namedACL(5, 3), 0))
	}
	noError(g.t, unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{g.time(), g.time()}, unix.AT_SYMLINK_NOFOLLOW))
}

// capability is vfs_cap_data of version 2: cap_net_bind_service, effective and permitted.
func capability() []byte {
	var b []byte
	for _, v := range []uint32{0x02000001, 1 << 10, 0, 0, 0} {
		b = binary.LittleEndian.AppendUint32(b, v)
	}
	return b
}

// namedACL is posix_acl_xattr of version 2 with one named user.
func namedACL(perm uint16, uid uint32) []byte {
	b := binary.LittleEndian.AppendUint32(nil, 2)
	for _, e := range []struct {
		tag, perm uint16
		id        uint32
	}{{1, 7, 1<<32 - 1}, {2, perm, uid}, {4, 5, 1<<32 - 1}, {16, 7, 1<<32 - 1}, {32, 5, 1<<32 - 1}} {
		b = binary.LittleEndian.AppendUint16(b, e.tag)
		b = binary.LittleEndian.AppendUint16(b, e.perm)
		b = binary.LittleEndian.AppendUint32(b, e.id)
	}
	return b
}

// seeded runs f with a generator and names the seed when it fails.
func seeded(t *testing.T, f func(t *testing.T, g *gen)) {
	base := *seedFlag
	rounds := *roundsFlag
	if base != 0 {
		rounds = 1
	} else {
		base = rand.Uint64()
	}
	for i := range rounds {
		seed := base + uint64(i)
		ok := t.Run("", func(t *testing.T) {
			f(t, &gen{Rand: newRand(seed), t: t, below: map[string]bool{}})
		})
		if !ok {
			t.Fatalf("again with: -run '^%s$' -seed %d", strings.Split(t.Name(), "/")[0], seed)
		}
	}
}
