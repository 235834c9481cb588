// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pull

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/integration/link"
)

// patience is how long a test waits for what takes milliseconds.
const patience = 30 * time.Second

// daemon is a real containerd with a directory of its own.
type daemon struct {
	t       testing.TB
	dir     string
	address string
	process *exec.Cmd
	gone    chan struct{}
}

func program(t testing.TB, name string) string {
	t.Helper()
	path, err := filepath.Abs(filepath.Join("..", "..", "bin", name))
	require.NoError(t, err)
	if _, err := os.Stat(path); err != nil {
		t.Skipf("%s is not there (make tools builds it): %v", filepath.Join("bin", name), err)
	}
	return path
}

func newDaemon(t testing.TB) *daemon {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("containerd needs root")
	}
	program(t, "containerd")
	program(t, "ctr")
	// Not t.TempDir: its long names would not fit into the address of a socket.
	dir, err := os.MkdirTemp("", "nhpull")
	require.NoError(t, err)
	d := &daemon{t: t, dir: dir, address: filepath.Join(dir, "c.sock")}
	t.Cleanup(func() {
		d.stop()
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("clean up: %v", err)
		}
	})
	// Version 4 takes the address from the server plugins; [grpc] is ignored there.
	config := fmt.Sprintf(`version = 4
root = "%[1]s/root"
state = "%[1]s/state"
imports = []
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime", "io.containerd.cri.v1.images",
  "io.containerd.podsandbox.controller.v1.podsandbox", "io.containerd.nri.v1.nri"]
[plugins.'io.containerd.server.v1.grpc']
  address = "%[1]s/c.sock"
[plugins.'io.containerd.server.v1.ttrpc']
  address = "%[1]s/c.sock.ttrpc"
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = "linux/amd64"
  snapshotter = "native"
  differ = "walking"
`, dir)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "config.toml"), []byte(config), 0o600))
	d.start()
	return d
}

func (d *daemon) start() {
	d.t.Helper()
	out, err := os.OpenFile(filepath.Join(d.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	require.NoError(d.t, err)
	defer out.Close()
	d.process = exec.Command(program(d.t, "containerd"), "--config", filepath.Join(d.dir, "config.toml"))
	d.process.Stdout, d.process.Stderr = out, out
	d.process.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	require.NoError(d.t, d.process.Start())
	d.gone = make(chan struct{})
	go func(p *exec.Cmd, gone chan struct{}) { _ = p.Wait(); close(gone) }(d.process, d.gone)
	d.eventually("containerd answers", func() bool {
		select {
		case <-d.gone:
			text, _ := os.ReadFile(filepath.Join(d.dir, "log"))
			d.t.Fatalf("containerd ended:\n%s", text)
		default:
		}
		return exec.Command(program(d.t, "ctr"), "-a", d.address, "version").Run() == nil
	})
}

// stop kills containerd, as a crash would.
func (d *daemon) stop() {
	if d.process == nil {
		return
	}
	_ = d.process.Process.Kill()
	<-d.gone
	d.process = nil
}

func (d *daemon) ctr(ns string, arg ...string) *exec.Cmd {
	return exec.Command(program(d.t, "ctr"), append([]string{"-a", d.address, "-n", ns}, arg...)...)
}

func (d *daemon) run(ns string, arg ...string) {
	d.t.Helper()
	out, err := d.ctr(ns, arg...).CombinedOutput()
	require.NoError(d.t, err, "ctr %v: %s", arg, out)
}

// pull starts a pull and returns a function that waits for its end.
func (d *daemon) pull(ns, ref string) (wait func()) {
	d.t.Helper()
	cmd := d.ctr(ns, "images", "pull", "--plain-http", "--platform", "linux/amd64", "--snapshotter", "native", ref)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	require.NoError(d.t, cmd.Start())
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	d.t.Cleanup(func() { _ = cmd.Process.Kill() })
	return func() {
		d.t.Helper()
		select {
		case err := <-done:
			require.NoError(d.t, err, "pull %s: %s", ref, out.String())
		case <-time.After(patience):
			d.t.Fatalf("pull of %s does not end", ref)
		}
	}
}

func (d *daemon) eventually(what string, condition func() bool) {
	d.t.Helper()
	for end := time.Now().Add(patience); !condition(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			d.t.Fatalf("waited in vain: %s", what)
		}
	}
}

// source is a registry behind a link on which single blobs can be held back.
type source struct {
	t    testing.TB
	link *link.Link
	host string // through the link
	up   string // directly
}

func newSource(t testing.TB) *source {
	t.Helper()
	up := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(up.Close)
	l, err := link.New(link.Options{Upstream: strings.TrimPrefix(up.URL, "http://")})
	require.NoError(t, err)
	down := httptest.NewServer(l)
	t.Cleanup(func() {
		l.SetDown(true)
		down.Close()
	})
	return &source{t: t, link: l, host: strings.TrimPrefix(down.URL, "http://"), up: strings.TrimPrefix(up.URL, "http://")}
}

// made is an image in the registry, with what a test wants to know of it.
type made struct {
	image  v1.Image
	digest string   // of the manifest
	blobs  []string // digests of the layers
	sizes  []int64  // of the blobs
	tars   []int    // uncompressed sizes
	chain  []string
}

// layerOf makes a gzip layer of about 2n bytes, n of which do not compress.
func layerOf(t testing.TB, n int) (v1.Layer, int) {
	t.Helper()
	data := tarOf(t, n)
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil }, tarball.WithMediaType(types.OCILayer))
	require.NoError(t, err)
	return l, len(data)
}

func (s *source) push(repo string, size ...int) made {
	s.t.Helper()
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	img, err := mutate.ConfigFile(img, &v1.ConfigFile{OS: "linux", Architecture: "amd64", RootFS: v1.RootFS{Type: "layers"}})
	require.NoError(s.t, err)
	m := made{}
	for i, n := range size {
		l, raw := layerOf(s.t, n)
		img, err = mutate.Append(img, mutate.Addendum{Layer: l, MediaType: types.OCILayer, History: v1.History{CreatedBy: fmt.Sprintf("RUN step %d", i)}})
		require.NoError(s.t, err)
		m.tars = append(m.tars, raw)
	}
	manifest, err := img.Manifest()
	require.NoError(s.t, err)
	config, err := img.ConfigFile()
	require.NoError(s.t, err)
	var diffs []digest.Digest
	for i, l := range manifest.Layers {
		m.blobs = append(m.blobs, l.Digest.String())
		m.sizes = append(m.sizes, l.Size)
		diffs = append(diffs, digest.Digest(config.RootFS.DiffIDs[i].String()))
	}
	for _, c := range identity.ChainIDs(diffs) {
		m.chain = append(m.chain, c.String())
	}
	d, err := img.Digest()
	require.NoError(s.t, err)
	m.image, m.digest = img, d.String()
	ref, err := name.ParseReference(s.up+"/"+repo, name.Insecure)
	require.NoError(s.t, err)
	require.NoError(s.t, remote.Write(ref, img))
	return m
}

func (s *source) await(condition func([]link.Request) bool) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), patience)
	defer cancel()
	require.NoError(s.t, s.link.Await(ctx, condition))
}
