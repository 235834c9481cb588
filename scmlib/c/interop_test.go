// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package c_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nhybrid/nhybrid/scmlib"
	"github.com/nhybrid/nhybrid/scmlib/pmap"
)

func openGo(t testing.TB, path string, o scmlib.Options) *scmlib.Region {
	t.Helper()
	r, err := scmlib.Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func rootGo(t testing.TB, r *scmlib.Region) *cells {
	t.Helper()
	p, err := scmlib.Root[cells](r)
	if err != nil {
		t.Fatal(err)
	}
	return p.In(r)
}

// setGo is what the command set of test/tool.c does.
func setGo(r *scmlib.Region, c *cells, i int, v uint64) error {
	return r.Update(func(tx *scmlib.Tx) error {
		if err := tx.Add(&c.A[i].V, &c.Block[i]); err != nil {
			return err
		}
		c.A[i].V = v
		if c.Block[i] != 0 {
			if err := tx.Free(c.Block[i]); err != nil {
				return err
			}
		}
		off, err := tx.Alloc(100)
		if err != nil {
			return err
		}
		b, err := r.Bytes(off, 100)
		for k := range b {
			b[k] = byte(v)
		}
		c.Block[i] = off
		return err
	})
}

// One region, changed by both languages in turn: each finds what the other has left.
func TestInTurn(t *testing.T) {
	b, path := built(t, plain), filepath.Join(scratch(t), "r")
	r := openGo(t, path, scmlib.Options{Create: true, Size: 1 << 20, Layout: "in turn"})
	c := rootGo(t, r)
	if err := setGo(r, c, 0, 10); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	for n := range 3 {
		tool(t, b, "set", path, "1", strconv.Itoa(20+n))
		tool(t, b, "set", path, "0", strconv.Itoa(30+n))
		r = openGo(t, path, scmlib.Options{Layout: "in turn"})
		c = rootGo(t, r)
		if c.A[0].V != uint64(30+n) || c.A[1].V != uint64(20+n) {
			t.Fatalf("Go finds %d and %d", c.A[0].V, c.A[1].V)
		}
		m, err := r.Bytes(c.Block[1], 100)
		if err != nil || !bytes.Equal(m, bytes.Repeat([]byte{byte(20 + n)}, 100)) {
			t.Fatalf("block of C: %v %v", m, err)
		}
		blocks := 0
		r.Blocks(func(scmlib.Block) bool { blocks++; return true })
		if blocks != 3 {
			t.Fatalf("%d blocks, want root and two", blocks)
		}
		if err := setGo(r, c, 0, uint64(40+n)); err != nil {
			t.Fatal(err)
		}
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		want := fmt.Sprintf("%d:%d,%d %d:%d,%d 0", 40+n, 40+n, 40+n, 20+n, 20+n, 20+n)
		if got := tool(t, b, "get", path); !strings.HasPrefix(got, want) || !strings.HasSuffix(got, "recovered 0\n") {
			t.Fatalf("C finds %q, want %q", got, want)
		}
	}
	// A region that C has made.
	path += "2"
	tool(t, b, "open", path, "made by C", "1", "1048576", "0", "0", "0")
	tool(t, b, "set", path, "2", "7")
	r = openGo(t, path, scmlib.Options{Layout: "made by C"})
	if c := rootGo(t, r); c.A[2].V != 7 || r.Info().Generation != 3 {
		t.Fatalf("Go finds %d, generation %d", c.A[2].V, r.Info().Generation)
	}
}

type structures struct {
	Cells cells // first, as C knows it
	Tree  pmap.TreeHead
	Bytes pmap.TreeHead
	Hash  pmap.HashHead
	Log   pmap.LogHead
	Array pmap.ArrayHead
}

// head is the place of a structure's head.
func head[T any](r *scmlib.Region, p *T) scmlib.Ptr[T] {
	off, err1 := scmlib.OffsetOf(r, p)
	h, err2 := scmlib.PtrAt[T](off)
	if err := errors.Join(err1, err2); err != nil {
		panic(err)
	}
	return h
}

// The structures of pmap live among the blocks of C: allocating, freeing and recovering in C leaves them whole.
func TestStructures(t *testing.T) {
	b, path := built(t, plain), filepath.Join(scratch(t), "r")
	r := openGo(t, path, scmlib.Options{Create: true, Size: 4 << 20})
	p, err := scmlib.Root[structures](r)
	if err != nil {
		t.Fatal(err)
	}
	s := p.In(r)
	put := func(from, to uint64) {
		t.Helper()
		tree, e1 := pmap.NewTree[uint64](r, head(r, &s.Tree))
		hash, e2 := pmap.NewHash[uint64, uint64](r, head(r, &s.Hash))
		bt, log := pmap.NewBytesTree(r, head(r, &s.Bytes)), pmap.NewLog(r, head(r, &s.Log))
		for i := from; i < to; i++ {
			err := r.Update(func(tx *scmlib.Tx) error {
				k := fmt.Append(nil, "key ", i)
				return errors.Join(e1, e2, tree.Put(tx, i, i*i), hash.Put(tx, i, i+1), bt.Put(tx, k, k), log.Append(tx, k))
			})
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	check := func(n uint64) {
		t.Helper()
		tree, _ := pmap.NewTree[uint64](r, head(r, &s.Tree))
		hash, _ := pmap.NewHash[uint64, uint64](r, head(r, &s.Hash))
		bt, log := pmap.NewBytesTree(r, head(r, &s.Bytes)), pmap.NewLog(r, head(r, &s.Log))
		err := r.View(func() error {
			for i := range n {
				k := fmt.Append(nil, "key ", i)
				v, ok := tree.Get(i)
				h, ok2 := hash.Get(i)
				if !ok || !ok2 || v != i*i || h != i+1 || !bytes.Equal(bt.Get(k), k) {
					return fmt.Errorf("entry %d: %d %v, %d %v, %q", i, v, ok, h, ok2, bt.Get(k))
				}
			}
			next, cur := uint64(0), log.From(0)
			for i, rec := range cur.All() {
				if i != next || string(rec) != fmt.Sprint("key ", i) {
					return fmt.Errorf("record %d is %q", i, rec)
				}
				next++
			}
			if next != n || uint64(hash.Len()) != n || uint64(len(maps.Collect(hash.All()))) != n {
				return fmt.Errorf("%d records, %d entries, want %d", next, hash.Len(), n)
			}
			return cur.Err()
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	put(0, 500)
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	for n := uint64(500); n < 800; n += 100 {
		// A program that expects a root object of another size is refused.
		if out, code := run(t, nil, filepath.Join(b, "tool"), "get", path); code != 3 || !strings.Contains(out, "root object has") {
			t.Fatalf("a root of another size: %s", out)
		}
		tool(t, b, "churn", path, strconv.FormatUint(n, 10))
		r = openGo(t, path, scmlib.Options{})
		s = p.In(r)
		check(n)
		put(n, n+100)
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestMain is the Go side of the tests in which a process is killed.
func TestMain(m *testing.M) {
	if path := os.Getenv("SCM_TEST_HANG"); path != "" {
		fmt.Println("error", hangGo(path))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// hangGo leaves a transaction open, as the command hang of test/tool.c does.
func hangGo(path string) error {
	r, err := scmlib.Open(path, scmlib.Options{})
	if err != nil {
		return err
	}
	p, err := scmlib.Root[cells](r)
	if err != nil {
		return err
	}
	c := p.In(r)
	return r.Update(func(tx *scmlib.Tx) error {
		if err := tx.Add(&c.A[0].V, &c.A[1].V, &c.Wide); err != nil {
			return err
		}
		c.A[0].V, c.A[1].V = 999, 999
		for i := range c.Wide {
			c.Wide[i] = 0xeeee
		}
		off, err := tx.Alloc(20000)
		if err != nil {
			return err
		}
		if err := errors.Join(tx.Free(c.Block[0]), tx.Add(&c.Block[0])); err != nil {
			return err
		}
		c.Block[0] = off
		fmt.Println("ready")
		select {}
	})
}

// killWhenReady starts a program, waits for its first line, and kills it.
func killWhenReady(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, _ := bufio.NewReader(out).ReadString('\n')
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if line != "ready\n" {
		t.Fatalf("the program says %q", line)
	}
}

// A transaction that a killed process of one language has left open is taken back by the other.
func TestTakenBack(t *testing.T) {
	b, path := built(t, plain), filepath.Join(scratch(t), "r")
	// Small lanes, so that the log continues in the heap.
	r := openGo(t, path, scmlib.Options{Create: true, Size: 1 << 20, Lanes: 2, LaneSize: 1024})
	if err := setGo(r, rootGo(t, r), 0, 5); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"C then Go", "Go then C"} {
		t.Run(dir, func(t *testing.T) {
			if dir == "C then Go" {
				killWhenReady(t, exec.Command(filepath.Join(b, "tool"), "hang", path))
				r := openGo(t, path, scmlib.Options{})
				c := rootGo(t, r)
				blocks := 0
				r.Blocks(func(scmlib.Block) bool { blocks++; return true })
				if r.Info().Recovered != 1 || c.A[0].V != 5 || c.A[1].V != 0 || c.Wide != [400]uint64{} || blocks != 2 {
					t.Fatalf("recovered %d, cells %d %d, %d blocks", r.Info().Recovered, c.A[0].V, c.A[1].V, blocks)
				}
				if err := r.Close(); err != nil {
					t.Fatal(err)
				}
				return
			}
			exe, err := os.Executable()
			if err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command(exe)
			cmd.Env = append(os.Environ(), "SCM_TEST_HANG="+path)
			killWhenReady(t, cmd)
			if got := tool(t, b, "get", path); !strings.HasPrefix(got, "5:5,5 0 0") || !strings.HasSuffix(got, "recovered 1\n") {
				t.Fatalf("C finds %q", got)
			}
			if got := tool(t, b, "open", path, "", "0", "0", "0", "0", "0"); strings.Count(got, "\nblock") != 2 {
				t.Fatalf("C finds %q", got)
			}
		})
	}
}

// TestKill kills a program in C at random moments; Go looks at what it has left: SCM_KILLS times (40 in a normal run).
// It sees errors of logic only: the caches of a killed process are not lost.
func TestKill(t *testing.T) {
	t.Parallel()
	b, path := built(t, plain), filepath.Join(scratch(t), "r")
	kills := 40
	if n, err := strconv.Atoi(os.Getenv("SCM_KILLS")); err == nil {
		kills = n
	}
	tool(t, b, "open", path, "", "1", "1048576", "0", "0", "0")
	recovered, work := 0, uint64(0)
	for i := range kills {
		cmd := exec.Command(filepath.Join(b, "tool"), "work", path)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		rd := bufio.NewReader(out)
		first, err := rd.ReadString('\n')
		if err != nil {
			_ = cmd.Wait()
			t.Fatalf("kill %d: the program ended by itself: %s", i, first)
		}
		timer := time.AfterFunc(time.Duration(rand.IntN(4000))*time.Microsecond, func() { _ = cmd.Process.Kill() })
		rest, _ := io.ReadAll(rd)
		timer.Stop()
		_ = cmd.Wait()
		promised := strings.TrimSpace(first)
		if lines := strings.Split(string(rest), "\n"); len(lines) > 1 {
			promised = lines[len(lines)-2]
		}
		n, err := strconv.ParseUint(promised, 10, 64)
		if err != nil {
			t.Fatalf("kill %d: the program says %q", i, promised)
		}
		work = max(work, n)
		r := openGo(t, path, scmlib.Options{})
		c := rootGo(t, r)
		recovered += r.Info().Recovered
		sum, used := uint64(0), 1
		for k := range 11 {
			sum += c.A[k].V
		}
		for k, off := range c.Block {
			if off == 0 {
				continue
			}
			used++
			if m, err := r.Bytes(off, 1); err != nil || m[0] != byte(k) {
				t.Fatalf("kill %d: block %d holds %v: %v", i, k, m, err)
			}
		}
		r.Blocks(func(scmlib.Block) bool { used--; return true })
		if sum != 0 || c.A[11].V < n || used != 0 {
			t.Fatalf("kill %d: sum %d, count %d, promised %d, %d blocks too few or too many", i, sum, c.A[11].V, n, used)
		}
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d kills, %d of them within a transaction, %d transactions", kills, recovered, work)
	if work == 0 {
		t.Error("the program did nothing")
	}
}
