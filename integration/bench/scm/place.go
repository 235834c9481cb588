// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package scm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// place is where a program and its data are.
type place string

const (
	onHost    place = "host"             // a region of the host, mapped
	inMapping place = "container"        // the container's own region, mapped
	inVolume  place = "volume"           // a file on a volume
	inStorage place = "storage"          // a file in the container's root filesystem
	inDRAM    place = "dram"             // ordinary memory, in a container
	onFiles   place = "host file"        // a file of the host on a filesystem
	onMemory  place = "host memory file" // a file of the host on the memory that others map
)

var places = []place{onHost, inMapping, inVolume, inStorage, inDRAM}

const (
	volumePath = "/scm"
	// here stands in arguments for the directory of a place in which a program may make files.
	here = "HERE"
)

// start is what a program is started with.
type start struct {
	place place
	id    string   // unique, of the container or volume
	size  string   // of its region, "256m" say
	env   []string // "NAME=value"
	more  []string // arguments of ctr run
	args  []string // the name of the program, and its arguments
}

// command prepares a program at a place, with the environment by which the libraries find their region. Regions, files and containers are new.
// cleanup removes what is not removed with the container, once the program has ended.
func (s *stand) command(ctx context.Context, p start) (cmd *exec.Cmd, cleanup func() error, err error) {
	switch p.place {
	case onHost:
		return s.hostRegion(ctx, p)
	case onFiles, onMemory:
		dir := filepath.Join(s.filesDir(), p.id)
		if p.place == onMemory {
			dir = filepath.Join(s.bytesDir(), p.id)
		}
		words, leave, err := s.grouped(p, dir)
		if err != nil {
			return nil, nil, err
		}
		cleanup = func() error { return errors.Join(leave(), os.RemoveAll(dir)) }
		if err := os.Mkdir(dir, 0o700); err != nil {
			return nil, nil, errors.Join(err, cleanup())
		}
		return exec.CommandContext(ctx, words[0], words[1:]...), cleanup, nil
	}
	run, env, dir := []string{"run", "--rm"}, []string{"SCM_SIZE=" + p.size}, "/"
	cleanup = func() error { return nil }
	switch p.place {
	case inMapping:
		run = append(run, "--device", s.kind+"="+p.size)
		env = []string{"SCM_MODE=mapping"}
	case inVolume:
		volume := filepath.Join(s.filesDir(), p.id)
		if err := os.Mkdir(volume, 0o700); err != nil {
			return nil, nil, err
		}
		cleanup = func() error { return os.RemoveAll(volume) }
		run = append(run, "--mount", "type=bind,src="+volume+",dst="+volumePath+",options=rbind:rw")
		env, dir = append(env, "SCM_MODE=volume", "SCM_REGION="+volumePath+"/region"), volumePath
	case inStorage:
		env = append(env, "SCM_MODE=storage", "SCM_REGION=/region")
	case inDRAM:
		env = append(env, "SCM_MODE=dram")
	}
	for _, e := range append(env, p.env...) {
		run = append(run, "--env", e)
	}
	run = slices.Concat(run, p.more, []string{s.rig.Ref(imageName), p.id, "/bench/" + p.args[0]}, located(p.args[1:], dir))
	cmd, err = s.rig.Command(ctx, "ctr", run...)
	return cmd, cleanup, err
}

// hostRegion starts a program with a volume of the store, as a container would have it.
func (s *stand) hostRegion(ctx context.Context, p start) (*exec.Cmd, func() error, error) {
	p.env = append([]string{"SCM_MODE=mapping"}, p.env...)
	words, leave, err := s.grouped(p, s.bytesDir())
	if err != nil {
		return nil, nil, err
	}
	if _, err := s.rig.Nhybridctl(ctx, "scm", "create", p.id, "--size", p.size); err != nil {
		return nil, nil, errors.Join(err, leave())
	}
	cleanup := func() error {
		_, err := s.rig.Nhybridctl(context.WithoutCancel(ctx), "scm", "rm", p.id)
		return errors.Join(err, leave())
	}
	cmd, err := s.rig.Command(ctx, "nhybridctl", append([]string{"scm", "attach", p.id, "--"}, words...)...)
	if err != nil {
		return nil, nil, errors.Join(err, cleanup())
	}
	return cmd, cleanup, nil
}

// grouped are the words that run a program of the host in a control group of its own, as containers have one: whatever else runs on the machine then takes as much time
// from the one as from the other. env(1) sets what is for the program only, such as LD_PRELOAD.
func (s *stand) grouped(p start, dir string) (words []string, leave func() error, err error) {
	words = slices.Concat([]string{"env"}, p.env, []string{s.program(p.args[0])}, located(p.args[1:], dir))
	root := "/sys/fs/cgroup/cpu" // version 1
	if _, err := os.Stat(root); err != nil {
		root = "/sys/fs/cgroup"
	}
	group := filepath.Join(root, s.rig.Namespace, p.id) // beside those of the containers
	if err := os.MkdirAll(group, 0o755); err != nil {
		return nil, nil, fmt.Errorf("make control group: %w", err)
	}
	leave = func() error {
		if err := os.Remove(group); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("remove control group: %w", err)
		}
		return nil
	}
	return append([]string{"sh", "-c", `echo $$ >"$0/cgroup.procs" && exec "$@"`, group}, words...), leave, nil
}

// located puts the directory in.
func located(args []string, dir string) []string {
	out := slices.Clone(args)
	for i, a := range out {
		if rest, ok := strings.CutPrefix(a, here); ok {
			out[i] = filepath.Join(dir, rest)
		}
	}
	return out
}
