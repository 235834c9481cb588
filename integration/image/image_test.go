// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package image

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"log"
	"maps"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// contents reads a layer's tar.
func contents(t *testing.T, l v1.Layer) map[string]Entry {
	t.Helper()
	r, err := l.Uncompressed()
	require.NoError(t, err)
	defer r.Close()
	return untar(t, r)
}

func untar(t *testing.T, r io.Reader) map[string]Entry {
	t.Helper()
	found := map[string]Entry{}
	archive := tar.NewReader(r)
	for {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return found
		}
		require.NoError(t, err)
		data, err := io.ReadAll(archive)
		require.NoError(t, err)
		require.NotContains(t, found, h.Name, "twice in the tar")
		found[h.Name] = Entry{*h, data}
	}
}

func TestTinyIsValidAndRepeatable(t *testing.T) {
	spec := TinySpec{Seed: 7, Layers: []int64{100_000, 0, 5}, Files: 3, Nasty: true, Hostile: true}
	img, err := Tiny(spec)
	require.NoError(t, err)
	require.NoError(t, validate.Image(img), "digests, sizes and media types agree with the content")
	again, err := Tiny(spec)
	require.NoError(t, err)
	a, err := img.Digest()
	require.NoError(t, err)
	b, err := again.Digest()
	require.NoError(t, err)
	require.Equal(t, a, b)
	spec.Seed++
	other, err := Tiny(spec)
	require.NoError(t, err)
	c, err := other.Digest()
	require.NoError(t, err)
	require.NotEqual(t, a, c)

	layers, err := img.Layers()
	require.NoError(t, err)
	require.Len(t, layers, 3)
	first, second := contents(t, layers[0]), contents(t, layers[1])
	var bytesOfData int
	for name, e := range first {
		if strings.HasPrefix(name, "data/0/") {
			bytesOfData += len(e.Data)
		}
	}
	require.Equal(t, 100_000, bytesOfData)
	require.Equal(t, "1\n", string(second["data/shared"].Data))
	require.Contains(t, second, "nasty/0/.wh.removed")
	require.Contains(t, second, "nasty/0/opaque/.wh..wh..opq")
	require.Equal(t, byte(tar.TypeChar), first["nasty/0/null"].Typeflag)
	require.Equal(t, "y", second["hostile-dir-1/"].PAXRecords["SCHILY.xattr.trusted.overlay.opaque"])
	require.EqualValues(t, 0o4755, first["nasty/0/setuid"].Mode)
	size, err := layers[0].Size()
	require.NoError(t, err)
	require.Greater(t, size, int64(100_000), "the content does not compress")
}

func TestTinyNeedsLayers(t *testing.T) {
	_, err := Tiny(TinySpec{})
	require.ErrorContains(t, err, "no layers")
}

func TestPushAndPullAgain(t *testing.T) {
	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer server.Close()
	img, err := Busybox()
	if errors.Is(err, os.ErrNotExist) {
		t.Skip(err)
	}
	require.NoError(t, err)
	ref := strings.TrimPrefix(server.URL, "http://") + "/busybox:1"
	require.NoError(t, Push(t.Context(), ref, img))
	parsed, err := name.ParseReference(ref, name.Insecure)
	require.NoError(t, err)
	pulled, err := remote.Image(parsed)
	require.NoError(t, err)
	require.NoError(t, validate.Image(pulled))
	want, err := img.Digest()
	require.NoError(t, err)
	got, err := pulled.Digest()
	require.NoError(t, err)
	require.Equal(t, want, got)

	server.Close()
	require.ErrorContains(t, Push(t.Context(), ref, img), ref)
}

func TestSyntheticHasBothSizes(t *testing.T) {
	for _, size := range []Synthetic{{"/opt/a", 50_000, 200_000}, {"/opt/b", 100, 120}, {"/opt/c", 9_000, 10}, {"/opt/d", 0, 0}} {
		digests, err := compress(io.Discard, -1, size.write)
		require.NoError(t, err)
		var b bytes.Buffer
		require.NoError(t, size.write(&b))
		require.Len(t, untar(t, &b)[size.Path[1:]].Data, int(size.Uncompressed))
		want := min(size.Compressed, size.Uncompressed)
		require.InDelta(t, want, digests.CompressedSize, float64(300+want/20), "%+v", size)
	}
}

func TestSpecIsChecked(t *testing.T) {
	b, err := NewBuilder(t.TempDir())
	require.NoError(t, err)
	for message, steps := range map[string][]Step{
		"no steps":           nil,
		"0 kinds":            {{History: "nothing"}},
		"2 kinds":            {{Run: "true", Base: []string{}}},
		"need a Base":        {{Packages: []string{"x"}}},
		"first step":         {{Base: []string{}}, {Base: []string{}}},
		"sizes of 0":         {{Synthetic: &Synthetic{"/x", 1, -1}}},
		"step 1: 0 kinds":    {{Base: []string{}}, {}},
		`image "bad": no`:    {},
		"Run need a Base b":  {{Run: "true"}},
		"must have Packages": {{Base: []string{}, Then: "true"}},
	} {
		_, err := b.Build(t.Context(), Spec{Name: "bad", Steps: steps})
		require.ErrorContains(t, err, message)
	}
	_, err = NewBuilder("/tmp/a:b")
	require.ErrorContains(t, err, "overlayfs")
}

func TestKeyDependsOnWhatCounts(t *testing.T) {
	keys := map[string]string{}
	add := func(what string, step Step, below ...string) {
		key, err := step.key(below)
		require.NoError(t, err)
		for other, k := range keys {
			require.NotEqual(t, k, key, "%s and %s", what, other)
		}
		keys[what] = key
	}
	add("base", Step{Base: []string{}})
	add("base with package", Step{Base: []string{"x"}})
	add("package", Step{Packages: []string{"x"}}, "a")
	add("package with less of it", Step{Packages: []string{"x"}, Then: "rm -rf /x"}, "a")
	add("package on another base", Step{Packages: []string{"x"}}, "b")
	add("extract", Step{Extract: []string{"x"}})
	same, err := Step{Extract: []string{"x"}, History: "told otherwise"}.key([]string{"anything"})
	require.NoError(t, err)
	require.Equal(t, keys["extract"], same)
}

// TestTreeOfAnUpper makes changes through a real overlay and compares the tar with them.
func TestTreeOfAnUpper(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	dir := t.TempDir()
	lower, upper, work, root := filepath.Join(dir, "l"), filepath.Join(dir, "u"), filepath.Join(dir, "w"), filepath.Join(dir, "m")
	for _, d := range []string{"gone", "replaced/old", "renamed"} {
		require.NoError(t, os.MkdirAll(filepath.Join(lower, d), 0o755))
	}
	for _, f := range []string{"removed", "gone/file", "replaced/file", "changed"} {
		require.NoError(t, os.WriteFile(filepath.Join(lower, f), []byte("lower"), 0o644))
	}
	for _, d := range []string{upper, work, root} {
		require.NoError(t, os.Mkdir(d, 0o755))
	}
	require.NoError(t, unix.Mount("overlay", root, "overlay", 0,
		"lowerdir="+lower+",upperdir="+upper+",workdir="+work+",redirect_dir=off,metacopy=off,index=off"))
	t.Cleanup(func() { _ = unix.Unmount(root, unix.MNT_DETACH) })
	in := func(name string) string { return filepath.Join(root, name) }
	require.NoError(t, os.Remove(in("removed")))
	require.NoError(t, os.RemoveAll(in("gone")))
	require.NoError(t, os.RemoveAll(in("replaced")))
	require.NoError(t, os.Mkdir(in("replaced"), 0o700))
	require.NoError(t, os.WriteFile(in("replaced/new"), []byte("new"), 0o4755))
	require.NoError(t, os.Chmod(in("changed"), 0o600))
	require.NoError(t, os.Mkdir(in("added"), 0o755))
	require.NoError(t, os.WriteFile(in("added/a"), []byte("linked"), 0o644))
	require.NoError(t, os.Link(in("added/a"), in("added/b")))
	require.NoError(t, unix.Setxattr(in("added/a"), "user.k", []byte("v"), 0))
	require.NoError(t, unix.Mkfifo(in("added/fifo"), 0o644))
	require.NoError(t, os.Symlink("/nowhere", in("added/link")))
	require.NoError(t, unix.Unmount(root, 0))

	var b bytes.Buffer
	require.NoError(t, writeTree(&b, upper, []string{lower}))
	got := untar(t, &b)
	require.Equal(t, []string{
		".wh.gone", ".wh.removed", "added/", "added/a", "added/b", "added/fifo", "added/link", "changed",
		"replaced/", "replaced/.wh..wh..opq", "replaced/new",
	}, slices.Sorted(maps.Keys(got)))
	require.Equal(t, "lower", string(got["changed"].Data))
	require.EqualValues(t, 0o600, got["changed"].Mode)
	require.Equal(t, byte(tar.TypeLink), got["added/b"].Typeflag)
	require.Equal(t, "added/a", got["added/b"].Linkname)
	require.Equal(t, "v", got["added/a"].PAXRecords["SCHILY.xattr.user.k"])
	require.Equal(t, byte(tar.TypeFifo), got["added/fifo"].Typeflag)
	require.Equal(t, "/nowhere", got["added/link"].Linkname)
	for name, e := range got {
		for record := range e.PAXRecords {
			require.NotContains(t, record, "overlay", name)
		}
	}
}

func TestFromTable(t *testing.T) {
	f, err := os.Open("testdata/rebuild-layers.csv")
	require.NoError(t, err)
	defer f.Close()
	images, err := FromTable(f)
	require.NoError(t, err)
	require.Len(t, images, 32)
	layers := 0
	for _, img := range images {
		layers += len(img.Steps)
	}
	require.Equal(t, 245, layers)
	require.Equal(t, "distro", images[0].Category)
	require.Equal(t, "debian", images[0].Name)
	require.NotNil(t, images[0].Steps[0].Base)
	require.Equal(t, []string{"gnupg", "dirmngr"}, images[1].Steps[1].Packages)
	require.Equal(t, Synthetic{"/opt/layer-2", 3151, 5897}, *images[1].Steps[2].Synthetic)
	require.Equal(t, []string{"busybox-static"}, images[2].Steps[0].Extract)
	require.True(t, strings.HasPrefix(images[1].Steps[1].History, "RUN set -x && apt-get update"))
}

func TestFromTableSaysWhatIsWrong(t *testing.T) {
	const header = "category,image,layer_index,real_compressed_bytes,real_uncompressed_est_bytes,debian12_packages,created_by\n"
	for table, message := range map[string]string{
		"":                                 "read table",
		"a,b\n":                            `no column "category"`,
		header + "c,i,1,1,1,(file layer),": `line 2: image "i" has layer "1" where 0 is next`,
		header + "c,i,0,x,1,(file layer),": `line 2: real_compressed_bytes "x"`,
		header + "c,i,0,1,1,,":             "line 2: debian12_packages is empty",
		header + "c,i,0,1,1,gcc,":          "need a Base below",
		header + "c,i\n":                   "wrong number of fields",
	} {
		_, err := FromTable(strings.NewReader(table))
		require.ErrorContains(t, err, message)
	}
}
