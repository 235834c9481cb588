//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/integration/image"
	"github.com/nhybrid/nhybrid/integration/rig"
)

func symlink(name, target string) image.Entry {
	return image.Entry{Header: tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: target, Mode: 0o777}}
}

// A name is any bytes. All that answers for an image answers for such names: in text they are quoted.
func TestNamesOfAnyBytes(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{DaemonArgs: hot("--set", "placement.policy=hdd", "--set", "hot.predict=off")})
	names := []string{"n/good", "n/bad\xff", "n/caf\xe9/x", "n/new\nline", "n/tab\there", "n/esc\x1b[31m", `n/q"uote\`, "n/ sp ", "n/" + strings.Repeat("a", 255), "n/" + strings.Repeat("\xc3\xa9", 127)}
	entries := []image.Entry{folder("n"), folder("n/caf\xe9"), symlink("n/ln", "bad\xff"), symlink("n/ln2", "caf\xe9/x")}
	for i, name := range names {
		entries = append(entries, plain(name, []byte(strings.Repeat(fmt.Sprint(i), 1000))))
	}
	_, err := r.PushBusybox(ctx, "names:1", ofFiles(t, entries...))
	require.NoError(t, err)
	require.NoError(t, r.Pull(ctx, "names:1"))
	ref := r.Ref("names:1")
	sleeper(t, r, "names:1", "names")
	for i, name := range names {
		data, err := os.ReadFile(rootfs(t, r, "names") + "/" + name) // containerd's API takes no such argument
		require.NoError(t, err)
		require.Equal(t, strings.Repeat(fmt.Sprint(i), 1000), string(data), "%q", name)
	}
	require.Equal(t, strings.Repeat("1", 1000), execute(t, r, "names", "cat", "/n/ln"))
	await(t, func(ctx context.Context) error {
		out, err := r.Nhybridctl(ctx, "profile", "show", "--json", ref)
		if err == nil && !strings.Contains(out, `"traced"`) {
			err = errors.New(out)
		}
		return err
	})
	for _, name := range append([]string{"n/ln", "n/ln2"}, names...) {
		for _, form := range [][]string{{"why", ref, "/" + name}, {"why", "--json", ref, "/" + name}} {
			out, err := r.Nhybridctl(ctx, form...)
			require.NoError(t, err, "%q", form)
			require.NotEmpty(t, out)
		}
	}
	for _, form := range [][]string{
		{"ls"}, {"ls", "--json"}, {"why", ref}, {"inspect", ref}, {"inspect", "--files", "--all", ref}, {"inspect", "--files", "--all", "--json", ref},
		{"profile", "show", ref}, {"profile", "show", "--json", ref}, {"status", "--json"}, {"du", "--json"}, {"migrate", "status", "--json"},
	} {
		out, err := r.Nhybridctl(ctx, form...)
		require.NoError(t, err, "%q", form)
		require.NotContains(t, out, "\x1b", "%q", form)
		require.True(t, strings.ToValidUTF8(out, "") == out, "%q: %q", form, out)
	}
	// A rule is text: what is none is refused with the way out.
	_, err = r.Nhybridctl(ctx, "profile", "pin", ref, "/n/bad\xff")
	require.ErrorContains(t, err, "?")
	require.NotContains(t, err.Error(), "marshal")
	steer(t, r, "profile", "pin", ref, "/n/bad?")
	steer(t, r, "profile", "pin", ref, "/n/caf*/**")
	now(t, r)
	out, err := r.Nhybridctl(ctx, "why", ref, "/n/bad\xff")
	require.NoError(t, err)
	require.Contains(t, out, "NVM")
	// They are found again through NVM, and in what a container has changed.
	require.Equal(t, strings.Repeat("2", 1000), run(t, r, "names:1", "cat", "/n/ln2"))
	execute(t, r, "names", "sh", "-ec", "mv /n/bad? /n/moved; for f in /n/caf?/x; do echo new >\"$f\"; done; for f in /n/*; do touch \"$f\"; done")
	_, err = r.Ctr(ctx, "snapshots", "commit", "names-committed", "names")
	require.NoError(t, err)
	settled(t, r)
	endSleeper(t, r, "names")
}

// What whiteouts with odd names do, containerd's own applier on overlayfs decides.
func TestOddWhiteouts(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{})
	below := ofFiles(t, folder("d"), plain("d/f", []byte("f")), plain("d/g", []byte("g")), folder("e"), plain("e/.whx", []byte("x")))
	for name, entry := range map[string]image.Entry{
		"lone": plain("d/.wh.", nil), "twice": plain("d/.wh..wh.f", nil), "dot": plain("d/.wh..", nil), "dots": plain("d/.wh...", nil),
		"plain": plain("d/.wh.f", nil), "missing": plain("d/.wh.nothing", nil), "opaque": plain("d/.wh..wh..opq", nil), "root": plain(".wh..wh..opq", nil),
		"directory": folder("d/.wh.g"), "meta": plain("d/.wh..wh.plnk", nil), "almost": plain("e/.whx", []byte("y")), "nowhere": plain("x/y/.wh.z", nil),
		"link": symlink("d/.wh.g", "f"),
	} {
		ref := name + ":1"
		_, err := r.PushBusybox(ctx, ref, below, ofFiles(t, entry), ofFiles(t, plain("last", []byte("l"))))
		require.NoError(t, err)
		_, want := r.Ctr(ctx, "images", "pull", "--plain-http", "--snapshotter", "overlayfs", r.Ref(ref))
		got := r.Pull(ctx, ref)
		require.Equal(t, want == nil, got == nil, "%s: overlayfs: %v; nhybrid: %v", name, want, got)
		if want != nil || name == "root" { // nothing is left that could run
			continue
		}
		list := func(snapshotter string) string {
			out, err := r.Ctr(ctx, "run", "--rm", "--snapshotter", snapshotter, r.Ref(ref), name+snapshotter, "sh", "-c", "ls -ld /d /e /x /x/y 2>/dev/null | cut -c1-10; find /d /e /last /x 2>/dev/null | sort")
			require.NoError(t, err)
			return out
		}
		require.Equal(t, list("overlayfs"), list("nhybrid"), name)
	}
}

// Directories deeper than any path, in a container and committed: they are packed, come home and go. In an image containerd's
// applier takes what a path can name, and so do we.
func TestDirectoriesBeyondPathMax(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	const depth = 3000
	r := newRig(t, rig.Options{})
	var entries []image.Entry
	const named = 2000
	for i := 1; i <= named; i++ {
		entries = append(entries, folder(strings.TrimSuffix(strings.Repeat("d/", i), "/")))
	}
	entries = append(entries, plain(strings.Repeat("d/", named)+"f", []byte("bottom")))
	_, err := r.PushBusybox(ctx, "deep:1", ofFiles(t, entries...))
	require.NoError(t, err)
	require.NoError(t, r.Pull(ctx, "deep:1"))
	require.Equal(t, fmt.Sprintf("%d\nbottom", named), run(t, r, "deep:1", "sh", "-c", "i=0; while cd d 2>/dev/null; do i=$((i+1)); done; echo $i; cat f"))

	_, err = r.PushBusybox(ctx, "flat:1")
	require.NoError(t, err)
	require.NoError(t, r.Pull(ctx, "flat:1"))
	sleeper(t, r, "flat:1", "digs")
	bottom := descend(t, rootfs(t, r, "digs"), depth, true) // a shell gives up at PATH_MAX
	fd, err := unix.Openat(bottom, "f", unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
	require.NoError(t, err)
	_, err = unix.Write(fd, []byte("own"))
	require.NoError(t, errors.Join(err, unix.Close(fd), unix.Close(bottom)))
	_, err = r.Ctr(ctx, "snapshots", "commit", "deep-committed", "digs")
	require.NoError(t, err)
	settled(t, r)
	for _, form := range [][]string{{"status"}, {"ls"}, {"why", "deep-committed"}, {"inspect", "deep-committed"}, {"du"}} {
		out, err := r.Nhybridctl(ctx, form...)
		require.NoError(t, err, form)
		require.NotContains(t, out, "failed", form)
		require.NotContains(t, out, "d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d", form)
	}
	root := mountedAt(t, prepare(t, r, "again", "deep-committed", nil))
	bottom = descend(t, root, depth, false)
	fd, err = unix.Openat(bottom, "f", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	require.NoError(t, err)
	own := make([]byte, 10)
	n, err := unix.Read(fd, own)
	require.NoError(t, errors.Join(err, unix.Close(fd), unix.Close(bottom), mount.UnmountAll(root, 0)))
	require.Equal(t, "own", string(own[:n]))
	endSleeper(t, r, "digs")
	for _, key := range []string{"again", "deep-committed"} {
		_, err = r.Ctr(ctx, "snapshots", "rm", key)
		require.NoError(t, err)
	}
	removeImage(t, r, "deep:1")
	removeImage(t, r, "flat:1")
	awaitEmpty(t, r)
}

// descend opens the directory so many directories d below root, and makes them if asked to.
func descend(t *testing.T, root string, depth int, create bool) int {
	t.Helper()
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	require.NoError(t, err)
	for range depth {
		if create {
			require.NoError(t, unix.Mkdirat(dir, "d", 0o755))
		}
		next, err := unix.Openat(dir, "d", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		require.NoError(t, errors.Join(err, unix.Close(dir)))
		dir = next
	}
	return dir
}
