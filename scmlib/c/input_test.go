// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package c_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/nhybrid/nhybrid/scmlib"
)

// code of scm.h and the error of Go that says the same.
var classes = map[int]error{-1: scmlib.ErrNoRegion, -2: scmlib.ErrGranularity, -3: scmlib.ErrDurability, -4: scmlib.ErrLocked, -5: scmlib.ErrUnformatted,
	-6: scmlib.ErrVersion, -7: scmlib.ErrLayout, -8: scmlib.ErrSize, -9: scmlib.ErrCorrupt, -10: scmlib.ErrUnsafe}

// openC opens a file by C and returns the code and the message, or 0 and what it is.
func openC(t testing.TB, path, layout, flags, size, gran, dur, mode string) (int, string) {
	t.Helper()
	out, status := run(t, nil, filepath.Join(built(t, plain), "tool"), "open", path, layout, flags, size, gran, dur, mode)
	if status == 0 {
		return 0, out
	}
	var code int
	if n, err := fmt.Sscanf(out, "error %d ", &code); status != 3 || n != 1 || err != nil {
		t.Fatalf("status %d: %s", status, out)
	}
	return code, out
}

func sealed(b []byte) {
	binary.LittleEndian.PutUint32(b[508:], crc32.Checksum(b[:508], crc32.MakeTable(crc32.Castagnoli)))
}

// Regions that must be refused are refused by C with the same class of error as by Go, and stay as they are, to the byte.
func TestBadInput(t *testing.T) {
	dir := scratch(t)
	good := filepath.Join(dir, "good")
	r := openGo(t, good, scmlib.Options{Create: true, Size: 1 << 20, Layout: "mine"})
	if err := setGo(r, rootGo(t, r), 0, 5); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	base, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	both := func(fn func(h []byte)) func([]byte) []byte {
		return func(b []byte) []byte {
			for _, h := range [][]byte{b[:512], b[4096:4608]} {
				fn(h)
				sealed(h)
			}
			return b
		}
	}
	table := 12288 + 4*4096
	cases := []struct {
		name   string
		change func([]byte) []byte
		code   int
		says   string
	}{
		{"good", func(b []byte) []byte { return b }, 0, "info mine|"},
		{"copy A bad", func(b []byte) []byte { b[100] ^= 1; return b }, 0, "|1|0|"},
		{"copy B bad", func(b []byte) []byte { b[4096+100] ^= 1; return b }, 0, "|1|0|"},
		{"both copies bad", func(b []byte) []byte { b[100] ^= 1; b[4096+100] ^= 1; return b }, -9, "both copies"},
		{"other layout", both(func(h []byte) { copy(h[64:], "thei") }), -7, `it is "thei", not "mine"`},
		{"other version", both(func(h []byte) { h[12] = 9 }), -6, "version 9"},
		{"other checksum and version", func(b []byte) []byte { b[12], b[4096+12] = 2, 2; return b }, -6, "version 2"},
		{"big endian", both(func(h []byte) { copy(h[8:], []byte{1, 2, 3, 4}) }), -6, "big-endian"},
		{"unknown features", both(func(h []byte) { h[16] = 6 }), -6, "features 0x6"},
		{"other size", both(func(h []byte) { binary.LittleEndian.PutUint64(h[24:], 2<<20) }), -8, "cut or extended"},
		{"cut", func(b []byte) []byte { return b[:512<<10] }, -8, "cut or extended"},
		{"cut short", func(b []byte) []byte { return b[:4096] }, -8, "4096 bytes"},
		{"empty", func(b []byte) []byte { return nil }, -5, "empty"},
		{"zeroed", func(b []byte) []byte { clear(b); return b }, -5, "all zeros"},
		{"headers zeroed", func(b []byte) []byte { clear(b[:8192]); return b }, -9, "no region header"},
		{"something else", func(b []byte) []byte { return bytes.Repeat([]byte("text"), len(b)/4) }, -9, "no region header"},
		{"lanes", both(func(h []byte) { h[138] = 1 }), -9, "lanes"},
		{"chunks", both(func(h []byte) { h[166] = 1 }), -9, "heap"},
		{"state", both(func(h []byte) { h[192] = 3 }), -9, "state 3"},
		{"chunk table", func(b []byte) []byte { b[table] = 7; return b }, -9, "chunk table, word 0"},
		{"unsafe shutdown", both(func(h []byte) { h[192], h[200], h[208] = 2, 6, 5 }), -10, "count was 5"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(dir, strings.ReplaceAll(c.name, " ", "-"))
			bad := c.change(bytes.Clone(base))
			if err := os.WriteFile(path, bad, 0o600); err != nil {
				t.Fatal(err)
			}
			code, out := openC(t, path, "mine", "0", "0", "0", "0", "0")
			if code != c.code || !strings.Contains(out, c.says) || code != 0 && !strings.Contains(out, path) {
				t.Errorf("code %d, want %d and %q: %s", code, c.code, c.says, out)
			}
			if strings.Count(strings.TrimSpace(out), "\n") > 0 && code != 0 {
				t.Errorf("more than one line: %s", out)
			}
			after, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if code != 0 && !bytes.Equal(after, bad) {
				t.Error("the file was changed")
			}
			if code == 0 && !bytes.Equal(after[:512], after[4096:4608]) {
				t.Error("the copies of the header differ")
			}
			r, err := scmlib.Open(path, scmlib.Options{Layout: "mine"})
			if err == nil {
				r.Close()
			}
			if code == 0 != (err == nil) || code != 0 && !errors.Is(err, classes[code]) {
				t.Errorf("C says %d, Go says %v", code, err)
			}
		})
	}
	t.Run("in use", func(t *testing.T) {
		r := openGo(t, good, scmlib.Options{})
		if code, out := openC(t, good, "", "0", "0", "0", "0", "0"); code != -4 {
			t.Errorf("C opens what Go has open: %s", out)
		}
		r.Close()
	})
}

// What is required and not given fails the open, and the message names the filesystem and the mount.
func TestGuarantee(t *testing.T) {
	dir := scratch(t)
	if !strings.HasPrefix(dir, "/dev/shm") {
		t.Skip("needs a memory filesystem")
	}
	path := filepath.Join(dir, "r")
	code, out := openC(t, path, "", "1", "1048576", "0", "3", "0")
	if code != -3 || !strings.Contains(out, `tmpfs "`) || !strings.Contains(out, `on "/dev/shm"`) {
		t.Errorf("power loss on tmpfs: %d %s", code, out)
	}
	if _, err := os.Stat(path); err == nil {
		t.Error("the refused open has left a file")
	}
	for _, c := range []struct{ mode, gran, dur, info string }{
		{"0", "2", "2", "|2|2|1048576|"}, {"1", "0", "0", "|2|2|"}, {"2", "0", "0", "|3|2|"}, {"3", "3", "0", "|3|2|"}, {"4", "1", "1", "|1|1|"},
	} {
		code, out := openC(t, path, "", "1", "1048576", c.gran, c.dur, c.mode)
		if code != 0 || !strings.Contains(out, c.info) {
			t.Errorf("mode %s: %d %s", c.mode, code, out)
		}
		os.Remove(path)
	}
	// The answers of Go and C to one file are the same, on whatever the test's own directory is.
	disk := filepath.Join(t.TempDir(), "r")
	r := openGo(t, disk, scmlib.Options{Create: true, Size: 1 << 20})
	i := r.Info()
	r.Close()
	want := fmt.Sprintf("|%d|%d|%d|%d|0|0|%s|%s|%s\n", i.Granularity, i.Durability, i.Size, i.Generation+1, i.Instruction, i.Mount, i.Why)
	if code, out := openC(t, disk, "", "0", "0", "0", "0", "0"); code != 0 || !strings.Contains(out, want) {
		t.Errorf("C says %q, Go %q", out, want)
	}
	if code, out := openC(t, disk, "", "0", "0", "1", "0", "0"); code != -2 || !strings.Contains(out, i.Mount) {
		t.Errorf("byte granularity: %d %s", code, out)
	}
}

// The paper's four modes, chosen by the environment.
func TestModes(t *testing.T) {
	exe, dir := filepath.Join(built(t, plain), "tool"), scratch(t)
	for mode, want := range map[string]string{"mapping": "mode 1 granularity 2", "volume": "mode 2 granularity 3 ", "storage": "mode 3 granularity 3 ",
		"dram": "mode 4 granularity 1 durability 1", "": "mode 0 "} {
		env := []string{"SCM_MODE=" + mode, "SCM_REGION=" + filepath.Join(dir, "region-"+mode), "SCM_SIZE=1m"}
		for n := 1; n <= 2; n++ {
			out, code := run(t, env, exe, "paper")
			runs := n
			if mode == "dram" {
				runs = 1 // nothing survives
			}
			if code != 0 || !strings.HasPrefix(out, "runs "+strconv.Itoa(runs)+" ") || !strings.Contains(out, want) {
				t.Errorf("mode %q, run %d: status %d: %s", mode, n, code, out)
			}
		}
	}
	for env, want := range map[string]string{"SCM_MODE=nvm": "use mapping, volume, storage or dram", "SCM_MODE=storage": "no /var/lib/scm/region",
		"SCM_REGION=/nowhere/region": "create region", "SCM_SIZE=4x": "is not a size"} {
		if out, code := run(t, []string{"SCM_REGION=", env}, exe, "paper"); code != 3 || !strings.Contains(out, want) {
			t.Errorf("%s: status %d: %s", env, code, out)
		}
	}
}

// Damaged regions, some with right checksums, never lead outside the region, and what is refused is unchanged: SCM_FUZZ images of each kind (3000 in a normal run).
func TestFuzz(t *testing.T) {
	t.Parallel()
	b, dir := built(t, sanitized), scratch(t)
	rounds := 1
	if n, err := strconv.Atoi(os.Getenv("SCM_FUZZ")); err == nil {
		rounds = (n + 2999) / 3000
	}
	// One region at rest, one with transactions open that log much.
	rest, open := filepath.Join(dir, "rest"), filepath.Join(dir, "open")
	o := scmlib.Options{Create: true, Size: 256 << 10, Lanes: 2, LaneSize: 1024}
	for _, p := range []string{rest, open} {
		r := openGo(t, p, o)
		for i := range 6 {
			if err := setGo(r, rootGo(t, r), i, 5); err != nil {
				t.Fatal(err)
			}
		}
		if p == open {
			stop := errors.New("stop")
			err := r.Update(func(tx *scmlib.Tx) error {
				c := rootGo(t, r)
				if err := tx.Add(&c.A[0].V, &c.Wide); err != nil {
					return err
				}
				if _, err := tx.Alloc(30000); err != nil {
					return err
				}
				if err := errors.Join(tx.Free(c.Block[0]), tx.Add(&c.Block[0])); err != nil {
					return err
				}
				img, err := os.ReadFile(open) // as a crash here would leave it
				return errors.Join(err, os.WriteFile(open+"2", img, 0o600), stop)
			})
			if !errors.Is(err, stop) {
				t.Fatal(err)
			}
		}
		r.Close()
	}
	for i, path := range []string{rest, open + "2"} {
		var opened, refused int
		for seed := range rounds {
			out := tool(t, b, "fuzz", path, "3000", strconv.Itoa(2*seed+i+1))
			var o, r int
			if _, err := fmt.Sscanf(out, "opened %d refused %d", &o, &r); err != nil {
				t.Fatal(out)
			}
			opened, refused = opened+o, refused+r
		}
		if opened < 100 || refused < 100 {
			t.Errorf("%d opened, %d refused: too few of one kind to mean anything", opened, refused)
		}
		t.Logf("%d opened, %d refused", opened, refused)
	}
}

// A log whose continuation ends within a line leads nowhere: the record behind its end is not read, whatever its length says.
func TestLinkEndsWithinLine(t *testing.T) {
	dir := scratch(t)
	path := filepath.Join(dir, "r")
	r := openGo(t, path, scmlib.Options{Create: true, Size: 256 << 10, Lanes: 2, LaneSize: 1024})
	c, err := scmlib.OffsetOf(r, rootGo(t, r))
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	img, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	le := binary.LittleEndian
	lane, to := uint64(12288), (uint64(c)+64)&^63 // into the root object
	record := func(at uint64, seq, n uint32, entry ...uint64) {
		b := img[at : at+uint64(n)]
		clear(b)
		le.PutUint32(b[4:], n)
		copy(b[8:16], img[lane:])
		le.PutUint32(b[16:], seq)
		le.PutUint32(b[20:], uint32(len(entry)/2))
		copy(b[24:32], img[32:40]) // the first lane
		for i, w := range entry {
			le.PutUint64(b[32+8*i:], w)
		}
		le.PutUint32(b, crc32.Checksum(b[4:], crc32.MakeTable(crc32.Castagnoli)))
	}
	record(lane+64, 0, 48, 4<<56|to, 130)
	record(to, 1, 130)
	le.PutUint32(img[to+192+4:], 1<<31)
	if err := os.WriteFile(path, img, 0o600); err != nil {
		t.Fatal(err)
	}
	out, status := run(t, nil, filepath.Join(built(t, sanitized), "tool"), "open", path, "", "0", "0", "0", "0", "0")
	if status != 0 {
		t.Fatalf("status %d: %s", status, out)
	}
	if err := os.WriteFile(path, img, 0o600); err != nil {
		t.Fatal(err)
	}
	openGo(t, path, scmlib.Options{}).Close()
}
