// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

func zstdOf(t testing.TB, b []byte, opts ...zstd.EOption) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil, opts...)
	must(t, err)
	return w.EncodeAll(b, nil)
}

func reg(name, data string) entry {
	return entry{Header: tar.Header{Name: name, Mode: 0o644}, data: data}
}

// skippable is a zstd frame without content, as zstd:chunked has them at its end.
func skippable(n int) []byte {
	return append([]byte{0x50, 0x2a, 0x4d, 0x18, byte(n), 0, 0, 0}, make([]byte, n)...)
}

func join(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

func TestCompressions(t *testing.T) {
	big := strings.Repeat("0123456789", 100_000)
	layer := tarOf(t, reg("a", "data"), reg("big", big))
	half := len(layer) / 2
	empty := zstdOf(t, nil, zstd.WithZeroFrames(true))
	for name, blob := range map[string][]byte{
		"tar":                  layer,
		"gzip":                 gzipOf(t, layer),
		"gzip members":         join(gzipOf(t, layer[:half]), gzipOf(t, layer[half:]), gzipOf(t, nil)),
		"zstd":                 zstdOf(t, layer),
		"zstd frames":          join(zstdOf(t, layer[:half]), skippable(10), zstdOf(t, layer[half:]), empty),
		"zstd skippable first": join(skippable(3), zstdOf(t, layer), skippable(100)),
	} {
		t.Run(name, func(t *testing.T) {
			p := &memoryPack{}
			m, res, err := Layer(t.Context(), io.NopCloser(iotest.HalfReader(bytes.NewReader(blob))), p, wantOf(blob, layer), Options{Layer: 9})
			must(t, err)
			got := ofMeta(t, m, p.data)
			if got["/big"].data != big || got["/a"].data != "data" {
				t.Error("data is wrong")
			}
			want := Result{DiffID: digest.FromBytes(layer), Compressed: int64(len(blob)), Uncompressed: int64(len(layer)), Entries: 2, Files: 2,
				DataBytes: int64(len(big)) + 4}
			if res != want {
				t.Errorf("result is %+v, want %+v", res, want)
			}
			if m.Layer != 9 || m.Numbers != 1 {
				t.Errorf("layer %d with %d numbers", m.Layer, m.Numbers)
			}
		})
	}
}

// What follows the end of the tar belongs to the diff ID.
func TestReadsBehindTheEnd(t *testing.T) {
	layer := append(tarOf(t, reg("a", "data")), bytes.Repeat([]byte("trailing"), 100_000)...)
	for _, blob := range [][]byte{layer, gzipOf(t, layer), zstdOf(t, layer)} {
		_, res, err := Layer(t.Context(), io.NopCloser(bytes.NewReader(blob)), &memoryPack{}, wantOf(blob, layer), Options{})
		must(t, err)
		if res.Uncompressed != int64(len(layer)) {
			t.Errorf("%d bytes", res.Uncompressed)
		}
	}
	_, res, err := Layer(t.Context(), io.NopCloser(bytes.NewReader(nil)), &memoryPack{}, wantOf(nil, nil), Options{})
	must(t, err)
	if res.DiffID != digest.FromBytes(nil) {
		t.Errorf("empty blob: %+v", res)
	}
}

func TestWrongDigests(t *testing.T) {
	layer := tarOf(t, reg("a", "data"))
	layer = append(layer, "behind the end"...)
	last := bytes.Clone(layer)
	last[len(last)-1]++
	for name, c := range map[string]struct {
		blob []byte
		want Want
	}{
		"last byte of the blob":   {last, wantOf(layer, nil)},
		"last byte of the stream": {gzipOf(t, last), Want{digest.FromBytes(gzipOf(t, last)), int64(len(gzipOf(t, last))), digest.FromBytes(layer)}},
		"a byte less":             {layer[:len(layer)-1], wantOf(layer, nil)},
		"a byte more":             {append(bytes.Clone(layer), 0), wantOf(layer, nil)},
		"size":                    {layer, Want{digest.FromBytes(layer), 1, ""}},
	} {
		m, _, err := Layer(t.Context(), io.NopCloser(bytes.NewReader(c.blob)), &memoryPack{}, c.want, Options{})
		if !errdefs.IsFailedPrecondition(err) || m != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestBadInput(t *testing.T) {
	layer := tarOf(t, reg("a", strings.Repeat("data", 1000)), reg("b", "x"))
	gz, zs := gzipOf(t, layer), zstdOf(t, layer)
	flipped := func(b []byte) []byte {
		b = bytes.Clone(b)
		b[len(b)-3]++ // in the checksum
		return b
	}
	linkTo := func(name, target string) entry {
		return entry{Header: tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target}}
	}
	symlink := func(name, target string) entry {
		return entry{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target}}
	}
	for name, c := range map[string]struct {
		blob []byte
		says string
	}{
		"gzip truncated":       {gz[:len(gz)-10], "unexpected EOF"},
		"gzip header only":     {gz[:10], "decompress"},
		"gzip head cut":        {gz[:5], "decompress"},
		"gzip checksum":        {flipped(gz), "checksum"},
		"gzip and garbage":     {join(gz, []byte("garbage behind it")), "decompress"},
		"gzip and zeros":       {join(gz, make([]byte, 100)), "decompress"},
		"gzip and zstd":        {join(gz, zs), "decompress"},
		"zstd truncated":       {zs[:len(zs)-10], "decompress"},
		"zstd and garbage":     {join(zs, []byte("garbage behind it")), "decompress"},
		"zstd checksum":        {flipped(zs), "decompress"},
		"zstd with a dict":     {[]byte{0x28, 0xb5, 0x2f, 0xfd, 0x03, 0, 1, 2, 3, 4, 1, 0, 0}, "decompress"},
		"tar truncated":        {layer[:900], "data ends after 388 of 4000 bytes"},
		"tar header truncated": {layer[:5000], "read entry 2"},
		"no tar":               {[]byte(strings.Repeat("this is not a tar", 100)), "read entry 1"},
		"parent is a file":     {tarOf(t, reg("a", "x"), reg("a/b", "x")), `entry "a/b": make directory "/a": not a directory`},
		"parent is hidden":     {tarOf(t, reg(".wh.a", ""), reg("a/b", "x")), "not a directory"},
		"whiteout of its own":  {tarOf(t, reg("a", "x"), reg(".wh.a", "")), "file exists"},
		"whiteout twice":       {tarOf(t, reg(".wh.a", ""), reg(".wh.a", "")), "file exists"},
		"whiteout of nothing":  {tarOf(t, reg("d/.wh.", "")), "whiteout"},
		"whiteout of ..":       {tarOf(t, reg("d/.wh...", "")), "whiteout"},
		"whiteout of .":        {tarOf(t, reg("d/.wh..", "")), "whiteout"},
		"link to nothing":      {tarOf(t, linkTo("a", "b")), `link to "b": no such file`},
		"link to itself":       {tarOf(t, reg("a", "x"), linkTo("a", "a")), "no such file"},
		"link climbs":          {tarOf(t, linkTo("a", "../../../../etc/passwd")), "no such file"},
		"link to the root":     {tarOf(t, linkTo("a", "..")), "not permitted"},
		"link to a directory":  {tarOf(t, reg("d/a", "x"), linkTo("a", "d")), "not permitted"},
		"symlink to nothing":   {tarOf(t, symlink("a", "")), "no such file"},
		"symlinks in a circle": {tarOf(t, symlink("a", "b"), symlink("b", "a"), reg("a/c", "x")), "too many"},
		"long target":          {tarOf(t, symlink("a", strings.Repeat("t", 4096))), "name too long"},
		"name of 300 bytes":    {tarOf(t, reg(strings.Repeat("n", 300), "x")), "name too long"},
		"directory of 300":     {tarOf(t, reg(strings.Repeat("n", 300)+"/a", "x")), "name too long"},
		"path of 5000 bytes":   {tarOf(t, reg(strings.Repeat("d/", 2500)+"a", "x")), "name too long"},
		"socket":               {tarOf(t, rawEntry("s", 's', nil, 0)), "type 's'"},
		"old sparse":           {tarOf(t, rawEntry("s", 'S', nil, 0)), "read entry 1"},
		"more than it has":     {rawHeader("a", '0', 1<<40, nil), "data of all files"},
		"negative size":        {rawHeader("a", '0', -5, nil), "read entry"},
		"sparse, too little":   {tarOf(t, rawEntry("s", '0', padded([]byte("1\n0\n512\n")), 512, sparsePAX(4096)...)), "data ends after 0 of 4096"},
		"sparse, too much":     {tarOf(t, rawEntry("s", '0', append(padded([]byte("1\n0\n5\n")), make([]byte, 1024)...), 1536, sparsePAX(5)...)), "data"},
		"xattr without a name": {tarOf(t, xattrEntry("user.", "v")), "invalid argument"},
		"long xattr name":      {tarOf(t, xattrEntry("user."+strings.Repeat("n", 300), "v")), "xattr"},
		"long xattr":           {tarOf(t, xattrEntry("user.a", strings.Repeat("v", 1<<16))), "argument list too long"},
		"bad capability":       {tarOf(t, xattrEntry(xattrCapability, "v")), "invalid argument"},
		"bad ACL":              {tarOf(t, xattrEntry(xattrAccess, "\x02\x00\x00\x00oh")), "invalid argument"},
	} {
		t.Run(name, func(t *testing.T) {
			m, _, _, err := unpackBytes(t.Context(), c.blob, Options{MaxBytes: 1 << 30})
			if !errdefs.IsInvalidArgument(err) || m != nil {
				t.Fatalf("error is %v", err)
			}
			if s := err.Error(); !strings.Contains(s, c.says) || strings.Contains(s, "\n") || len(s) > 1000 {
				t.Errorf("error of %d bytes is %.1000s, wants %q", len(s), s, c.says)
			}
		})
	}
}

func sparsePAX(size int) []string {
	return []string{"GNU.sparse.major", "1", "GNU.sparse.minor", "0", "GNU.sparse.name", "s", "GNU.sparse.realsize", fmt.Sprint(size)}
}

func xattrEntry(name, value string) entry {
	return entry{Header: tar.Header{Name: "x", Mode: 0o644, Format: tar.FormatPAX, PAXRecords: map[string]string{paxXattr + name: value}}}
}

// Names that climb stay in the layer, as containerd has it.
func TestNamesStayInside(t *testing.T) {
	layer := tarOf(t, reg("/abs", "x"), reg("../up", "x"), reg("a/../../../b", "x"),
		entry{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: "l", Linkname: "../../../../../etc"}}, reg("l/passwd", "x"),
		entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: "./"}})
	m, _, p, err := unpackBytes(t.Context(), layer, Options{})
	must(t, err)
	got := ofMeta(t, m, p.data)
	for _, name := range []string{"/abs", "/up", "/b", "/l", "/etc/passwd"} {
		if _, ok := got[name]; !ok {
			t.Errorf("%q is missing", name)
		}
	}
	if len(got) != 7 || !got["/etc"].implied || !got["/"].implied {
		t.Errorf("layer has %v", got)
	}
}

// bomb is one zstd frame of header and n zeros: 4 bytes for each 128 KiB.
func bomb(header []byte, n int) []byte {
	const block = 128 << 10
	// No flags, a window of 128 KiB (RFC 8878, section 3.1.1.1).
	b := append([]byte{0x28, 0xb5, 0x2f, 0xfd, 0, 7 << 3}, byte(len(header)<<3), byte(len(header)>>5), byte(len(header)>>13))
	b = append(b, header...)
	for ; n > 0; n -= block {
		size := min(n, block)
		b = append(b, byte(size<<3|1<<1), byte(size>>5), byte(size>>13), 0)
	}
	return append(b, 1, 0, 0) // the last one, empty
}

type discardPack struct{ n uint32 }

func (p *discardPack) Begin(int64) (uint32, uint32, error) { p.n++; return p.n, p.n, nil }
func (p *discardPack) Write(b []byte) (int, error)         { return len(b), nil }
func (p *discardPack) Hole(uint32) error                   { return nil }
func (p *discardPack) End() (uint32, error)                { return 0, nil }

func TestBombs(t *testing.T) {
	sparse := tarOf(t, rawEntry("s", '0', padded([]byte("0\n")), 512, sparsePAX(1<<62)...))
	big := rawHeader("a", '0', 64<<20, nil)
	for name, c := range map[string]struct {
		blob []byte
		opts Options
		says string
	}{
		"ratio":     {bomb(rawHeader("a", '0', 2<<30, nil), 2<<30), Options{}, "10000:1"},
		"total":     {bomb(big, 64<<20), Options{MaxBytes: 32 << 20}, "more than 33554432 bytes"},
		"total gz":  {gzipOf(t, join(big, make([]byte, 64<<20))), Options{MaxBytes: 32 << 20}, "more than 33554432 bytes"},
		"sparse":    {sparse, Options{}, "data of all files"},
		"behind it": {bomb(make([]byte, 1024), 64<<20), Options{MaxBytes: 32 << 20}, "more than 33554432 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := Layer(t.Context(), io.NopCloser(bytes.NewReader(c.blob)), &discardPack{}, wantOf(c.blob, nil), c.opts)
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("error is %v", err)
			}
		})
	}
	// gzip at its best is no bomb.
	blob := gzipOf(t, join(big, make([]byte, 64<<20), make([]byte, 1024)))
	_, _, err := Layer(t.Context(), io.NopCloser(bytes.NewReader(blob)), &discardPack{}, wantOf(blob, nil), Options{})
	must(t, err)
}

func TestErrorsOfOthers(t *testing.T) {
	layer := tarOf(t, reg("a", "data"), reg("b", strings.Repeat("data", 1<<20)))
	t.Run("pack", func(t *testing.T) {
		p := &memoryPack{fail: func(n uint32, written int) error {
			if n == 1 && written > 1<<20 {
				return unix.ENOSPC
			}
			return nil
		}}
		_, _, err := Layer(t.Context(), io.NopCloser(bytes.NewReader(layer)), p, wantOf(layer, nil), Options{})
		if !errors.Is(err, unix.ENOSPC) || errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), `entry "b"`) {
			t.Errorf("error is %v", err)
		}
	})
	for _, cause := range []error{unix.EIO, ErrRestarted, io.ErrUnexpectedEOF} {
		for name, blob := range map[string][]byte{"tar": layer, "gzip": gzipOf(t, layer), "zstd": zstdOf(t, layer)} {
			t.Run(name+" "+cause.Error(), func(t *testing.T) {
				r := io.MultiReader(bytes.NewReader(blob[:len(blob)/2]), iotest.ErrReader(cause))
				_, _, err := Layer(t.Context(), io.NopCloser(r), &memoryPack{}, wantOf(blob, nil), Options{})
				if !errors.Is(err, cause) || errdefs.IsInvalidArgument(err) {
					t.Errorf("error is %v", err)
				}
			})
		}
	}
	t.Run("context", func(t *testing.T) {
		root, cs := contentStore(t)
		dgst := digest.FromBytes(layer)
		write(t, download(t, cs, "default/1/layer-"+dgst.String()), layer[:len(layer)/2])
		ctx, cancel := context.WithCancel(t.Context())
		r, err := OpenGrowing(ctx, root, dgst, int64(len(layer)), nil)
		must(t, err)
		seen := make(chan struct{}, 1000)
		done := make(chan error)
		go func() {
			_, _, err := Layer(ctx, r, &memoryPack{}, wantOf(layer, nil), Options{Progress: func(int64, int64) { seen <- struct{}{} }})
			done <- err
		}()
		<-seen
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("error is %v", err)
		}
	})
	// An error of the layer ends a read that waits for more of the blob.
	t.Run("waiting", func(t *testing.T) {
		root, cs := contentStore(t)
		bad := append(tarOf(t, reg("a", "x"), reg("a/b", "x")), make([]byte, 4*chunkSize)...)
		dgst := digest.FromBytes(bad)
		write(t, download(t, cs, "default/1/layer-"+dgst.String()), bad[:2*chunkSize])
		r, err := OpenGrowing(t.Context(), root, dgst, int64(len(bad)), nil)
		must(t, err)
		if _, _, err := Layer(t.Context(), r, &memoryPack{}, wantOf(bad, nil), Options{}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("error is %v", err)
		}
	})
}

func TestSupports(t *testing.T) {
	for mt, want := range map[string]bool{
		"application/vnd.oci.image.layer.v1.tar":                       true,
		"application/vnd.oci.image.layer.v1.tar+gzip":                  true,
		"application/vnd.oci.image.layer.v1.tar+zstd":                  true,
		"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip": true,
		"application/vnd.docker.image.rootfs.diff.tar.gzip":            true,
		"application/vnd.docker.image.rootfs.diff.tar":                 true,
		"application/vnd.docker.image.rootfs.diff.tar.zstd":            true,
		"application/vnd.docker.image.rootfs.foreign.diff.tar.gzip":    true,
		"application/vnd.oci.image.layer.v1.tar+gzip+encrypted":        false,
		"application/vnd.oci.image.layer.v1.tar+encrypted":             false,
		"application/vnd.docker.image.rootfs.diff.tar.gzip+encrypted":  false,
		"application/vnd.erofs.layer.v1":                               false,
		"":                                                             false,
	} {
		if Supports(mt) != want {
			t.Errorf("%q: want %v", mt, want)
		}
	}
}
