// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// contentStore is containerd's own store, so that its layout on disk is tested too.
func contentStore(t *testing.T) (string, content.Store) {
	t.Helper()
	root := t.TempDir()
	cs, err := local.NewStore(root)
	must(t, err)
	return root, cs
}

func download(t *testing.T, cs content.Store, ref string) content.Writer {
	t.Helper()
	w, err := cs.Writer(t.Context(), content.WithRef(ref))
	must(t, err)
	t.Cleanup(func() { w.Close() })
	return w
}

func write(t *testing.T, w content.Writer, b []byte) {
	t.Helper()
	_, err := w.Write(b)
	must(t, err)
}

// readExactly reads n bytes, which are there.
func readExactly(t *testing.T, r io.Reader, want []byte) {
	t.Helper()
	got := make([]byte, len(want))
	_, err := io.ReadFull(r, got)
	must(t, err)
	if !bytes.Equal(got, want) {
		t.Fatalf("read %q, want %q", got, want)
	}
}

type answer struct {
	b   []byte
	err error
}

// readAll reads on in another goroutine, as bytes are to come.
func readAll(r io.Reader) <-chan answer {
	c := make(chan answer, 1)
	go func() {
		b, err := io.ReadAll(r)
		c <- answer{b, err}
	}()
	return c
}

func TestReadsWhatArrives(t *testing.T) {
	for _, ref := range []string{"default/1/layer-", "k8s.io/7/layer-name@", "default/1/layer-some-name-x@"} {
		root, cs := contentStore(t)
		blob := bytes.Repeat([]byte("0123456789abcdef"), 100_000)
		dgst := digest.FromBytes(blob)
		r, err := OpenGrowing(t.Context(), root, dgst, int64(len(blob)), nil)
		must(t, err)
		all := readAll(r) // begins before the download
		other := download(t, cs, "default/2/layer-"+digest.FromString("other").String())
		write(t, other, []byte("other"))
		w := download(t, cs, ref+dgst.String())
		for at := 0; at < len(blob); at += 300_000 {
			write(t, w, blob[at:min(at+300_000, len(blob))])
		}
		must(t, w.Commit(t.Context(), int64(len(blob)), dgst))
		a := <-all
		must(t, a.err)
		if !bytes.Equal(a.b, blob) {
			t.Errorf("%q: read %d bytes of %d, or others", ref, len(a.b), len(blob))
		}
		must(t, r.Close())
	}
}

func TestReadsInStep(t *testing.T) {
	root, cs := contentStore(t)
	blob := []byte("first second third")
	dgst := digest.FromBytes(blob)
	w := download(t, cs, "default/1/layer-"+dgst.String())
	write(t, w, blob[:6])
	r, err := OpenGrowing(t.Context(), root, dgst, int64(len(blob)), nil)
	must(t, err)
	defer r.Close()
	readExactly(t, r, blob[:6])
	write(t, w, blob[6:13])
	readExactly(t, r, blob[6:13])
	write(t, w, blob[13:])
	// The descriptor stays valid across the rename.
	must(t, w.Commit(t.Context(), 0, dgst))
	must(t, iotest.TestReader(readerOnly{r}, blob[13:]))
}

type readerOnly struct{ io.Reader }

func TestReadsCommitted(t *testing.T) {
	root, cs := contentStore(t)
	for _, blob := range [][]byte{[]byte("blob"), {}} {
		dgst := digest.FromBytes(blob)
		must(t, content.WriteBlob(t.Context(), cs, "x", bytes.NewReader(blob), ocispec.Descriptor{Digest: dgst, Size: int64(len(blob))}))
		r, err := OpenGrowing(t.Context(), root, dgst, int64(len(blob)), nil)
		must(t, err)
		must(t, iotest.TestReader(readerOnly{r}, blob))
		must(t, r.Close())
		p, err := FromProvider(t.Context(), cs, ocispec.Descriptor{Digest: dgst, Size: int64(len(blob))})
		must(t, err)
		must(t, iotest.TestReader(readerOnly{p}, blob))
		must(t, p.Close())
	}
}

// An ingest that a broken pull has left is not waited for.
func TestLeavesStaleIngest(t *testing.T) {
	root, cs := contentStore(t)
	blob := []byte("first second third")
	dgst := digest.FromBytes(blob)
	stale := download(t, cs, "dead/1/layer-"+dgst.String())
	write(t, stale, blob[:13])
	must(t, stale.Close())
	r, err := OpenGrowing(t.Context(), root, dgst, int64(len(blob)), nil)
	must(t, err)
	defer r.Close()
	readExactly(t, r, blob[:13])
	w := download(t, cs, "alive/1/layer-"+dgst.String())
	write(t, w, blob)
	readExactly(t, r, blob[13:])
}

func TestRestarted(t *testing.T) {
	blob := []byte("first second third")
	dgst := digest.FromBytes(blob)
	ref := "default/1/layer-" + dgst.String()
	for name, c := range map[string]struct {
		change func(t *testing.T, root string, cs content.Store, w content.Writer)
		want   error
	}{
		"truncated": {func(t *testing.T, _ string, _ content.Store, w content.Writer) { must(t, w.Truncate(0)) }, ErrRestarted},
		"removed": {func(t *testing.T, _ string, cs content.Store, w content.Writer) {
			must(t, w.Close())
			must(t, cs.Abort(t.Context(), ref))
		}, ErrRestarted},
		"replaced": {func(t *testing.T, _ string, cs content.Store, w content.Writer) {
			must(t, w.Close())
			must(t, cs.Abort(t.Context(), ref))
			write(t, download(t, cs, ref), blob[:3])
		}, ErrRestarted},
		"grows beyond its size": {func(t *testing.T, _ string, _ content.Store, w content.Writer) {
			write(t, w, append(blob[6:len(blob):len(blob)], "and more"...))
		}, ErrRestarted},
		"committed with another size": {func(t *testing.T, root string, _ content.Store, w content.Writer) {
			must(t, w.Close())
			p := filepath.Join(root, "blobs", "sha256", dgst.Encoded())
			must(t, os.MkdirAll(filepath.Dir(p), 0o755))
			must(t, os.WriteFile(p, blob[:6], 0o644))
		}, errdefs.ErrFailedPrecondition},
	} {
		t.Run(name, func(t *testing.T) {
			root, cs := contentStore(t)
			w := download(t, cs, ref)
			write(t, w, blob[:6])
			r, err := OpenGrowing(t.Context(), root, dgst, int64(len(blob)), nil)
			must(t, err)
			defer r.Close()
			readExactly(t, r, blob[:6])
			all := readAll(r)
			c.change(t, root, cs, w)
			if a := <-all; !errors.Is(a.err, c.want) || strings.Contains(a.err.Error(), "\n") {
				t.Errorf("error is %v", a.err)
			}
		})
	}
}

func TestOpenGrowingEnds(t *testing.T) {
	root, _ := contentStore(t)
	dgst := digest.FromString("never")
	ctx, cancel := context.WithCancel(t.Context())
	r, err := OpenGrowing(ctx, root, dgst, 5, nil)
	must(t, err)
	all := readAll(r)
	cancel()
	if a := <-all; !errors.Is(a.err, context.Canceled) {
		t.Errorf("after cancel: %v", a.err)
	}
	must(t, r.Close())

	r, err = OpenGrowing(t.Context(), root, dgst, 5, nil)
	must(t, err)
	all = readAll(r)
	must(t, r.Close())
	if a := <-all; a.err == nil {
		t.Error("a closed reader has an end")
	}
	must(t, r.Close())
}

func TestOpenGrowingRefuses(t *testing.T) {
	root, _ := contentStore(t)
	good := digest.FromString("x")
	for name, c := range map[string]struct {
		root string
		dgst digest.Digest
		size int64
		is   func(error) bool
	}{
		"no root":       {"", good, 1, errdefs.IsUnavailable},
		"missing root":  {filepath.Join(root, "no"), good, 1, errdefs.IsUnavailable},
		"bad digest":    {root, "sha256:../../etc/passwd", 1, errdefs.IsInvalidArgument},
		"negative size": {root, good, -1, errdefs.IsInvalidArgument},
	} {
		if _, err := OpenGrowing(t.Context(), c.root, c.dgst, c.size, nil); !c.is(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestRefersTo(t *testing.T) {
	d := digest.FromString("x")
	for ref, want := range map[string]bool{
		"default/1/layer-" + d.String():         true,
		"default/1/layer-" + d.String() + "\n":  true,
		"a/b/layer-docker.io/x:1@" + d.String(): true,
		d.String():                              false,
		"default/1/layer-" + d.String() + "x":   false,
		"default/1/layer-x" + d.Encoded():       false,
		"":                                      false,
	} {
		if refersTo(ref, d) != want {
			t.Errorf("%q: want %v", ref, want)
		}
	}
}

// What has arrived is on its way to the disk before containerd syncs the blob, and the kernel by itself would leave it dirty for
// half a minute.
func TestDownloadsAreGivenToTheDisk(t *testing.T) {
	root, cs := contentStore(t)
	var fsys unix.Statfs_t
	must(t, unix.Statfs(root, &fsys))
	if fsys.Type == unix.TMPFS_MAGIC {
		t.Skip("a tmpfs has no disk")
	}
	blob := make([]byte, 2*giveBytes+1)
	dgst := digest.FromBytes(blob)
	w := download(t, cs, "default/1/layer-"+dgst.String())
	write(t, w, blob[:2*giveBytes])
	r, err := OpenGrowing(t.Context(), root, dgst, int64(len(blob)), nil)
	must(t, err)
	defer r.Close()
	readExactly(t, r, blob[:2*giveBytes])
	data, err := filepath.Glob(filepath.Join(root, "ingest", "*", "data"))
	must(t, err)
	f, err := os.Open(data[0])
	must(t, err)
	defer f.Close()
	for begin := time.Now(); ; time.Sleep(time.Millisecond) {
		var all unix.CachestatRange
		var st unix.Cachestat_t
		must(t, unix.Cachestat(uint(f.Fd()), &all, &st, 0))
		if st.Dirty == 0 {
			break
		}
		if time.Since(begin) > 20*time.Second {
			t.Fatalf("%d pages are dirty and nobody writes them", st.Dirty)
		}
	}
}
