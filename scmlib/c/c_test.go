// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package c_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nhybrid/nhybrid/scmlib"
)

// cells is the root object of test/common.h.
type cells struct {
	A     [12]struct{ V, _, _, _, _, _, _, _ uint64 }
	Block [6]scmlib.Off
	Bulk  scmlib.Off
	Flag  uint64
	Wide  [400]uint64
}

// The libraries and programs are built in out/, where make finds what is still good.
var (
	plain     = sync.OnceValues(func() (string, error) { return build("../../out/scmlib-c", "all", "tests") })
	sanitized = sync.OnceValues(func() (string, error) {
		return build("../../out/scmlib-c-san", "SAN=address,undefined", "CFLAGS=-O1 -g", "../../out/scmlib-c-san/tool")
	})
	threaded = sync.OnceValues(func() (string, error) {
		return build("../../out/scmlib-c-tsan", "SAN=thread", "CFLAGS=-O1 -g", "../../out/scmlib-c-tsan/tool")
	})
)

func build(dir string, args ...string) (string, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	lock, err := os.Create(filepath.Join(dir, ".lock"))
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return "", err
	}
	cmd := exec.Command("make", append([]string{"-s", "-j2", "O=" + dir}, args...)...)
	cmd.Env = append(os.Environ(), "MAKEFLAGS=", "MFLAGS=")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("make: %w\n%s", err, out)
	}
	return filepath.Abs(dir)
}

func built(t testing.TB, fn func() (string, error)) string {
	t.Helper()
	if _, err := exec.LookPath("gcc"); err != nil {
		t.Skip("needs gcc")
	}
	dir, err := fn()
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// scratch is a directory in memory where there is some.
func scratch(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "scmlib-c-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// run runs a program, with a deadline, and returns what it printed and its exit status.
func run(t testing.TB, env []string, name string, args ...string) (string, int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), env...)
	cmd.WaitDelay = time.Second
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("%s: %v", name, err)
	}
	return out.String(), cmd.ProcessState.ExitCode()
}

// tool runs a command of test/tool.c that must succeed.
func tool(t testing.TB, dir string, args ...string) string {
	t.Helper()
	out, code := run(t, nil, filepath.Join(dir, "tool"), args...)
	if code != 0 {
		t.Fatalf("tool %s: status %d: %s", strings.Join(args, " "), code, out)
	}
	return out
}

// What each function answers, and threads that share runs and lanes; the second time under the sanitizers.
func TestAPI(t *testing.T) {
	for name, dir := range map[string]func() (string, error){"plain": plain, "sanitized": sanitized} {
		t.Run(name, func(t *testing.T) {
			b, s := built(t, dir), scratch(t)
			tool(t, b, "api", filepath.Join(s, "api"))
			tool(t, b, "threads", filepath.Join(s, "threads"))
			// At page granularity too.
			out, code := run(t, []string{"SCM_FORCE_GRANULARITY=page"}, filepath.Join(b, "tool"), "api", filepath.Join(s, "pages"))
			if code != 0 || !strings.Contains(out, "the environment overrides") {
				t.Fatalf("status %d: %s", code, out)
			}
		})
	}
}

// Threads under the thread sanitizer, which takes a build of its own: SCM_TSAN=1, set by make test-c.
func TestThreads(t *testing.T) {
	if os.Getenv("SCM_TSAN") == "" {
		t.Skip("SCM_TSAN is not set")
	}
	tool(t, built(t, threaded), "threads", filepath.Join(scratch(t), "r"))
}

// The libraries show the names of scm.h and no others; what is installed is found by pkg-config and works from C and C++, static and shared.
func TestInstall(t *testing.T) {
	t.Parallel()
	b, dest := built(t, plain), t.TempDir()
	if out, code := run(t, []string{"MAKEFLAGS="}, "make", "-s", "O="+b, "install", "DESTDIR="+dest, "PREFIX=/opt/scm"); code != 0 {
		t.Fatal(out)
	}
	pre := filepath.Join(dest, "opt/scm")
	header, err := os.ReadFile(filepath.Join(pre, "include/scm.h"))
	if err != nil {
		t.Fatal(err)
	}
	declared := 0
	for l := range strings.Lines(string(header)) {
		if strings.HasPrefix(l, "SCM_API") {
			declared++
		}
	}
	for _, args := range [][]string{{"-D", "--defined-only", pre + "/lib/libscm.so"}, {"-g", "--defined-only", pre + "/lib/libscm.a"}} {
		out, _ := run(t, nil, "nm", args...)
		n := 0
		for l := range strings.Lines(out) {
			f := strings.Fields(l)
			if len(f) != 3 || f[2] == "SCM_1.0" {
				continue
			}
			if n++; !strings.HasPrefix(f[2], "scm") || strings.HasPrefix(f[2], "scmi_") {
				t.Errorf("%s is visible", f[2])
			}
			if strings.Contains(args[2], ".so") && !strings.HasSuffix(f[2], "@@SCM_1.0") {
				t.Errorf("%s has no version", f[2])
			}
		}
		if n != declared {
			t.Errorf("%s shows %d names, scm.h declares %d", args[2], n, declared)
		}
	}
	for _, f := range []string{"share/man/man3/scm.3", "share/man/man7/libscm_preload.7"} {
		page, err := os.ReadFile(filepath.Join(pre, f))
		if err != nil {
			t.Fatal(err)
		}
		if f != "share/man/man3/scm.3" {
			continue
		}
		for l := range strings.Lines(string(header)) { // every function is described
			if name, _, ok := strings.Cut(strings.TrimPrefix(l, "SCM_API "), "("); ok && strings.HasPrefix(l, "SCM_API ") {
				name = name[strings.LastIndexAny(name, " *")+1:]
				if !strings.Contains(string(page), name) {
					t.Errorf("%s is not in scm(3)", name)
				}
			}
		}
	}
	if _, err := exec.LookPath("groff"); err == nil {
		for _, f := range []string{"man3/scm.3", "man7/libscm_preload.7"} {
			if out, code := run(t, nil, "groff", "-man", "-Tutf8", "-ww", "-z", pre+"/share/man/"+f); code != 0 || out != "" {
				t.Errorf("%s: %s", f, out)
			}
		}
	}
	if _, err := exec.LookPath("pkg-config"); err != nil {
		t.Skip("needs pkg-config")
	}
	src := filepath.Join(dest, "p.c")
	program := "#include <scm.h>\n#include <stdio.h>\nint main(void) { scm_region *r; static struct scm_options o; o.flags = SCM_OPEN_CREATE; o.size = 1 << 20;\n" +
		"int rc = scm_open(&r, NULL, &o); if (rc) { puts(scm_errormsg()); return 1; } puts(scm_strerror(scm_close(r))); return 0; }\n"
	if err := os.WriteFile(src, []byte(program), 0o600); err != nil {
		t.Fatal(err)
	}
	env := []string{"PKG_CONFIG_PATH=" + pre + "/lib/pkgconfig", "PKG_CONFIG_SYSROOT_DIR=" + dest, "LD_LIBRARY_PATH=" + pre + "/lib", "SCM_MODE=dram"}
	for _, cc := range []string{"gcc -std=c11 -pedantic", "gcc -static", "g++ -x c++ -std=c++17 -pedantic"} {
		if _, err := exec.LookPath(strings.Fields(cc)[0]); err != nil {
			t.Logf("%s is not there", cc)
			continue
		}
		static := map[bool]string{true: "--static"}[strings.Contains(cc, "-static")]
		exe := filepath.Join(dest, "p")
		script := fmt.Sprintf("%s -Wall -Wextra -Werror %s -x none -o %s $(pkg-config --cflags --libs %s scm) && %s", cc, src, exe, static, exe)
		if out, code := run(t, env, "sh", "-c", script); code != 0 || out != "no error\n" {
			t.Errorf("%s: %s", cc, out)
		}
	}
}
