//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package arm64_test builds scmlib and libscm for arm64 on a machine that may be of another kind, and runs them by qemu-user where that is
// installed. make test-arm64 installs it, and the compiler; then nothing is skipped.
package arm64_test

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const module = "github.com/nhybrid/nhybrid/"

// skip is a failure where make test-arm64 has promised that nothing is missing.
func skip(t *testing.T, why string) {
	t.Helper()
	if os.Getenv("NHYBRID_ARM64") != "" {
		t.Fatal(why)
	}
	t.Skip(why)
}

func run(t *testing.T, cmd *exec.Cmd) string {
	t.Helper()
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s: %s", cmd, out)
	return string(out)
}

func goTool(t *testing.T, arch string, args ...string) string {
	t.Helper()
	cmd := exec.Command("go", args...)
	cmd.Env = append(os.Environ(), "GOARCH="+arch, "CGO_ENABLED=0")
	return run(t, cmd)
}

// emulator is what runs programs of arm64 here; empty on a machine that does it itself.
func emulator(t *testing.T) []string {
	t.Helper()
	if runtime.GOARCH == "arm64" {
		return nil
	}
	for _, name := range []string{"qemu-aarch64-static", "qemu-aarch64"} {
		if path, err := exec.LookPath(name); err == nil {
			return []string{path}
		}
	}
	skip(t, "qemu-aarch64 is not installed (Debian: qemu-user-static)")
	return nil
}

func command(prefix []string, args ...string) *exec.Cmd {
	all := append(append([]string{}, prefix...), args...)
	cmd := exec.Command(all[0], all[1:]...)
	if len(prefix) > 0 {
		// QEMU 7.2 in user mode says that it has DC CVAP and DC CVADP, and dies of them.
		cmd.Env = append(os.Environ(), "SCM_NO_CVAP=1")
	}
	return cmd
}

func TestVet(t *testing.T) {
	goTool(t, "arm64", "vet", module+"scmlib", module+"scmlib/internal/...", module+"scmlib/pmap", module+"scmlib/region/api", module+"cmd/nhybrid-scm-hook")
}

// The tests of the instructions, of the format and of the structures. Left out is what starts programs of its own (they would not be arm64's) and
// what reads the address of a fault, which qemu-user does not pass on.
func TestLibrary(t *testing.T) {
	emulator := emulator(t)
	for pkg, skipped := range map[string]string{
		"scmlib/internal/persist": "^$", "scmlib/pmap": "^$", "scmlib": "TestKill|TestMutants|TestCrash|TestMediaError",
	} {
		t.Run(pkg, func(t *testing.T) {
			program := filepath.Join(t.TempDir(), "test")
			goTool(t, "arm64", "test", "-c", "-o", program, module+pkg)
			cmd := command(emulator, program, "-test.short", "-test.v", "-test.skip", skipped)
			cmd.Dir = strings.TrimSpace(goTool(t, "arm64", "list", "-f", "{{.Dir}}", module+pkg))
			require.Contains(t, run(t, cmd), "--- PASS", "nothing ran")
		})
	}
}

// Regions go between Go and C, and between arm64 and this machine.
func TestLedger(t *testing.T) {
	emulator := emulator(t)
	dir := t.TempDir()
	compiler, tools := "gcc", []string{}
	if runtime.GOARCH != "arm64" {
		compiler, tools = "aarch64-linux-gnu-gcc", []string{"LD=aarch64-linux-gnu-ld", "OBJCOPY=aarch64-linux-gnu-objcopy"}
	}
	if _, err := exec.LookPath(compiler); err != nil {
		skip(t, compiler+" is not installed (Debian: gcc-aarch64-linux-gnu libc6-dev-arm64-cross)")
	}
	library := strings.TrimSpace(goTool(t, runtime.GOARCH, "list", "-f", "{{.Dir}}", module+"scmlib/c"))
	run(t, exec.Command("make", append([]string{"-s", "-C", library, "O=" + dir, "CC=" + compiler, filepath.Join(dir, "libscm.a")}, tools...)...))
	run(t, exec.Command(compiler, "-static", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-I", filepath.Join(library, "include"), "-o", filepath.Join(dir, "c"),
		filepath.Join(library, "../../integration/pmem/ledgerc/ledger.c"), filepath.Join(dir, "libscm.a"), "-pthread"))
	goTool(t, "arm64", "build", "-o", filepath.Join(dir, "go"), module+"integration/pmem/ledger")
	goTool(t, runtime.GOARCH, "build", "-o", filepath.Join(dir, "own"), module+"integration/pmem/ledger")

	region := filepath.Join(dir, "region")
	const steps = 50
	last := 0
	for range 2 {
		for _, ledger := range [][]string{append(emulator, filepath.Join(dir, "c")), append(emulator, filepath.Join(dir, "go")), {filepath.Join(dir, "own")}} {
			last = work(t, ledger, region, last, steps)
		}
	}
}

// work lets a ledger go on from what the last one has left, kills it after some promises, and returns the last of them.
func work(t *testing.T, ledger []string, region string, last, steps int) int {
	t.Helper()
	port := filepath.Join(t.TempDir(), "port")
	run(t, exec.Command("mkfifo", port))
	cmd := command(ledger[:len(ledger)-1], ledger[len(ledger)-1], "work", port, region)
	out := &strings.Builder{}
	cmd.Stdout, cmd.Stderr = out, out
	require.NoError(t, cmd.Start())
	// Both ways, so that the open waits for nobody.
	f, err := os.OpenFile(port, os.O_RDWR, 0)
	require.NoError(t, err)
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(ended)
		f.Close()
	}()
	first, count := 0, 0
	for lines := bufio.NewScanner(f); count < last+steps && lines.Scan(); {
		n := 0
		_, err := fmt.Sscan(lines.Text(), &n)
		require.NoError(t, err)
		if first == 0 {
			first = n
		}
		count = n
	}
	_ = cmd.Process.Kill()
	<-ended
	require.GreaterOrEqual(t, count, last+steps, "%v: %s", ledger, out)
	require.Greater(t, first, last, "%v has lost transactions", ledger)
	return count
}
