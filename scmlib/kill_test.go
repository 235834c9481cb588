// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scmlib_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
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

// ledger is what the child of the SIGKILL test keeps: pairs of cells whose sum never changes, a map and a log that hold the same, and a block that
// moves. Whatever moment the child dies at, all of it must fit together, and nothing that the child has reported done may be missing.
type ledger struct {
	Cells [64]int64
	Count uint64
	Block scmlib.Off
	Size  uint64
	Tree  pmap.TreeHead
	Log   pmap.LogHead
}

func openLedger(path string) (*scmlib.Region, *ledger, *pmap.Tree[uint64], *pmap.Log, error) {
	r, err := scmlib.Open(path, scmlib.Options{Create: true, Size: 4 << 20, Layout: "ledger"})
	if err != nil {
		return nil, nil, nil, nil, err
	}
	p, err := scmlib.Root[ledger](r)
	if err != nil {
		return nil, nil, nil, nil, err
	}
	l := p.In(r)
	to, err1 := scmlib.OffsetOf(r, &l.Tree)
	lo, err2 := scmlib.OffsetOf(r, &l.Log)
	tp, err3 := scmlib.PtrAt[pmap.TreeHead](to)
	lp, err4 := scmlib.PtrAt[pmap.LogHead](lo)
	tree, err5 := pmap.NewTree[uint64](r, tp)
	return r, l, tree, pmap.NewLog(r, lp), errors.Join(err1, err2, err3, err4, err5)
}

// TestMain runs the child.
func TestMain(m *testing.M) {
	if path := os.Getenv("SCM_TEST_CHILD"); path != "" {
		if err := child(path); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// child works until it is killed. Each line it prints is a promise.
func child(path string) error {
	r, l, tree, log, err := openLedger(path)
	if err != nil {
		return err
	}
	rnd := rand.New(rand.NewPCG(uint64(os.Getpid()), 1))
	out := make([]byte, 0, 32)
	for {
		err := r.Update(func(tx *scmlib.Tx) error {
			a, b := rnd.IntN(64), rnd.IntN(64)
			if err := scmlib.AddAll(tx, &l.Cells[a], &l.Cells[b]); err != nil {
				return err
			}
			l.Cells[a]--
			l.Cells[b]++
			if l.Block != 0 {
				if err := tx.Free(l.Block); err != nil {
					return err
				}
			}
			size := uint64(1 + rnd.IntN(40<<10))
			off, err := tx.Alloc(size)
			if err != nil {
				return err
			}
			if err := tx.Add(&l.Block, &l.Size, &l.Count); err != nil {
				return err
			}
			l.Block, l.Size = off, size
			n := l.Count
			l.Count++
			if err := tree.Put(tx, n, n*n); err != nil {
				return err
			}
			if n >= 300 {
				if _, err := tree.Delete(tx, n-300); err != nil {
					return err
				}
				if err := log.Trim(tx, n-300); err != nil {
					return err
				}
			}
			if rnd.IntN(10) == 0 {
				return errNo
			}
			return log.Append(tx, strconv.AppendUint(nil, n, 10))
		})
		if errors.Is(err, errNo) {
			continue
		}
		if err != nil {
			return err
		}
		out = append(strconv.AppendUint(out[:0], l.Count, 10), '\n')
		if _, err := os.Stdout.Write(out); err != nil {
			return err
		}
	}
}

// checkLedger opens what a killed child has left.
func checkLedger(path string, promised uint64) (recovered int, err error) {
	r, l, tree, log, err := openLedger(path)
	if err != nil {
		return 0, err
	}
	defer r.Close()
	err = r.View(func() error {
		sum := int64(0)
		for _, c := range l.Cells {
			sum += c
		}
		if sum != 0 || l.Count < promised {
			return fmt.Errorf("sum of cells %d, count %d, promised %d", sum, l.Count, promised)
		}
		next := l.Count - min(l.Count, 300)
		for k, v := range tree.From(0) {
			if k != next || v != k*k {
				return fmt.Errorf("tree has %d=%d, want key %d", k, v, next)
			}
			next++
		}
		if next != l.Count || log.Next() != l.Count {
			return fmt.Errorf("tree ends at %d, log at %d, count is %d", next, log.Next(), l.Count)
		}
		cur := log.From(0)
		for s, b := range cur.All() {
			if string(b) != strconv.FormatUint(s, 10) {
				return fmt.Errorf("log record %d is %q", s, b)
			}
		}
		if cur.Err() != nil {
			return cur.Err()
		}
		large := 0
		total := 0
		r.Blocks(func(b scmlib.Block) bool {
			total++
			if b.Off == l.Block && b.Size >= l.Size {
				large++
			}
			return true
		})
		// root, at most 300/16+some leaves and inner nodes, at most a few segments, and the one block that moves
		if l.Block != 0 && large != 1 || total > 60 {
			return fmt.Errorf("%d blocks, and %d where one is to be", total, large)
		}
		return nil
	})
	return r.Info().Recovered, err
}

// TestKill kills a child at random moments and looks at what it has left: SCM_KILLS times (60 in a normal run).
// It sees errors of logic only: the caches of a killed process are not lost, so a library without any flush would pass.
func TestKill(t *testing.T) {
	kills := 60
	if n, err := strconv.Atoi(os.Getenv("SCM_KILLS")); err == nil {
		kills = n
	} else if testing.Short() {
		kills = 10
	}
	path := filepath.Join(scratch(t), "ledger")
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	recovered, work := 0, uint64(0)
	for i := range kills {
		cmd := exec.Command(exe)
		cmd.Env = append(os.Environ(), "SCM_TEST_CHILD="+path)
		var complaint strings.Builder
		cmd.Stderr = &complaint
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// Dies some random time after it has begun to work; its work is not what is timed.
		rd := bufio.NewReader(out)
		if _, err := rd.ReadString('\n'); err != nil {
			_ = cmd.Wait()
			t.Fatalf("kill %d: the child ended by itself: %s", i, complaint.String())
		}
		timer := time.AfterFunc(time.Duration(rand.IntN(4000))*time.Microsecond, func() { _ = cmd.Process.Kill() })
		rest, _ := io.ReadAll(rd)
		timer.Stop()
		_ = cmd.Wait()
		promised := uint64(0)
		if lines := strings.Split(string(rest), "\n"); len(lines) > 1 { // the last piece was cut by the kill, or is empty
			if promised, err = strconv.ParseUint(lines[len(lines)-2], 10, 64); err != nil {
				t.Fatal(err)
			}
		}
		n, err := checkLedger(path, promised)
		if err != nil {
			t.Fatalf("kill %d: %v", i, err)
		}
		recovered += n
		work = max(work, promised)
	}
	t.Logf("%d kills, %d of them within a transaction, %d transactions", kills, recovered, work)
	if work == 0 {
		t.Error("the child did nothing")
	}
}
