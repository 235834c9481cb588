//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/oci"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/integration/image"
	"github.com/nhybrid/nhybrid/integration/rig"
	"github.com/nhybrid/nhybrid/integration/workload"
)

// tracedLayer holds perl and strace of this machine, with what they load.
var tracedLayer = sync.OnceValues(func() (v1.Layer, error) {
	var entries []image.Entry
	seen := map[string]bool{}
	add := func(name, from string, mode int64) error {
		if seen[name] {
			return nil
		}
		seen[name] = true
		b, err := os.ReadFile(from)
		if err != nil {
			return err
		}
		e := plain(name, b)
		e.Header.Mode = mode
		entries = append(entries, e)
		return nil
	}
	for _, program := range []string{"/usr/bin/perl", "/usr/bin/strace"} {
		if err := add(program[1:], program, 0o755); err != nil {
			return nil, err
		}
		out, err := exec.Command("ldd", program).Output()
		if err != nil {
			return nil, fmt.Errorf("libraries of %q: %w", program, err)
		}
		for _, lib := range regexp.MustCompile(`/\S+`).FindAllString(string(out), -1) {
			name := "usr/lib/x86_64-linux-gnu/" + path.Base(lib)
			if strings.HasPrefix(path.Base(lib), "ld-linux") {
				name = lib[1:]
			}
			if err := add(name, lib, 0o755); err != nil {
				return nil, err
			}
		}
	}
	const modules = "/usr/lib/x86_64-linux-gnu/perl-base"
	err := filepath.WalkDir(modules, func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		return add(p[1:], p, 0o644)
	})
	if err != nil {
		return nil, err
	}
	return image.Layer(entries)
})

// A start that opens modules, libraries and files of its own, forks, executes, and maps, with strace as the judge.
func straced(name string) string {
	return `strace -f -o /dev/shm/log -e trace=openat,open,execve perl -MPOSIX -MList::Util -MSocket -e '
		foreach (1..3) { open(F, "<", "/own/` + name + `/$_") or die $!; read F, $x, 100; close F }
		system("/bin/sh", "-c", "/bin/cat /own/` + name + `/hard >/dev/null; /own/` + name + `/tool cat /etc/group >/dev/null");
	'; cat /dev/shm/log`
}

// launcher are the files that straced needs beside those that strace sees.
var launcher = regexp.MustCompile(`^bin/busybox$|^usr/bin/strace$|^lib64/ld-linux|^usr/lib/x86_64-linux-gnu/lib[^/]*\.so|^etc/(passwd|group)$`)

var (
	straceOpen = regexp.MustCompile(`open(?:at)?\((?:AT_FDCWD, )?"([^"]+)", ([A-Z_|0-9]+)[^)]*\) += [0-9]`)
	straceExec = regexp.MustCompile(`execve\("([^"]+)".*\) += 0`)
)

// seenByStrace are the files of the image, of those that have data, that strace's log names.
func seenByStrace(t *testing.T, log string, files map[string]hotFile) (all []string) {
	t.Helper()
	open := map[string]string{}
	seen := map[string]bool{}
	for line := range strings.SplitSeq(strings.ReplaceAll(log, "\r", ""), "\n") {
		pid, rest, _ := strings.Cut(line, " ")
		rest = strings.TrimLeft(rest, " ")
		if head, ok := strings.CutSuffix(rest, " <unfinished ...>"); ok {
			open[pid] = head
			continue
		}
		if i := strings.Index(rest, " resumed>"); i >= 0 {
			rest = open[pid] + rest[i+len(" resumed>"):]
		}
		var name string
		if f := straceOpen.FindStringSubmatch(rest); f != nil && !strings.Contains(f[2], "O_DIRECTORY") {
			name = f[1]
		} else if f := straceExec.FindStringSubmatch(rest); f != nil {
			name = f[1]
		} else {
			continue
		}
		require.True(t, path.IsAbs(name), line)
		name = path.Clean(name)[1:]
		if path.Dir(name) == "bin" {
			name = "bin/busybox" // links to it
		}
		if _, ok := files[name]; ok {
			seen[name] = true
		}
	}
	for name := range seen {
		all = append(all, name)
	}
	slices.Sort(all)
	return all
}

// inView runs a container on a view: its root has no upper directory.
func inView(ctx context.Context, r *rig.Rig, name string, command ...string) (out string, err error) {
	c, err := r.Client()
	if err != nil {
		return "", err
	}
	ctx = r.Context(ctx)
	img, err := c.GetImage(ctx, r.Ref(name))
	if err != nil {
		return "", err
	}
	container, err := c.NewContainer(ctx, "view", client.WithImage(img), client.WithSnapshotter(r.Snapshotter), client.WithNewSnapshotView("view", img),
		client.WithNewSpec(oci.WithImageConfig(img), oci.WithRootFSReadonly(), oci.WithProcessArgs(command...)))
	if err != nil {
		return "", err
	}
	defer func() {
		err = errors.Join(err, container.Delete(context.WithoutCancel(ctx), client.WithSnapshotCleanup))
	}()
	var b strings.Builder
	task, err := container.NewTask(ctx, cio.NewCreator(cio.WithStreams(nil, &b, &b), cio.WithFIFODir(filepath.Join(r.Dir, "fifo"))))
	if err != nil {
		return "", err
	}
	done, err := task.Wait(ctx)
	if err != nil {
		return "", err
	}
	if err := task.Start(ctx); err != nil {
		return "", err
	}
	<-done
	_, err = task.Delete(ctx)
	return b.String(), err
}

// Whoever starts a container, all files that it opens are in the profile of its image, and none of other images, though
// they start at once.
func TestTraceOfEveryClient(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{CRI: true, DaemonArgs: []string{"--set", "hot.quiet=3s"}})
	needNerdctl(t, r)
	tools, err := tracedLayer()
	require.NoError(t, err)
	busybox, err := os.ReadFile("/bin/busybox")
	require.NoError(t, err)
	clients := map[string]func(ref, script string) (string, error){
		"ctr": func(name, script string) (string, error) {
			return r.RunContainer(ctx, name, "ctr", "sh", "-c", script)
		},
		"view": func(name, script string) (string, error) { return inView(ctx, r, name, "sh", "-c", script) },
		"userns": func(name, script string) (string, error) {
			return r.Ctr(ctx, "run", "--rm", "--uidmap", "0:100000:65536", "--gidmap", "0:200000:65536", "--remap-labels", r.Ref(name), "mapped", "sh", "-c", script)
		},
		"nerdctl": func(name, script string) (string, error) {
			return r.NerdctlRun(ctx, "--rm", "--cap-add", "SYS_PTRACE", r.Ref(name), "sh", "-c", script)
		},
		"cri": func(name, script string) (string, error) { return r.RunPod(ctx, r.Ref(name), "sh", "-c", script) },
	}
	for name := range clients {
		tool := plain("own/"+name+"/tool", busybox)
		tool.Header.Mode = 0o755
		hard := plain("own/"+name+"/hard", nil)
		hard.Header.Typeflag, hard.Header.Linkname = '1', "own/"+name+"/linked"
		var own []image.Entry
		for i := range 5 {
			own = append(own, plain(fmt.Sprintf("own/%s/%d", name, i), workload.Bytes(uint64(i), 10000)))
		}
		own = append(own, plain("own/"+name+"/linked", workload.Bytes(7, 5000)), hard, tool)
		_, err := r.PushBusybox(ctx, name+":1", tools, ofFiles(t, own...))
		require.NoError(t, err)
		if name == "cri" {
			_, err = r.Crictl(ctx, "pull", r.Ref(name+":1"))
			require.NoError(t, err)
			continue
		}
		require.NoError(t, r.Pull(ctx, name+":1"))
	}
	logs, errs := map[string]string{}, []error{}
	var mu sync.Mutex
	var all sync.WaitGroup
	for name, run := range clients {
		all.Go(func() {
			log, err := run(name+":1", straced(name))
			mu.Lock()
			defer mu.Unlock()
			logs[name] = log
			if err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", name, err))
			}
		})
	}
	all.Wait()
	require.NoError(t, errors.Join(errs...))
	for name := range clients {
		ns := r.Namespace
		if name == "cri" {
			ns = "k8s.io"
		}
		var digest string
		await(t, func(ctx context.Context) (err error) {
			digest, err = digestOf(ctx, r, ns, name+":1")
			return err
		})
		// Where the container is gone before anybody could look, the mount by which nerdctl looked users up may have been its own.
		p := awaitProfile(t, r, digest, func(s shown) error {
			if name == "nerdctl" && s.Info.Starts == 2 {
				return starts(2)(s)
			}
			return starts(1)(s)
		})
		require.Zero(t, p.Info.Incomplete)
		files := map[string]hotFile{}
		var answer struct{ Files []hotFile }
		ctl(t, r, &answer, "-n", ns, "inspect", "--files", "--all", r.Ref(name+":1"))
		for _, f := range answer.Files {
			files[f.Path] = f
		}
		// A name of a hard link counts for both.
		want := seenByStrace(t, logs[name], files)
		require.Greater(t, len(want), 10, "%s: %s", name, logs[name])
		require.Contains(t, want, "own/"+name+"/hard")
		got := p.paths()
		for _, w := range want {
			if w == "own/"+name+"/hard" {
				require.True(t, slices.Contains(got, w) || slices.Contains(got, "own/"+name+"/linked"), "%s: %q", name, got)
				continue
			}
			require.Contains(t, got, w, "%s: strace saw it", name)
		}
		for _, g := range got {
			known := slices.Contains(want, g) || launcher.MatchString(g) || g == "own/"+name+"/linked"
			require.True(t, known, "%s: %q is in the profile, but strace has not seen it; the log:\n%s", name, g, logs[name])
		}
		require.NotContains(t, got, "own/"+name+"/4")
	}
}

// digestOf is the digest of an image's manifest: of generated images, what containerd's image store says.
func digestOf(ctx context.Context, r *rig.Rig, ns, name string) (string, error) {
	c, err := r.Client()
	if err != nil {
		return "", err
	}
	img, err := c.ImageService().Get(inNamespace(ctx, ns), r.Ref(name))
	return img.Target.Digest.String(), err
}

// Ten images at once, five containers of one of them: each profile has what its own containers opened.
func TestTracesAreNotMixed(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{DaemonArgs: []string{"--set", "hot.quiet=2s", "--set", "hot.migrate=false"}})
	common := []image.Entry{}
	for i := range 30 {
		common = append(common, plain(fmt.Sprintf("common/%d", i), workload.Bytes(uint64(i), 5000)))
	}
	const images, same = 10, 5
	base := ofFiles(t, common...)
	for i := range images {
		name := fmt.Sprintf("app%d:1", i)
		_, err := r.PushBusybox(ctx, name, base, ofFiles(t, plain(fmt.Sprintf("own/%d", i), workload.Bytes(uint64(100+i), 3000))))
		require.NoError(t, err)
		require.NoError(t, r.Pull(ctx, name))
	}
	var all sync.WaitGroup
	errs := make([]error, images+same-1)
	for i := range errs {
		n, script := i, fmt.Sprintf("cat /own/%d /common/%d >/dev/null", i, i)
		if i >= images { // of the first image
			n, script = 0, fmt.Sprintf("cat /common/%d >/dev/null", 10+i)
		}
		all.Go(func() {
			_, errs[i] = r.RunContainer(ctx, fmt.Sprintf("app%d:1", n), fmt.Sprintf("c%d", i), "sh", "-c", script)
		})
	}
	all.Wait()
	require.NoError(t, errors.Join(errs...))
	for i := range images {
		want := []string{"bin/busybox", fmt.Sprintf("common/%d", i), fmt.Sprintf("own/%d", i)}
		n := int64(1)
		if i == 0 {
			n = same
			for j := range same - 1 {
				want = append(want, fmt.Sprintf("common/%d", 10+images+j))
			}
			slices.Sort(want)
		}
		p := awaitProfile(t, r, r.Ref(fmt.Sprintf("app%d:1", i)), starts(n))
		require.Equal(t, want, withoutUsers(p.paths()), "image %d", i)
	}
}

// withoutUsers leaves out what containerd reads to look up users.
func withoutUsers(paths []string) []string {
	return slices.DeleteFunc(paths, func(p string) bool { return p == "etc/passwd" || p == "etc/group" })
}

// Two images of the same layers: a start counts for the one that its container names.
func TestSameLayersOtherConfig(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{DaemonArgs: hot("--set", "hot.predict=off")})
	for _, name := range []string{"one", "two"} {
		_, err := r.PushTiny(ctx, name+":1", image.TinySpec{Runnable: true, Layers: []int64{half, half}, Config: v1.Config{Labels: map[string]string{"name": name}}})
		require.NoError(t, err)
		require.NoError(t, r.Pull(ctx, name+":1"))
	}
	require.Equal(t, topOf(t, r, "one:1"), topOf(t, r, "two:1"))
	_, err := r.Ctr(ctx, "run", "-d", r.Ref("two:1"), "s", "sh", "-c", "cat /data/0/1 >/dev/null; sleep 100000")
	require.NoError(t, err)
	p := awaitProfile(t, r, r.Ref("two:1"), starts(1))
	require.Equal(t, []string{"bin/busybox", "data/0/1"}, withoutUsers(p.paths()))
	_, err = r.Nhybridctl(ctx, "profile", "show", r.Ref("one:1"))
	require.ErrorContains(t, err, "not found")
	endSleeper(t, r, "s")
}
