// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package c_test

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/scmlib"
	"github.com/nhybrid/nhybrid/scmlib/internal/crash"
)

// effort scales the enumeration: SCM_CRASH_EFFORT, 1 in a normal run.
func effort() int {
	if n, err := strconv.Atoi(os.Getenv("SCM_CRASH_EFFORT")); err == nil && n > 0 {
		return n
	}
	return 1
}

// look describes what is in an image: the cells and every allocated block. It changes img, as opening does.
func look(img []byte) (s string, err error) {
	r, err := scmlib.OpenImage(img, scmlib.Options{Create: true})
	if err != nil {
		return "", err
	}
	var b []byte
	err = r.View(func() error {
		if binary.LittleEndian.Uint64(img[8192:]) == 0 { // no root yet
			return nil
		}
		p, err := scmlib.Root[cells](r)
		if err != nil {
			return err
		}
		c := p.In(r)
		for i := range c.A {
			b = fmt.Append(b, c.A[i].V, " ")
		}
		b = fmt.Append(b, c.Block, c.Bulk, c.Flag)
		for _, off := range c.Block { // the content of blocks belongs to what is promised
			if off != 0 {
				m, err := r.Bytes(off, 32)
				if err != nil {
					return err
				}
				b = fmt.Appendf(b, " %x", m)
			}
		}
		if c.Flag&1 == 1 {
			m, err := r.Bytes(c.Bulk, 2980)
			if err != nil {
				return err
			}
			b = fmt.Appendf(b, " %x", m)
		}
		h := uint64(0)
		for i, v := range c.Wide {
			h = h*31 + v*uint64(i+1)
		}
		b = fmt.Append(b, " ", h)
		return nil
	})
	r.Blocks(func(k scmlib.Block) bool { b = fmt.Appendf(b, " %d+%d", k.Off, k.Size); return true })
	return string(b), err
}

// replay feeds a trace of C to the tracer of the enumerator. At each mark it calls mark with what the memory holds then.
func replay(tr *crash.Tracer, mem []byte, trace io.Reader, seen map[string]bool, mark func() error) error {
	rd := bufio.NewReaderSize(trace, 1<<16)
	var head [24]byte
	for {
		if _, err := io.ReadFull(rd, head[:]); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		rest := make([]byte, int(binary.LittleEndian.Uint16(head[2:]))+int(binary.LittleEndian.Uint32(head[4:])))
		if _, err := io.ReadFull(rd, rest); err != nil {
			return err
		}
		site, data := string(rest[:binary.LittleEndian.Uint16(head[2:])]), rest[binary.LittleEndian.Uint16(head[2:]):]
		off, n := binary.LittleEndian.Uint64(head[8:]), binary.LittleEndian.Uint64(head[16:])
		if seen != nil && site != "" {
			seen[site] = true
		}
		tr.Agent(int(head[1]))
		switch head[0] {
		case 'W': // the program's own stores: the tracer finds them at the next event, as words in no order
			for ; len(data) >= 16; data = data[16:] {
				copy(mem[binary.LittleEndian.Uint64(data):], data[8:16])
			}
		case 'S':
			copy(mem[off:], data)
			tr.Store(off)
		case 'C':
			copy(mem[off:], data)
			tr.Copy(off, n)
		case 'N':
			copy(mem[off:], data)
			tr.NT(off, n)
		case 'F':
			tr.Flush(off, n)
		case 'B':
			tr.Fence()
		case 'M':
			if err := mark(); err != nil {
				return err
			}
			tr.Mark()
		case 'V':
		default:
			return fmt.Errorf("event %q", head[0])
		}
	}
}

// server recovers images by the code of C.
type server struct {
	img   []byte
	trace *os.File
	cmd   *exec.Cmd
	in    io.WriteCloser
	out   *bufio.Reader
}

func serve(t testing.TB, bin string, size int, env []string) *server {
	t.Helper()
	s, dir := &server{}, scratch(t)
	image, trace := filepath.Join(dir, "image"), filepath.Join(dir, "trace")
	f, err := os.Create(image)
	if err == nil {
		err = f.Truncate(int64(size))
	}
	if err == nil {
		s.img, err = unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	s.cmd = exec.Command(bin, "serve", image, trace)
	s.cmd.Env = append(os.Environ(), env...)
	s.in, err = s.cmd.StdinPipe()
	out, err2 := s.cmd.StdoutPipe()
	if err := errors.Join(err, err2, s.cmd.Start()); err != nil {
		t.Fatal(err)
	}
	s.out = bufio.NewReader(out)
	s.trace, err = os.OpenFile(trace, os.O_CREATE|os.O_RDONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *server) stop() {
	s.in.Close()
	_ = s.cmd.Wait()
	s.trace.Close()
	_ = unix.Munmap(s.img)
}

// recover has C recover the image in s.img.
func (s *server) recover(traced bool) error {
	cmd := byte('r')
	if traced {
		cmd = 't'
	}
	if _, err := s.in.Write([]byte{cmd}); err != nil {
		return err
	}
	line, err := s.out.ReadString('\n')
	if err == nil && line != "ok\n" {
		err = errors.New("C: " + strings.TrimSpace(line))
	}
	return err
}

// limits of one run.
type limits struct {
	states, random int
	nest           int // of every nestth state the recovery by C is cut short as well
	stop           bool
	goOnly         bool // enough to find out what C has done wrong before the crash
}

type crashRun struct {
	res, nested crash.Result
	seen        map[string]bool // flushes, fences and checksums that were passed
}

// enumerate records a scenario in C and visits the states that it may leave. Each is recovered by Go and by C: both must find what was there before or
// after the operation that was cut short.
func enumerate(t testing.TB, bin, name string, env []string, lim limits) (cr crashRun, err error) {
	dir := scratch(t)
	start, trace := filepath.Join(dir, "start"), filepath.Join(dir, "trace")
	if out, code := run(t, env, bin, "record", name, start, trace); code != 0 {
		return cr, fmt.Errorf("record: status %d: %s", code, out)
	}
	mem, err := os.ReadFile(start)
	if err != nil {
		return cr, err
	}
	events, err := os.ReadFile(trace)
	if err != nil {
		return cr, err
	}
	cr.seen = map[string]bool{}
	tr := crash.NewTracer(mem, nil)
	allow := [][]string{{}}
	if first := bytes.Clone(mem); binary.LittleEndian.Uint64(first) != 0 {
		s, err := look(first)
		if err != nil {
			return cr, err
		}
		allow[0] = append(allow[0], s)
	}
	err = replay(tr, mem, bytes.NewReader(events), cr.seen, func() error {
		s, err := look(bytes.Clone(mem))
		allow[len(allow)-1] = append(allow[len(allow)-1], s)
		allow = append(allow, []string{s})
		return err
	})
	if err != nil {
		return cr, err
	}
	s := serve(t, bin, len(mem), env)
	defer s.stop()
	closing := len(allow) - 2 // the last mark comes after the close
	check := func(img []byte, phase int) error {
		got, err := look(img)
		if err != nil {
			return err
		}
		if want := allow[min(phase, len(allow)-1)]; !slices.Contains(want, got) {
			return fmt.Errorf("found\n  %s\nallowed:\n  %s", got, strings.Join(want, "\n  "))
		}
		return nil
	}
	scratchImg, n := make([]byte, len(mem)), 0
	cr.res = tr.Enumerate(crash.Plan{Limit: lim.states, Random: lim.random, Seed: 1}, lim.stop, func(img []byte, phase int, _ func(off, n uint64)) error {
		if phase >= 1 && phase != closing && !bytes.Equal(img[:512], img[4096:4096+512]) {
			return errors.New("the copies of the header differ although nobody was writing them")
		}
		copy(scratchImg, img)
		if err := check(scratchImg, phase); err != nil {
			return fmt.Errorf("by Go: %w", err)
		}
		if lim.goOnly {
			return nil
		}
		n++
		nest := lim.nest > 0 && n%lim.nest == 0
		copy(s.img, img)
		if err := s.recover(nest); err != nil {
			return err
		}
		if nest {
			r, err := again(s, img, cr.seen, func(img []byte) error { return check(img, phase) })
			if cr.nested.Add(r); err != nil || r.First != nil {
				return fmt.Errorf("recovery cut short: %w", errors.Join(err, r.First))
			}
		}
		copy(scratchImg, s.img)
		if err := check(scratchImg, phase); err != nil {
			return fmt.Errorf("by C: %w", err)
		}
		return nil
	})
	return cr, nil
}

// again visits the states that a recovery by C, which the server has just traced, may leave.
func again(s *server, img []byte, seen map[string]bool, check func([]byte) error) (crash.Result, error) {
	if _, err := s.trace.Seek(0, io.SeekStart); err != nil {
		return crash.Result{}, err
	}
	mem := bytes.Clone(img)
	tr := crash.NewTracer(mem, nil).Quiet()
	if err := replay(tr, mem, s.trace, seen, func() error { return nil }); err != nil {
		return crash.Result{}, err
	}
	scratchImg := make([]byte, len(img))
	return tr.Enumerate(crash.Plan{Limit: 200, Random: 20, Seed: 1}, true, func(img []byte, _ int, _ func(off, n uint64)) error {
		copy(scratchImg, img)
		return check(scratchImg)
	}), nil
}

func scenarios(t testing.TB, bin string) []string {
	t.Helper()
	out, code := run(t, nil, bin, "list")
	if code != 0 {
		t.Fatal(out)
	}
	return strings.Split(strings.TrimSpace(out), "\n")
}

// TestCrash enumerates the persisted states of every scenario in C.
func TestCrash(t *testing.T) {
	t.Parallel()
	bin := filepath.Join(built(t, plain), "trace-tool")
	var total, nested crash.Result
	for _, name := range scenarios(t, bin) {
		t.Run(name, func(t *testing.T) {
			k := effort()
			cr, err := enumerate(t, bin, name, nil, limits{states: 1000 * k, random: 150 * k, nest: max(11, 101/k)})
			if err != nil {
				t.Fatal(err)
			}
			if cr.res.States < 50 || cr.nested.States == 0 {
				t.Fatalf("%d states, %d of recovery: too few to mean anything", cr.res.States, cr.nested.States)
			}
			if cr.res.First != nil {
				t.Errorf("%d of %d states fail, first: %v", cr.res.Failed, cr.res.States, cr.res.First)
			}
			t.Logf("%d states in %d epochs (%d exhaustively), %d states of recovery cut short", cr.res.States, cr.res.Epochs, cr.res.Exhaustive, cr.nested.States)
			total.Add(cr.res)
			nested.Add(cr.nested)
		})
	}
	t.Logf("states_enumerated=%d states_failed=%d (of these in recovery cut short: %d); epochs %d, exhaustive %d",
		total.States+nested.States, total.Failed, nested.States, total.Epochs, total.Exhaustive)
}

var call = regexp.MustCompile(`\b(mem_flush|mem_fence|region_fence|verify)\(`)

// sites lists every flush, fence and checksum in the source, as FILE:LINE.
func sites(t *testing.T) (out []string) {
	t.Helper()
	files, err := filepath.Glob("src/*.c")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for l := range strings.Lines(string(b)) {
			if n++; call.MatchString(l) {
				out = append(out, fmt.Sprintf("%s:%d", filepath.Base(f), n))
			}
		}
	}
	return out
}

// TestMutants leaves out each flush, fence and checksum of C in turn. Each mutant must be found out by the scenarios.
func TestMutants(t *testing.T) {
	t.Parallel()
	bin := filepath.Join(built(t, plain), "trace-tool")
	passes := map[string][]string{}
	for _, name := range scenarios(t, bin) {
		cr, err := enumerate(t, bin, name, nil, limits{states: 1, nest: 7})
		if err != nil {
			t.Fatal(err)
		}
		for s := range cr.seen {
			passes[s] = append(passes[s], name)
		}
	}
	total, killed := 0, 0
	for _, site := range sites(t) {
		total++
		env, why := []string{"SCM_MUTANT=" + site}, ""
		for _, lim := range []limits{{states: 200, random: 30, stop: true, goOnly: true}, {states: 1200, random: 200, nest: 5, stop: true}} {
			for _, name := range slices.Backward(passes[site]) { // formatting, the first, has most states
				if why != "" {
					break
				}
				cr, err := enumerate(t, bin, name, env, lim)
				if err = errors.Join(err, cr.res.First); err != nil {
					why = fmt.Sprintf("%s after %d states: %.90q", name, cr.res.States, err.Error())
				}
			}
		}
		if why == "" {
			why = flips(t, bin, env)
		}
		if why == "" {
			t.Errorf("survives: %s (passed by %q)", site, passes[site])
			continue
		}
		killed++
		t.Logf("killed: %s by %s", site, why)
	}
	t.Logf("mutants_total=%d mutants_killed=%d", total, killed)
	if total < 25 {
		t.Errorf("%d sites: the search for them is broken", total)
	}
}

// flips damages each byte of either header copy: what C reads must be what was written.
func flips(t testing.TB, bin string, env []string) string {
	img := make([]byte, 64<<10)
	r, err := scmlib.OpenImage(img, scmlib.Options{Create: true, Layout: "flip", Lanes: 2, LaneSize: 1024})
	if err != nil {
		t.Fatal(err)
	}
	want := r.Info()
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	s := serve(t, bin, len(img), env)
	defer s.stop()
	for at := range 1024 {
		at = at/512*4096 + at%512
		copy(s.img, img)
		s.img[at] ^= 0x20
		if err := s.recover(false); err != nil {
			return fmt.Sprintf("byte %d of the headers: %v", at, err)
		}
		r, err := scmlib.OpenImage(bytes.Clone(s.img), scmlib.Options{})
		if err != nil {
			return fmt.Sprintf("byte %d of the headers: %v", at, err)
		}
		if got := r.Info(); got.Healed || got.UUID != want.UUID || got.Layout != want.Layout || got.Generation != want.Generation+2 {
			return fmt.Sprintf("byte %d of the headers was believed", at)
		}
	}
	return ""
}

// Without a mutant the same damage is healed.
func TestHeaderFlips(t *testing.T) {
	if why := flips(t, filepath.Join(built(t, plain), "trace-tool"), nil); why != "" {
		t.Fatal(why)
	}
}
