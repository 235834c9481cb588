// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package c_test

import (
	"bufio"
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nhybrid/nhybrid/scmlib"
)

// preload is the environment of a program whose heap lies in the region at path.
func preload(t testing.TB, path string, more ...string) []string {
	t.Helper()
	return append([]string{"LD_PRELOAD=" + filepath.Join(built(t, plain), "libscm_preload.so"), "SCM_REGION=" + path, "SCM_SIZE=64m", "SCM_MODE="}, more...)
}

// The malloc family from many threads, with forks amid them; with forks denied; and where the region is small.
func TestHeap(t *testing.T) {
	t.Parallel()
	exe, dir := filepath.Join(built(t, plain), "heap-check"), scratch(t)
	for name, c := range map[string]struct{ env, want string }{
		"copy": {"SCM_FORK=copy", "ok denied 0 "}, "deny": {"SCM_FORK=deny", "ok denied 8 "}, "page": {"SCM_MODE=volume", "ok denied 0 "},
		"small": {"SCM_SIZE=16m", "ok denied 0 megabytes "},
	} {
		t.Run(name, func(t *testing.T) {
			for range 2 { // the second time in a region that has been a heap
				if out, code := run(t, preload(t, filepath.Join(dir, name), c.env), exe); code != 0 || !strings.Contains(out, c.want) {
					t.Fatalf("status %d: %s", code, out)
				}
			}
		})
	}
}

// Programs of the system, unmodified, with their heap in a region, do what they do without.
func TestPrograms(t *testing.T) {
	t.Parallel()
	path := filepath.Join(scratch(t), "heap")
	long := filepath.Join(t.TempDir(), "lines")
	var b bytes.Buffer
	for i := range 20000 {
		fmt.Fprintln(&b, i*7919%20011, "some words to sort")
	}
	if err := os.WriteFile(long, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	python := "/usr/bin/python3"
	for _, args := range [][]string{
		{"ls", "-la", "/usr/bin"},
		{"sort", "-n", "--parallel=2", long},
		{"perl", "-e", `my %h; $h{$_ % 977} .= $_ for 1..50000; my $p = fork; if (!$p) { $h{x} = "child" x 1000; exit 3 } waitpid $p, 0; print $? >> 8, " ", length join "", map { $h{$_} } sort keys %h; print " ", scalar(split /\n/, ` + "`ls /`" + `) > 3`},
		{"bash", "-c", `x=$(seq 1000 | sort -rn | head -3); echo $x; (y=sub; echo $y; exit 3); echo $?; ls / | while read l; do :; done; exec ls /`},
		{python, "-c", `
import os, threading, subprocess, json
d = {i: [str(i)] * 10 for i in range(30000)}
t = [threading.Thread(target=lambda: json.loads(json.dumps(d))) for _ in range(3)]
[x.start() for x in t]; [x.join() for x in t]
r, w = os.pipe(); p = os.fork()
if p == 0:
    d.clear(); os.write(w, b'child'); os._exit(5)
print(os.waitpid(p, 0)[1] >> 8, os.read(r, 9), len(d), d[29999][0], subprocess.check_output(['echo', 'hi']))`},
	} {
		if _, err := exec.LookPath(args[0]); err != nil {
			t.Logf("%s is not there", args[0])
			continue
		}
		t.Run(filepath.Base(args[0]), func(t *testing.T) {
			want, code1 := run(t, nil, args[0], args[1:]...)
			got, code2 := run(t, preload(t, path), args[0], args[1:]...)
			if want != got || code1 != code2 || code1 != 0 {
				t.Errorf("status %d and %d; without:\n%.300s\nwith:\n%.300s", code1, code2, want, got)
			}
			used := filepath.Join(filepath.Dir(path), "used")
			out, code := run(t, preload(t, path, "SCM_PRELOAD_VERBOSE=1"), "sh", append([]string{"-c", `exec 2>"$0"; exec "$@"`, used}, args...)...)
			if said, err := os.ReadFile(used); code != 0 || err != nil || !strings.Contains(string(said), "lies in "+path) {
				t.Errorf("the heap is elsewhere: status %d: %s %s", code, said, out)
			}
		})
	}
}

// No silent fallback, and no durable data overwritten.
func TestPreloadRefuses(t *testing.T) {
	dir := scratch(t)
	durable, path := filepath.Join(dir, "durable"), filepath.Join(dir, "heap")
	r := openGo(t, durable, scmlib.Options{Create: true, Size: 1 << 20})
	rootGo(t, r)
	r.Close()
	before, err := os.ReadFile(durable)
	if err != nil {
		t.Fatal(err)
	}
	out, code := run(t, preload(t, durable, "SCM_SIZE="), "/bin/echo", "hello")
	if after, _ := os.ReadFile(durable); code != 127 || !strings.Contains(out, "holds durable data") || strings.Contains(out, "hello") || !bytes.Equal(before, after) {
		t.Errorf("a durable region as heap: status %d: %s", code, out)
	}
	for env, want := range map[string]string{"SCM_REGION=" + dir + "/none/region": "no such file", "SCM_FORK=maybe": "use copy or deny", "SCM_MODE=x": "use mapping"} {
		if out, code := run(t, preload(t, path, env), "/bin/echo", "hello"); code != 127 || !strings.Contains(out, want) || strings.Contains(out, "hello") {
			t.Errorf("%s: status %d: %s", env, code, out)
		}
	}
	if out, code := run(t, preload(t, durable, "SCM_SIZE=", "SCM_PRELOAD_FALLBACK=1"), "/bin/echo", "hello"); code != 0 || !strings.Contains(out, "ordinary memory") ||
		!strings.Contains(out, "hello") {
		t.Errorf("with fallback: status %d: %s", code, out)
	}
	// A heap that is in use by a process that has not started this one.
	cmd := exec.Command("cat")
	cmd.Env = append(os.Environ(), preload(t, path)...)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	echo, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(in, "up")
	if l, err := bufio.NewReader(echo).ReadString('\n'); l != "up\n" {
		t.Fatal(l, err)
	}
	if out, code := run(t, preload(t, path), "/bin/echo", "hello"); code != 127 || !strings.Contains(out, "in use") {
		t.Errorf("two heaps in one region: status %d: %s", code, out)
	}
	in.Close()
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	// Nor does libscm take a heap for a durable region.
	if code, out := openC(t, path, "", "0", "0", "0", "0", "0"); code != -7 || !strings.Contains(out, "volatile heap") {
		t.Errorf("libscm opens a heap: %d %s", code, out)
	}
}

// redis is a client of one connection.
type redis struct {
	net.Conn
	rd *bufio.Reader
}

func (r redis) do(args ...string) (string, error) {
	if _, err := fmt.Fprintln(r, strings.Join(args, " ")); err != nil {
		return "", err
	}
	l, err := r.rd.ReadString('\n')
	if n := 0; err == nil && l[0] == '$' {
		if _, serr := fmt.Sscanf(l, "$%d", &n); serr != nil || n < 0 {
			return "", serr
		}
		b := make([]byte, n+2)
		for k := 0; k < len(b) && err == nil; {
			var m int
			m, err = r.rd.Read(b[k:])
			k += m
		}
		l = string(b)
	}
	return strings.TrimSpace(l), err
}

// Redis with its heap in a region saves in the background, which forks, while it goes on changing: the snapshot is that of the moment, and the parent lives.
func TestRedis(t *testing.T) {
	t.Parallel()
	exe, err := exec.LookPath("redis-server")
	if err != nil {
		t.Skip("needs redis-server")
	}
	dir := scratch(t)
	start := func(env []string, dir string) redis {
		t.Helper()
		sock := filepath.Join(dir, "sock")
		os.Remove(sock)
		cmd := exec.Command(exe, "--port", "0", "--unixsocket", sock, "--save", "", "--dir", dir, "--enable-debug-command", "yes")
		cmd.Env = append(os.Environ(), env...)
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
		for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
			if c, err := net.Dial("unix", sock); err == nil {
				r := redis{c, bufio.NewReader(c)}
				if s, _ := r.do("PING"); s == "+PONG" {
					return r
				}
				c.Close()
			}
		}
		t.Fatalf("redis-server does not answer: %s", out.String())
		return redis{}
	}
	must := func(r redis, want string, args ...string) {
		t.Helper()
		if got, err := r.do(args...); err != nil || got != want {
			t.Fatalf("%v: %q %v, want %q", args, got, err, want)
		}
	}
	saved := func(r redis) string {
		t.Helper()
		for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
			s, err := r.do("INFO", "persistence")
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(s, "rdb_bgsave_in_progress:0") {
				_, rest, _ := strings.Cut(s, "rdb_last_bgsave_status:")
				return strings.Fields(rest)[0]
			}
		}
		t.Fatal("the save does not end")
		return ""
	}
	r := start(preload(t, filepath.Join(dir, "heap")), dir)
	must(r, "+OK", "DEBUG", "POPULATE", "20000", "key", "100")
	for i := range 3 {
		must(r, "+OK", "SET", "round", fmt.Sprint(i))
		must(r, "+Background saving started", "BGSAVE")
		must(r, "+OK", "SET", "round", "later")
		must(r, "+OK", "DEBUG", "POPULATE", "25000", fmt.Sprint("more", i), "50") // the parent's heap changes under the child
		if s := saved(r); s != "ok" {
			t.Fatalf("save %d: %s", i, s)
		}
	}
	must(r, "later", "GET", "round")
	must(r, ":95001", "DBSIZE")
	// What was saved is the state at the fork.
	plainDir := filepath.Join(dir, "plain")
	rdb, err := os.ReadFile(filepath.Join(dir, "dump.rdb"))
	if err == nil {
		err = os.Mkdir(plainDir, 0o700)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(plainDir, "dump.rdb"), rdb, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	p := start(nil, plainDir)
	must(p, "2", "GET", "round")
	must(p, ":70001", "DBSIZE")
	// Where forks are denied Redis says so and goes on.
	if err := os.Remove(filepath.Join(dir, "dump.rdb")); err != nil {
		t.Fatal(err)
	}
	d := start(preload(t, filepath.Join(dir, "heap2"), "SCM_FORK=deny"), dir)
	if s, err := d.do("BGSAVE"); err != nil || !strings.HasPrefix(s, "-ERR") {
		t.Fatalf("BGSAVE: %q %v", s, err)
	}
	must(d, "+OK", "SET", "k", "v")
	must(d, "v", "GET", "k")
}
