// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package lab is what benchmarks have in common: a scratch directory, programs that a build does not change meanwhile, and
// looks at devices and processes.
package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/integration/rig"
)

// ShellCommand is the command line of this program, as it can be typed again.
func ShellCommand() string {
	words := []string{"go", "run", "./integration/bench"}
	for _, a := range os.Args[1:] {
		if strings.ContainsAny(a, " '\"\\$`*?[]{}()<>|&;#~\t\n") || a == "" {
			a = "'" + strings.ReplaceAll(a, "'", `'\''`) + "'"
		}
		words = append(words, a)
	}
	return strings.Join(words, " ")
}

// Scratch makes a directory with a short path, since sockets will stand in it, and takes down those of processes that
// were killed.
func Scratch() (string, error) {
	prefix := filepath.Join(os.TempDir(), "nhbench-")
	old, err := filepath.Glob(prefix + "*")
	if err != nil {
		return "", err
	}
	for _, dir := range old {
		pid, err := strconv.Atoi(strings.TrimPrefix(dir, prefix))
		if err == nil && errors.Is(unix.Kill(pid, 0), unix.ESRCH) {
			if err := rig.Remove(dir); err != nil {
				return "", fmt.Errorf("take down what an earlier run left: %w", err)
			}
		}
	}
	dir := prefix + strconv.Itoa(os.Getpid())
	return dir, os.MkdirAll(dir, 0o711)
}

// binaries are the programs that a rig starts.
var binaries = []string{"containerd", "containerd-shim-runc-v2", "ctr", "runc", "containerd-nhybrid-grpc", "nhybridctl"}

// FindPrograms is the directory that the rig would take the programs from.
func FindPrograms(bin string) (string, error) {
	for _, dir := range []string{bin, os.Getenv("NHYBRID_BIN")} {
		if dir != "" {
			return filepath.Abs(dir)
		}
	}
	return filepath.Abs("bin")
}

// CopyPrograms takes the programs away from a build that may come along while they are measured.
func CopyPrograms(from, to string) error {
	if err := os.MkdirAll(to, 0o755); err != nil {
		return err
	}
	for _, name := range binaries {
		b, err := os.ReadFile(filepath.Join(from, name))
		if err != nil {
			return fmt.Errorf("%w: run `make tools build` first, or say --bin", err)
		}
		if err := os.WriteFile(filepath.Join(to, name), b, 0o755); err != nil {
			return err
		}
	}
	return nil
}

// Choose takes the wanted names out of the known ones, in the order of the latter. None wanted means all.
func Choose(what string, wanted, known []string) ([]string, error) {
	if len(wanted) == 0 {
		return known, nil
	}
	for _, w := range wanted {
		if !slices.Contains(known, w) {
			return nil, fmt.Errorf("unknown %s %q: choose from %s", what, w, strings.Join(known, ", "))
		}
	}
	return slices.DeleteFunc(slices.Clone(known), func(k string) bool { return !slices.Contains(wanted, k) }), nil
}
