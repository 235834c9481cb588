// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build integration

package static_test

import (
	"bufio"
	"bytes"
	"context"
	"debug/elf"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func fields(s string) []string { return strings.Fields(s) }

// stack unpacks layers, each distinct one once, and mounts images out of them.
type stack struct {
	dir  string
	done map[string]string // digest to directory
}

// mount makes the image's root filesystem and returns it with the directories of its layers, bottom first.
func (s *stack) mount(t *testing.T, img v1.Image) (root string, layers []string) {
	all, err := img.Layers()
	require.NoError(t, err)
	for _, l := range all {
		id, err := l.DiffID()
		require.NoError(t, err)
		dir, ok := s.done[id.Hex]
		if !ok {
			dir = filepath.Join(s.dir, fmt.Sprint("layer-", len(s.done)))
			require.NoError(t, os.Mkdir(dir, 0o755))
			r, err := l.Uncompressed()
			require.NoError(t, err)
			_, err = archive.Apply(t.Context(), dir, r, archive.WithConvertWhiteout(archive.OverlayConvertWhiteout))
			_, rest := io.Copy(io.Discard, r)
			require.NoError(t, err)
			require.NoError(t, rest)
			require.NoError(t, r.Close())
			s.done[id.Hex] = dir
		}
		layers = append(layers, dir)
	}
	work, err := os.MkdirTemp(s.dir, "run-")
	require.NoError(t, err)
	for _, d := range []string{"root", "upper", "work"} {
		require.NoError(t, os.Mkdir(filepath.Join(work, d), 0o755))
	}
	root = filepath.Join(work, "root")
	lower := ""
	for i := len(layers) - 1; i >= 0; i-- {
		lower += layers[i] + ":"
	}
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work", strings.TrimSuffix(lower, ":"), work, work)
	require.NoError(t, unix.Mount("overlay", root, "overlay", 0, options))
	t.Cleanup(func() {
		require.NoError(t, unix.Unmount(root, 0))
		require.NoError(t, os.RemoveAll(work))
	})
	return root, layers
}

// start runs the image's command in the root under strace, in namespaces of its own, until it is ready.
// Arguments: ROOT LOG READY VARIABLE=…… COMMAND…
const startScript = `set -u
ROOT=$1 LOG=$2 READY=$3; shift 3
ip link set lo up
mkdir -p "$ROOT/proc" "$ROOT/dev" "$ROOT/tmp" "$ROOT/run"
mount -t proc proc "$ROOT/proc"
mount -t tmpfs tmpfs "$ROOT/tmp"
mount --rbind /dev "$ROOT/dev"
# What unshare itself opens lies outside the root.
strace -f -qq -y -s 4096 -e trace=open,openat,openat2,execve,execveat -e signal=none -o "$LOG" \
	env -i "$@" </dev/null >"$LOG.out" 2>&1 &
pid=$!
if [ -z "$READY" ]; then
	wait $pid; exit
fi
for i in $(seq 600); do
	if (eval "$READY") >/dev/null 2>&1; then exit 0; fi
	kill -0 $pid || exit 1
	sleep 0.1
done
exit 1
`

// opened are the regular files of the image that a start opens, by strace, as paths without the leading slash.
func opened(t *testing.T, root string, s subject) map[string]bool {
	log := filepath.Join(t.TempDir(), "trace")
	env := s.Config.Env
	if env == nil {
		env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	}
	env = append([]string{"HOME=/root"}, env...) // as runc sets it
	dir := s.Config.WorkingDir
	if dir == "" {
		dir = "/"
	}
	command := append(append([]string{}, s.Config.Entrypoint...), s.Config.Cmd...)
	args := append([]string{"--mount", "--pid", "--net", "--fork", "--kill-child=SIGKILL", "bash", "-c", startScript, "bash", root, log, s.ready}, env...)
	args = append(append(args, "unshare", "--root="+root, "--wd="+dir), command...)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	before := map[string]bool{}
	require.NoError(t, filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			before[strings.TrimPrefix(path, root+"/")] = true
		}
		return err
	}))
	out, err := exec.CommandContext(ctx, "unshare", args...).CombinedOutput()
	said, _ := os.ReadFile(log + ".out")
	require.NoError(t, err, "%s%s", out, said)
	data, err := os.ReadFile(log)
	require.NoError(t, err)
	if keep := os.Getenv("NHYBRID_KEEP_TRACES"); keep != "" {
		require.NoError(t, os.WriteFile(filepath.Join(keep, s.Name+".strace"), data, 0o644))
	}
	seen := parseTrace(t, data, root)
	for path := range seen {
		if !before[path] || path == "etc/hosts" || path == "etc/hostname" || path == "etc/resolv.conf" { // the runtime's
			delete(seen, path) // made by the start, or no regular file
		}
	}
	return seen
}

var (
	openLine    = regexp.MustCompile(`(?m)(?:open|openat|openat2)(?:\(| resumed).*= \d+<([^<>]*)>$`)
	execLine    = regexp.MustCompile(`^(\d+) +execve\("([^"]*)", .*(= 0|<unfinished \.\.\.>)$`)
	resumedLine = regexp.MustCompile(`^(\d+) +<\.\.\. execve resumed>.*= 0$`)
)

// parseTrace reads strace's log. Programs are added with what the kernel opens for them, which no system call shows.
func parseTrace(t *testing.T, log []byte, root string) map[string]bool {
	seen, pending := map[string]bool{}, map[string]string{}
	for _, m := range openLine.FindAllSubmatch(log, -1) {
		if path, ok := strings.CutPrefix(string(m[1]), root+"/"); ok {
			seen[path] = true
		}
	}
	lines := bufio.NewScanner(bytes.NewReader(log))
	lines.Buffer(nil, 1<<20)
	inside := false
	for lines.Scan() {
		line := lines.Bytes()
		path := ""
		if m := resumedLine.FindSubmatch(line); m != nil {
			path = pending[string(m[1])]
		} else if m := execLine.FindSubmatch(line); m != nil && string(m[3]) == "= 0" {
			path = string(m[2])
		} else if m != nil {
			pending[string(m[1])] = string(m[2])
		}
		if path == "" {
			continue
		}
		// env and unshare of the host come first, by the host's paths.
		if !inside && (strings.HasSuffix(path, "/env") || strings.HasSuffix(path, "/unshare")) {
			continue
		}
		inside = true
		addProgram(t, seen, root, path, 0)
	}
	require.NoError(t, lines.Err())
	return seen
}

func addProgram(t *testing.T, seen map[string]bool, root, path string, depth int) {
	real := resolve(t, root, path)
	if real == "" || depth > 4 {
		return
	}
	seen[real] = true
	full := filepath.Join(root, real)
	head, err := os.ReadFile(full)
	require.NoError(t, err)
	if line, ok := bytes.CutPrefix(head, []byte("#!")); ok {
		line, _, _ = bytes.Cut(line, []byte("\n"))
		addProgram(t, seen, root, strings.Fields(string(line))[0], depth+1)
		return
	}
	f, err := elf.NewFile(bytes.NewReader(head))
	if err != nil {
		return
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			interp, err := io.ReadAll(p.Open())
			require.NoError(t, err)
			addProgram(t, seen, root, strings.TrimRight(string(interp), "\x00"), depth+1)
		}
	}
}

// resolve follows links as the kernel does for a process in the root. "": not there.
func resolve(t *testing.T, root, path string) string {
	dir, err := unix.Open(root, unix.O_PATH|unix.O_CLOEXEC, 0)
	require.NoError(t, err)
	defer unix.Close(dir)
	fd, err := unix.Openat2(dir, path, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT})
	if err != nil {
		return ""
	}
	defer unix.Close(fd)
	real, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	require.NoError(t, err)
	return strings.TrimPrefix(real, root+"/")
}
