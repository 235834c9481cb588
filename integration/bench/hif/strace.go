// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/integration/image/catalog"
	"github.com/nhybrid/nhybrid/integration/rig"
)

// straced starts a container under strace and kills it once it is ready. It returns the paths that its processes have
// opened or executed, as they name them, and the container, which is to be removed.
func (p *place) straced(ctx context.Context, img catalog.Image, id, dir string) (_ *opened, s *started, err error) {
	log := filepath.Join(dir, id+".strace")
	defer os.Remove(log)
	var tracer *exec.Cmd
	stop := func() error {
		if tracer == nil {
			return nil
		}
		// It ends with the last process that it follows; what it wrote is whole then.
		done, cmd := make(chan struct{}), tracer
		go func() {
			_ = cmd.Wait() // its status is that of the container
			close(done)
		}()
		tracer = nil
		select {
		case <-done:
			return nil
		case <-time.After(patience):
			return errors.Join(errors.New("strace did not end with the container"), cmd.Process.Kill())
		}
	}
	defer func() {
		if err != nil {
			if s != nil {
				err = errors.Join(err, s.remove(ctx))
			}
			err = errors.Join(err, stop())
		}
	}()
	s, err = p.start(ctx, img, id, func(pid int) error {
		// The process is runc's and waits to become the program.
		tracer = exec.Command("strace", "-f", "-qq", "-y", "-s", "4096", "-e", "trace=open,openat,openat2,creat,execve,execveat",
			"-e", "signal=none", "-o", log, "-p", strconv.Itoa(pid))
		var said strings.Builder
		tracer.Stderr = &said
		if err := tracer.Start(); err != nil {
			tracer = nil
			return fmt.Errorf("start strace: %w", err)
		}
		wait, cancel := context.WithTimeout(ctx, patience)
		defer cancel()
		return rig.Await(wait, func(context.Context) error { return attached(pid) })
	})
	if err != nil {
		return nil, nil, err
	}
	if err := s.kill(ctx); err != nil {
		return nil, s, err
	}
	if err := stop(); err != nil {
		return nil, s, err
	}
	data, err := os.ReadFile(log)
	if err != nil {
		return nil, s, err
	}
	return parseStrace(data), s, nil
}

// attached says if every thread of a process is traced.
func attached(pid int) error {
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil {
		return err
	}
	if len(threads) == 0 {
		return fmt.Errorf("process %d is gone", pid)
	}
	for _, path := range threads {
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if bytes.Contains(b, []byte("\nTracerPid:\t0\n")) {
			return fmt.Errorf("%s: not traced yet", path)
		}
	}
	return nil
}

// opened is what a log of strace says.
type opened struct {
	// files were opened for their content: not as a mere path, and not to be made empty at once.
	files []string
	// programs were executed; the kernel opens them, what follows #!, and the ELF interpreter.
	programs []string
}

var (
	traceLine = regexp.MustCompile(`^(\d+) +(.*)$`)
	openCall  = regexp.MustCompile(`^(open|openat|openat2|creat)\(.* = \d+<(.*)>$`)
	execCall  = regexp.MustCompile(`^execve(?:at)?\((?:AT_FDCWD<[^>]*>, )?"((?:[^"\\]|\\.)*)", .* = 0$`)
	resumed   = regexp.MustCompile(`^<\.\.\. \w+ resumed>(.*)$`)
	notRead   = regexp.MustCompile(`\bO_(PATH|TRUNC|DIRECTORY)\b`)
	escape    = regexp.MustCompile(`\\([0-7]{1,3}|x[0-9a-f]{2}|.)`)
)

// parseStrace puts calls that were interrupted together again.
func parseStrace(log []byte) *opened {
	o := &opened{}
	pending := map[string]string{}
	lines := bufio.NewScanner(bytes.NewReader(log))
	lines.Buffer(nil, 1<<22)
	for lines.Scan() {
		m := traceLine.FindStringSubmatch(lines.Text())
		if m == nil {
			continue
		}
		pid, call := m[1], m[2]
		if head, ok := strings.CutSuffix(call, " <unfinished ...>"); ok {
			pending[pid] = head
			continue
		}
		if tail := resumed.FindStringSubmatch(call); tail != nil {
			call = pending[pid] + tail[1]
			delete(pending, pid)
		}
		if m := openCall.FindStringSubmatch(call); m != nil && m[1] != "creat" && !notRead.MatchString(call) {
			o.files = append(o.files, unescape(strings.TrimSuffix(m[2], "(deleted)")))
		} else if m := execCall.FindStringSubmatch(call); m != nil {
			o.programs = append(o.programs, unescape(m[1]))
		}
	}
	return o
}

// unescape undoes what strace does to unusual bytes.
func unescape(s string) string {
	return escape.ReplaceAllStringFunc(s, func(e string) string {
		e = e[1:]
		switch {
		case e[0] >= '0' && e[0] <= '7':
			if n, err := strconv.ParseUint(e, 8, 8); err == nil {
				return string([]byte{byte(n)})
			}
		case e[0] == 'x' && len(e) == 3:
			if n, err := strconv.ParseUint(e[1:], 16, 8); err == nil {
				return string([]byte{byte(n)})
			}
		case strings.Contains("tnvfr", e):
			return map[string]string{"t": "\t", "n": "\n", "v": "\v", "f": "\f", "r": "\r"}[e]
		}
		return e
	})
}

// resolve follows links as the kernel does for a process with the given root, and returns the path below it. "": no such
// file.
func resolve(root, path string) (string, error) {
	dir, err := unix.Open(root, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("open %q: %w", root, err)
	}
	defer unix.Close(dir)
	fd, err := unix.Openat2(dir, path, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT})
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return "", nil
	} else if err != nil {
		return "", fmt.Errorf("resolve %q: %w", path, err)
	}
	defer unix.Close(fd)
	real, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return "", err
	}
	return strings.TrimPrefix(real, root+"/"), nil
}
