//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package ctrd

import (
	"archive/tar"
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/integration/image"
	"github.com/nhybrid/nhybrid/integration/rig"
	"github.com/nhybrid/nhybrid/scmlib/region"
)

const mib = 1 << 20

// hook is built once for all tests.
var hook = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "scm-hook-")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "nhybrid-scm-hook")
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", path, "github.com/nhybrid/nhybrid/cmd/nhybrid-scm-hook")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	cmd.Stderr = os.Stderr
	return path, cmd.Run()
})

func TestMain(m *testing.M) {
	code := m.Run()
	if path, err := hook(); err == nil {
		os.RemoveAll(filepath.Dir(path))
	}
	os.Exit(code)
}

// node is a rig with a store of regions beside it.
type node struct {
	*rig.Rig
	t     *testing.T
	store *region.Store
	kind  string
	stop  func()
	o     region.Options
	root  string
}

// newNode starts containerd, and a store on ext4 that serves its containers.
func newNode(t *testing.T, ro rig.Options, o region.Options) *node {
	t.Helper()
	ro.NoDaemon = true
	r := rig.New(t, ro)
	// Where the machine's /run is a tmpfs of its own for each, runtimes look for devices in the same place.
	n := &node{Rig: r, t: t, o: o, kind: strings.ToLower(r.Namespace) + ".nhybrid.io/scm"}
	nvm, err := rig.NewNVM(t.Context(), filepath.Join(t.TempDir(), "nvm"), 1<<30)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, nvm.Close()) })
	n.root = filepath.Join(nvm.Mountpoint(), "r")
	n.start()
	t.Cleanup(func() { n.stop() })
	return n
}

// start is what the daemon does.
func (n *node) start() {
	t := n.t
	t.Helper()
	path, err := hook()
	require.NoError(t, err)
	cdi := region.CDI{Path: "/var/run/cdi/test-" + n.Namespace + ".json", Hook: path, Socket: filepath.Join(n.Dir, "scm.sock"), Sizes: region.DefaultSizes(), Kind: n.kind}
	o := n.o
	o.Identify = Identify(n.Client)
	o.Volumes = func(names []string) { require.NoError(t, cdi.Write(names)) }
	n.store, err = region.Open(context.Background(), n.root, o)
	require.NoError(t, err)
	l, err := net.Listen("unix", cdi.Socket)
	require.NoError(t, err)
	srv := region.NewServer(n.store)
	srv.Handle(OpCommit, Handler(n.Client, n.store))
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { Watch(ctx, n.Client, n.store) })
	wg.Go(func() { _ = srv.Serve(ctx, l) })
	n.stop = sync.OnceFunc(func() {
		cancel()
		wg.Wait()
		require.NoError(t, n.store.Close())
		os.Remove(cdi.Path)
	})
}

func (n *node) restart() {
	n.stop()
	n.start()
}

func (n *node) device(name string) string { return n.kind + "=" + name }

func (n *node) connect() *client.Client {
	n.t.Helper()
	c, err := n.Client()
	require.NoError(n.t, err)
	return c
}

// regions waits until there are so many.
func (n *node) regions(want int) []region.Record {
	n.t.Helper()
	require.Eventually(n.t, func() bool { return len(n.store.List("")) == want }, time.Minute, 10*time.Millisecond, "%d regions are awaited, there are %v", want, n.store.List(""))
	return n.store.List("")
}

// clean checks that containers have left nothing: no region, no mount.
func (n *node) clean() {
	n.t.Helper()
	n.regions(0)
	for _, d := range []string{"k", "tmp"} { // what is on its way out takes a moment
		require.Eventually(n.t, func() bool { left, err := os.ReadDir(filepath.Join(n.root, d)); return err == nil && len(left) == 0 }, time.Minute, 10*time.Millisecond)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	require.NoError(n.t, err)
	for l := range strings.Lines(string(mounts)) {
		if strings.Contains(l, "/region") && strings.Contains(l, n.root) || strings.Contains(l, "/dev/scm") {
			n.t.Errorf("mount left: %s", l)
		}
	}
}

// app stores an image with a program that counts in its region: "count" adds one, "show" tells.
func (n *node) app(name string, above ...v1.Layer) {
	n.t.Helper()
	_, err := n.PushBusybox(n.t.Context(), name, append([]v1.Layer{appLayer(n.t)}, above...)...)
	require.NoError(n.t, err)
}

// appLayer holds the program of testdata/app.
func appLayer(t *testing.T) v1.Layer {
	t.Helper()
	dir := t.TempDir()
	path := filepath.Join(dir, "app")
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-o", path, "./testdata/app")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	l, err := image.Layer([]image.Entry{{Header: tar.Header{Name: "app", Typeflag: tar.TypeReg, Mode: 0o755}, Data: b}})
	require.NoError(t, err)
	return l
}
