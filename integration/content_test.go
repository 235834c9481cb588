//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/integration/image"
	"github.com/nhybrid/nhybrid/integration/rig"
)

// file is all that can be told of one file by looking at it.
type file struct {
	Mode     uint32
	UID, GID uint32
	Rdev     uint64
	Size     int64 // not of directories, whose size is the filesystem's affair
	Sec      int64
	Nsec     int64
	Xattrs   string
	Content  string // hash of a regular file, target of a symlink
	Links    string // all names of it, where it has several
}

// imageTime is the latest time in generated images, in seconds.
const imageTime = 1_700_000_000

// look reads a whole tree.
func look(t *testing.T, root string) map[string]file {
	t.Helper()
	files := map[string]file{}
	inodes := map[uint64][]string{}
	require.NoError(t, filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(root, path)
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return fmt.Errorf("stat %q: %w", path, err)
		}
		f := file{Mode: st.Mode, UID: st.Uid, GID: st.Gid, Rdev: st.Rdev, Sec: st.Mtim.Sec, Nsec: st.Mtim.Nsec}
		if st.Mode&unix.S_IFMT == unix.S_IFDIR && st.Mtim.Sec > imageTime {
			// Not from the image: a directory that the layer does not list was made, or its content changed, on unpacking.
			f.Sec, f.Nsec = 0, 0
		}
		if f.Xattrs, err = xattrs(path); err != nil {
			return err
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			f.Size, f.Content = st.Size, fmt.Sprintf("%x", sha256.Sum256(b))
			inodes[st.Ino] = append(inodes[st.Ino], name)
		case unix.S_IFLNK:
			if f.Content, err = os.Readlink(path); err != nil {
				return err
			}
		case unix.S_IFDIR:
		default:
			inodes[st.Ino] = append(inodes[st.Ino], name)
		}
		files[name] = f
		return nil
	}))
	for _, names := range inodes {
		slices.Sort(names)
		for _, n := range names {
			f := files[n]
			f.Links = strings.Join(names, " ")
			files[n] = f
		}
	}
	return files
}

// xattrs writes the extended attributes of a file itself.
func xattrs(path string) (string, error) {
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, buf)
	if err != nil {
		return "", fmt.Errorf("list xattrs of %q: %w", path, err)
	}
	var all []string
	for _, name := range strings.Split(string(buf[:n]), "\x00") {
		if name == "" {
			continue
		}
		value := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			return "", fmt.Errorf("read xattr %q of %q: %w", name, path, err)
		}
		all = append(all, fmt.Sprintf("%s=%x", name, value[:n]))
	}
	slices.Sort(all)
	return strings.Join(all, " "), nil
}

// An image looks the same through nhybrid as through overlayfs, whichever way it was unpacked.
func TestContentEqualsOverlayfs(t *testing.T) {
	t.Parallel()
	for _, unpacks := range []int{1, 3} {
		t.Run(fmt.Sprintf("unpacks=%d", unpacks), func(t *testing.T) {
			t.Parallel()
			ctx := soon(t)
			r := newRig(t, rig.Options{ConcurrentUnpacks: unpacks, DaemonArgs: lass})
			spec := image.TinySpec{Seed: 3, Runnable: true, Nasty: true, Layers: []int64{2 * half, 2 * half, 2 * half, 2 * half}}
			img, err := r.PushTiny(ctx, "nasty:1", spec)
			require.NoError(t, err)
			digests := blobs(t, img)
			// Layer 2 last, so that both tiers get some.
			last := r.Link.Hold(digests[2], 1000)
			defer last()
			wait := start(func() error { return r.Pull(ctx, "nasty:1") })
			awaitStored(t, r, but(digests, 2)...)
			last()
			require.NoError(t, wait())
			// Unpacked in sequence: in parallel, containerd's applier gives implied directories other modes.
			plain := rig.New(t, rig.Options{NoDaemon: true})
			_, err = plain.PushTiny(ctx, "nasty:1", spec)
			require.NoError(t, err)
			require.NoError(t, plain.Pull(ctx, "nasty:1"))
			require.Equal(t, only(2, 5), tiers(inspect(t, r, "nasty:1")))

			want := look(t, mounted(t, plain, "overlayfs", "nasty:1"))
			got := look(t, mounted(t, r, "nhybrid", "nasty:1"))
			require.Greater(t, len(want), 100)
			same(t, want, got)

			// And from within a container.
			out, err := r.RunContainer(ctx, "nasty:1", "c", "sh", "-c",
				"stat -c '%a %u:%g %s %Y' /nasty/3/setgid /nasty/3/owned; ls /nasty/2/opaque; cat /nasty/0/becomes-file; test -e /nasty/1/removed || echo gone; readlink /nasty/3/relative; cat /nasty/3/relative; stat -c '%F %t %T' /nasty/3/null")
			require.NoError(t, err)
			require.Equal(t, "2755 0:0 10 1700000000\n640 1234567:7654321 5 1700000000\nnew\nfilegone\ndir/inside\ninsidecharacter special file 1 3", out)
		})
	}
}

// A layer may name a file and not the directories above it: they have the attributes that the layers below give them, in
// whatever order layers are unpacked, and by whichever applier.
func TestImpliedDirectories(t *testing.T) {
	t.Parallel()
	for _, unpacks := range []int{1, 3} {
		for _, noDiffer := range []bool{false, true} {
			t.Run(fmt.Sprintf("unpacks=%d, no differ=%v", unpacks, noDiffer), func(t *testing.T) {
				t.Parallel()
				ctx := soon(t)
				r := newRig(t, rig.Options{ConcurrentUnpacks: unpacks, NoDiffer: noDiffer, DaemonArgs: lass})
				below := ofFiles(t, image.Entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: "own/", Mode: 0o1750, Uid: 5, Gid: 6}}, plain("own/below", []byte("b")))
				above := ofFiles(t, plain("own/deep/above", []byte("a")))
				img, err := r.PushBusybox(ctx, "app:1", below, above)
				require.NoError(t, err)
				digests := blobs(t, img)
				release := r.Link.Hold(digests[1], 1) // what is above comes first
				defer release()
				wait := start(func() error { return r.Pull(ctx, "app:1") })
				awaitStored(t, r, but(digests, 1)...)
				release()
				require.NoError(t, wait())
				require.Equal(t, "5:6 1750 /own\n0:0 755 /own/deep\nab", run(t, r, "app:1", "sh", "-c", "stat -c '%u:%g %a %n' /own /own/deep; cat /own/deep/above /own/below"))
			})
		}
	}
}

// What a container changes is copied up right, and the layers stay as they were.
func TestCopyUp(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{DaemonArgs: lass})
	_, err := r.PushTiny(ctx, "nasty:1", image.TinySpec{Runnable: true, Nasty: true, Layers: []int64{half, half}})
	require.NoError(t, err)
	require.NoError(t, r.Pull(ctx, "nasty:1"))
	before := look(t, mounted(t, r, "nhybrid", "nasty:1"))
	out, err := r.RunContainer(ctx, "nasty:1", "c", "sh", "-c", `set -e
		chmod 700 /nasty/1/setuid; echo more >>/nasty/1/owned; rm -r /nasty/1/dir; mv /data/shared /data/moved; ln /nasty/1/empty /nasty/1/again
		mv /nasty/1/opaque /nasty/1/renamed
		stat -c %a /nasty/1/setuid; stat -c %u /nasty/1/owned; cat /nasty/1/owned; ls /data; cat /data/moved; ls /nasty/1/renamed; stat -c %h /nasty/1/again`)
	require.NoError(t, err)
	require.Equal(t, "700\n1234567\nownedmore\n0\n1\nmoved\n1\nold\n2", out)
	require.Equal(t, before, look(t, mounted(t, r, "nhybrid", "nasty:1")))
}

// Attributes by which overlayfs itself finds its way are an image's way into the data of others: they must not
// reach the tree, by whatever prefix.
func TestHostileLayerPointsNowhere(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{DaemonArgs: lass})
	// The secret of another image.
	secret, err := image.Layer([]image.Entry{
		{Header: tar.Header{Typeflag: tar.TypeDir, Name: "etc/", Mode: 0o755}},
		{Header: tar.Header{Name: "etc/shadow", Mode: 0o600}, Data: bytes.Repeat([]byte("secret"), 100)},
	})
	require.NoError(t, err)
	victim, err := image.Busybox(secret)
	require.NoError(t, err)
	require.NoError(t, r.Push(ctx, "victim:1", victim))
	require.NoError(t, r.Pull(ctx, "victim:1"))
	id := inspect(t, r, "victim:1")[1].Layer

	// One that stands in the metadata, two in data files.
	own := func(j int) []byte { return bytes.Repeat([]byte("my own"), 1+100*j) }
	entries := []image.Entry{}
	for i, prefix := range []string{"trusted.overlay.", "user.overlay.", "trusted.overlay.overlay.", "user.overlay.overlay."} {
		for j, target := range []string{"/" + id + "/01/1", "shadow", "/../../../../etc/passwd"} {
			entries = append(entries, image.Entry{Header: tar.Header{
				Name: fmt.Sprintf("window-%d-%d", i, j), Mode: 0o644,
				PAXRecords: map[string]string{
					"SCHILY.xattr." + prefix + "metacopy": "\x00", "SCHILY.xattr." + prefix + "redirect": target,
					"SCHILY.xattr.user.honest": "yes",
				},
			}, Data: own(j)})
		}
		entries = append(entries, image.Entry{Header: tar.Header{
			Typeflag: tar.TypeDir, Name: fmt.Sprintf("dir-%d/", i), Mode: 0o755,
			PAXRecords: map[string]string{
				"SCHILY.xattr." + prefix + "opaque": "y", "SCHILY.xattr." + prefix + "redirect": "/etc",
				"SCHILY.xattr." + prefix + "origin": "x", "SCHILY.xattr." + prefix + "whiteouts": "y",
			},
		}})
	}
	evil, err := image.Layer(entries)
	require.NoError(t, err)
	attack, err := image.Busybox(evil)
	require.NoError(t, err)
	require.NoError(t, r.Push(ctx, "attack:1", attack))
	if err := r.Pull(ctx, "attack:1"); err != nil {
		t.Fatalf("pull: %v", err)
	}
	files := look(t, mounted(t, r, "nhybrid", "attack:1"))
	honest := 0
	for name, f := range files {
		require.NotContains(t, f.Xattrs, "overlay.", "%q", name)
		if strings.HasPrefix(name, "window-") {
			require.Equal(t, fmt.Sprintf("%x", sha256.Sum256(own(int(name[len(name)-1]-'0')))), f.Content, "%q", name)
			require.Equal(t, "user.honest=796573", f.Xattrs, "%q", name)
			honest++
		}
	}
	require.Equal(t, 12, honest)
	require.NotContains(t, files, "dir-0/shadow")
	require.NotContains(t, files, "dir-0/passwd")

	// The view by itself has no attribute but its own: each file leads to its own layer.
	layers := inspect(t, r, "attack:1")
	views := viewsOf(t, r)
	require.NotEmpty(t, views)
	led := 0
	for _, view := range views {
		require.NoError(t, filepath.WalkDir(filepath.Join(view, "t"), func(path string, _ fs.DirEntry, err error) error {
			if err != nil || !strings.HasPrefix(filepath.Base(path), "window-") && !strings.HasPrefix(filepath.Base(path), "dir-") {
				return err
			}
			all, err := xattrs(path)
			require.NotContains(t, all, "user.overlay")
			for a := range strings.FieldsSeq(all) {
				if strings.HasPrefix(a, "trusted.overlay.redirect=") {
					require.True(t, strings.HasPrefix(a, fmt.Sprintf("trusted.overlay.redirect=%x", "/"+layers[1].Layer+"/")), a)
					led++
				}
			}
			return err
		}))
	}
	require.Equal(t, 8, led)

	// The ready-made one, on a container's own terms.
	_, err = r.PushTiny(ctx, "hostile:1", image.TinySpec{Runnable: true, Hostile: true, Layers: []int64{half, half}})
	require.NoError(t, err)
	require.NoError(t, r.Pull(ctx, "hostile:1"))
	out, err := r.RunContainer(ctx, "hostile:1", "c", "cat", "/hostile-0", "/hostile-1")
	require.NoError(t, err)
	require.Equal(t, "harmlessharmless", out)
}
