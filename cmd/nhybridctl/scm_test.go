// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/cmd/internal/config"
	"github.com/nhybrid/nhybrid/integration/hddsim/block"
	"github.com/nhybrid/nhybrid/scmlib"
	"github.com/nhybrid/nhybrid/scmlib/region"
	"github.com/nhybrid/nhybrid/scmlib/region/api"
	artifacts "github.com/nhybrid/nhybrid/scmlib/region/registry"
	"github.com/nhybrid/nhybrid/snapshotter/control"
)

// asProgram makes of the test's own program nhybridctl, for what replaces the process.
const asProgram = "NHYBRIDCTL_TEST_RUN"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		os.Exit(run(context.Background(), os.Args[1:], os.Stdout, os.Stderr))
	}
	os.Exit(m.Run())
}

// regionServer is a real store on a filesystem of its own, served as the daemon serves it.
func regionServer(t *testing.T, o region.Options) (string, *region.Store) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("regions are mounts, which needs root")
	}
	dir, err := os.MkdirTemp("", "scm") // t.TempDir may be longer than a socket's path may be
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, block.UnmountBelow(dir)); require.NoError(t, os.RemoveAll(dir)) })
	require.NoError(t, block.Mount("regions", filepath.Join(dir, "nvm"), "tmpfs", 0, "size=128m"))
	store, err := region.Open(context.Background(), filepath.Join(dir, "nvm", "r"), o)
	require.NoError(t, err)
	srv := region.NewServer(store)
	artifacts.Handle(srv, store, artifacts.Remote{Spool: dir})
	socket := filepath.Join(dir, "scm.sock")
	l, err := control.Listen(socket)
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ctx, l) }()
	t.Cleanup(func() { cancel(); require.NoError(t, <-done); require.NoError(t, store.Close()) })
	return socket, store
}

// good runs a command that must not fail.
func good(t *testing.T, socket string, args ...string) string {
	t.Helper()
	code, out, errs := ctl(t, append([]string{"scm", "--scm-address", socket}, args...)...)
	require.Zero(t, code, "%v: %s", args, errs)
	require.Empty(t, errs)
	return out
}

// bad runs a command that must, with one line that holds text.
func bad(t *testing.T, socket, text string, args ...string) {
	t.Helper()
	code, _, errs := ctl(t, append([]string{"scm", "--scm-address", socket}, args...)...)
	require.Equal(t, exitFailure, code, "%v: %s", args, errs)
	require.Contains(t, errs, text, "%v", args)
	require.Equal(t, 1, strings.Count(errs, "\n"), errs)
}

// container gives a process a region, as the hook does for a container.
func container(t *testing.T, socket, id, size string) *exec.Cmd {
	t.Helper()
	c := exec.Command("sleep", "1000")
	c.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	require.NoError(t, c.Start())
	t.Cleanup(func() { _ = c.Process.Kill(); _ = c.Wait() })
	n, err := region.ParseSize(size)
	require.NoError(t, err)
	files, err := api.Call(socket, api.OpAttach, api.Attach{Namespace: "default", Container: id, Pid: c.Process.Pid, Size: n}, nil)
	require.NoError(t, err)
	api.CloseAll(files)
	return c
}

var when = regexp.MustCompile(`\d{4}-\d\d-\d\dT[0-9:]+Z`)

func TestRegions(t *testing.T) {
	socket, store := regionServer(t, region.Options{Limit: 64 << 20, Quota: region.Quota{Bytes: 32 << 20, Regions: 8}})
	require.Equal(t, "volume orders of 4m in namespace default\n", good(t, socket, "create", "orders", "--size", "4m"))
	good(t, socket, "create", "wide", "--size", "1m", "--shared", "-n", "other")
	running := container(t, socket, "web", "2m")

	out := when.ReplaceAllString(good(t, socket, "ls"), "WHEN")
	require.Equal(t, `NAMESPACE  REGION         SIZE  NVM      CREATED  USED BY  MARKS   ORIGIN
default    container/web  2m    2.10 MB  WHEN  web      -       -
default    orders         4m    4.19 MB  WHEN  -        -       -
other      wide           1m    1.05 MB  WHEN  -        shared  -
quota of namespace default: 6.29 MB of 33.6 MB (18.8 %), 2 of 8 regions
quota of namespace other: 1.05 MB of 33.6 MB (3.1 %), 1 of 8 regions
`, regexp.MustCompile(`(WHEN|CREATED) +`).ReplaceAllString(out, "$1  "))
	require.Equal(t, 3, strings.Count(good(t, socket, "ls", "-n", "other"), "\n"))
	require.Contains(t, good(t, socket, "inspect", "orders"), "counts for  namespace default, which has 6.29 MB of 33.6 MB (18.8 %), 2 of 8 regions\n")
	require.Contains(t, good(t, socket, "inspect", "container/web"), "used by     web, process ")
	require.Contains(t, good(t, socket, "df"), "default    2        6.29 MB  33.6 MB, 8 regions\n")
	require.Contains(t, good(t, socket, "df"), "limit             67.1 MB (10.9 %)\n")

	// What it is, and as JSON.
	var r region.Record
	require.NoError(t, json.Unmarshal([]byte(good(t, socket, "inspect", "orders", "--json")), &r))
	require.Equal(t, int64(4<<20), r.Size)
	require.Equal(t, region.Volume, r.Kind)
	var l region.Listing
	require.NoError(t, json.Unmarshal([]byte(good(t, socket, "ls", "--json")), &l))
	require.Len(t, l.Regions, 3)
	require.Equal(t, region.Account{Usage: region.Usage{Bytes: 6 << 20, Regions: 2}, Quota: region.Quota{Bytes: 32 << 20, Regions: 8}}, l.Namespaces["default"])
	var s region.Space
	require.NoError(t, json.Unmarshal([]byte(good(t, socket, "df", "--json")), &s))
	require.Equal(t, int64(7<<20), s.Promised)

	// Larger, copied, kept.
	require.Equal(t, "volume orders of 8m in namespace default\n", good(t, socket, "resize", "orders", "8m"))
	require.Equal(t, "snapshot before of 8m in namespace default\n", good(t, socket, "snapshot", "orders", "before"))
	require.Equal(t, "volume again of 8m in namespace default\n", good(t, socket, "clone", "snapshot/before", "again"))
	require.Equal(t, "when container web is removed its region becomes volume web\n", good(t, socket, "keep", "web"))
	require.Contains(t, good(t, socket, "ls"), "keep")
	good(t, socket, "keep", "container/web", "--off")
	require.NotContains(t, good(t, socket, "ls"), "keep")

	// What is refused, says what and why.
	bad(t, socket, `region nothing of namespace "default": not found`, "inspect", "nothing")
	bad(t, socket, "already exists", "create", "orders", "--size", "1m")
	bad(t, socket, "quota", "create", "large", "--size", "32m")
	good(t, socket, "create", "large", "--size", "32m", "-n", "a")
	bad(t, socket, "all regions together may have 64m", "create", "large", "--size", "32m", "-n", "b")
	bad(t, socket, "it would be taken for a size", "create", "16m", "--size", "1m")
	bad(t, socket, "stop that first", "rm", "container/web")
	bad(t, socket, "NAME, container/ID or snapshot/NAME", "inspect", "pod/x")
	require.NoError(t, running.Process.Kill())
	_ = running.Wait() // killed
	require.Equal(t, "removed container/web\nremoved again\n", good(t, socket, "rm", "container/web", "again"))
	require.Len(t, store.List("default"), 2)
}

// put writes a number to a region of scmlib.
func put(t *testing.T, path string, n uint64) {
	t.Helper()
	st, err := os.Stat(path)
	require.NoError(t, err)
	r, err := scmlib.Open(path, scmlib.Options{Create: true, Size: st.Size()})
	require.NoError(t, err)
	root, err := scmlib.Root[uint64](r)
	require.NoError(t, err)
	require.NoError(t, r.Update(func(tx *scmlib.Tx) error { err := tx.Add(root.In(r)); *root.In(r) = n; return err }))
	require.NoError(t, r.Close())
}

func number(t *testing.T, path string) uint64 {
	t.Helper()
	r, err := scmlib.Open(path, scmlib.Options{ReadOnly: true})
	require.NoError(t, err)
	defer r.Close()
	root, err := scmlib.Root[uint64](r)
	require.NoError(t, err)
	return *root.In(r)
}

func dataOf(socket, key string) string {
	return filepath.Join(filepath.Dir(socket), "nvm", "r", "k", key, "data")
}

// A region travels through a file, a pipe and a registry, and damage on the way makes nothing.
func TestRegionsTravel(t *testing.T) {
	socket, store := regionServer(t, region.Options{})
	good(t, socket, "create", "a", "--size", "1m")
	put(t, dataOf(socket, "volume+default+a"), 42)
	file := filepath.Join(t.TempDir(), "a.scmimg")
	require.Regexp(t, `a\.scmimg: .* in use, .*`, good(t, socket, "export", "a", file))
	bad(t, socket, "file exists", "export", "a", file)
	bad(t, socket, "not found", "export", "gone", file+".gone")
	require.NoFileExists(t, file+".gone")
	stream := good(t, socket, "export", "a")
	require.True(t, strings.HasPrefix(stream, "SCMIMG1\n"))

	require.Equal(t, "volume b of 1m in namespace default\n", good(t, socket, "import", "b", file))
	require.Equal(t, uint64(42), number(t, dataOf(socket, "volume+default+b")))
	bad(t, socket, "already exists", "import", "b", file)
	whole, err := os.ReadFile(file)
	require.NoError(t, err)
	for name, damaged := range map[string][]byte{
		"cut": whole[:len(whole)-7], "turned": append(append([]byte{}, whole[:300]...), append([]byte{whole[300] ^ 1}, whole[301:]...)...), "empty": nil, "other": []byte("hello"),
		"longer": append(append([]byte{}, whole...), 0),
	} {
		require.NoError(t, os.WriteFile(file, damaged, 0o600))
		bad(t, socket, "region", "import", "c-"+name, file)
	}
	bad(t, socket, "is a directory", "import", "c-dir", t.TempDir())
	require.Len(t, store.List(""), 2)

	hub := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer hub.Close()
	ref := strings.TrimPrefix(hub.URL, "http://") + "/regions/a:1"
	require.Contains(t, good(t, socket, "push", "a", ref), "@sha256:")
	require.Equal(t, "volume d of 1m in namespace default\n", good(t, socket, "pull", ref, "d"))
	require.Equal(t, uint64(42), number(t, dataOf(socket, "volume+default+d")))
	bad(t, socket, "pull region from", "pull", ref+"0", "e")
}

func TestRegionsAreChecked(t *testing.T) {
	socket, _ := regionServer(t, region.Options{})
	good(t, socket, "create", "a", "--size", "1m")
	require.Contains(t, good(t, socket, "check", "a"), "not scmlib's")
	path := dataOf(socket, "volume+default+a")
	put(t, path, 1)
	require.Contains(t, good(t, socket, "check", "a"), "both copies are good")

	f, err := os.OpenFile(path, os.O_RDWR, 0)
	require.NoError(t, err)
	defer f.Close()
	_, err = f.WriteAt(bytes.Repeat([]byte{0xff}, 512), 0) // the first copy of the header
	require.NoError(t, err)
	require.Contains(t, good(t, socket, "check", "a"), "one copy is damaged")
	good(t, socket, "check", "a", "--repair")
	require.Contains(t, good(t, socket, "check", "a"), "both copies are good")
}

// A program of the host has a volume where a container would, alone, until it ends.
func TestAttach(t *testing.T) {
	socket, store := regionServer(t, region.Options{})
	good(t, socket, "create", "a", "--size", "1m")
	attach := func(args ...string) *exec.Cmd {
		c := exec.Command(os.Args[0], append([]string{"scm", "--scm-address", socket, "attach"}, args...)...)
		c.Env = append(os.Environ(), asProgram+"=1", "SCM_REGION=/elsewhere")
		c.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
		return c
	}
	out, err := attach("a", "--", "sh", "-c", `printf hello | dd of="$SCM_REGION" conv=notrunc 2>/dev/null; stat -c "%s %n" "$SCM_REGION"; ls /dev/scm; exit 7`).CombinedOutput()
	var exit *exec.ExitError
	require.ErrorAs(t, err, &exit, "%s", out)
	require.Equal(t, 7, exit.ExitCode(), "%s", out)
	require.Equal(t, "1048576 /dev/scm/region\nregion\n", string(out))
	b, err := os.ReadFile(dataOf(socket, "volume+default+a"))
	require.NoError(t, err)
	require.Equal(t, "hello", string(b[:5]))

	// Who comes second is told; the host sees nothing.
	c := attach("a", "sleep", "1000")
	require.NoError(t, c.Start())
	t.Cleanup(func() { _ = c.Process.Kill(); _ = c.Wait() })
	require.Eventually(t, func() bool { return len(store.List("")[0].Users) == 1 }, 20*time.Second, time.Millisecond)
	require.Equal(t, c.Process.Pid, store.List("")[0].Users[0].Pid)
	out, err = attach("a", "true").CombinedOutput()
	require.Error(t, err)
	require.Contains(t, string(out), "uses it; stop that first")
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	require.NoError(t, err)
	require.NotContains(t, string(mounts), "/dev/scm")
	require.NoError(t, c.Process.Kill())
	_ = c.Wait() // killed
	require.NoError(t, attach("a", "true").Run())

	bad(t, socket, "make it by nhybridctl scm create", "attach", "none", "true")
	bad(t, socket, "executable file not found", "attach", "a", "no-such-program")
}

// The socket is the one that the daemon names.
func TestRegionSocket(t *testing.T) {
	socket, _ := regionServer(t, region.Options{})
	c := config.Default()
	c.SCM.Address = socket
	code, out, errs := ctl(t, "scm", "create", "a", "--size", "1m", "--address", serve(t, &backend{}, c))
	require.Zero(t, code, errs)
	require.Contains(t, out, "volume a")
	_, out, _ = ctl(t, "du", "--address", serve(t, &backend{}, c))
	require.Contains(t, out, "\nregions on NVM: 1.05 MB, and 0 B that wait in the pool")
	usage := func(c config.Config) (u struct {
		Regions *region.Space
		Unknown string `json:"regions_unknown"`
	}) {
		t.Helper()
		code, out, errs := ctl(t, "du", "--json", "--address", serve(t, &backend{}, c))
		require.Zero(t, code, errs)
		require.NoError(t, json.Unmarshal([]byte(out), &u), out)
		return u
	}
	require.EqualValues(t, 1<<20, usage(c).Regions.Promised)
	gone := c
	gone.SCM.Address = "/nowhere/scm.sock"
	require.Nil(t, usage(gone).Regions)
	require.Contains(t, usage(gone).Unknown, "it does not run")
	c.SCM.Enabled = false
	require.Nil(t, usage(c).Regions)
	require.Empty(t, usage(c).Unknown)
	off := serve(t, &backend{}, c)
	for _, x := range []struct {
		args []string
		code int
		text string
	}{
		{[]string{"ls", "--address", off}, exitFailure, "set scm.enabled = true"},
		{[]string{"ls", "--address", "/nowhere/control.sock"}, exitFailure, "cannot reach the daemon at /nowhere/control.sock"},
		{[]string{"ls", "--scm-address", "/nowhere/scm.sock"}, exitFailure, "it does not run, or gives no regions"},
		{[]string{"ls", "--scm-address", "scm.sock"}, exitUsage, "absolute path"},
		{[]string{"create", "b", "--scm-address", socket}, exitUsage, "say --size"},
		{[]string{"create", "b", "--size", "big", "--scm-address", socket}, exitUsage, `size "big"`},
		{[]string{"create", "b", "--size", "1k", "--scm-address", socket}, exitUsage, "scm create: size"},
		{[]string{"resize", "a", "x", "--scm-address", socket}, exitUsage, `size "x"`},
		{[]string{"export", "a", "--json", "--scm-address", socket}, exitUsage, "name a file"},
		{nil, exitUsage, "scm: say create"},
		{[]string{"rm"}, exitUsage, "requires at least 1 arg"},
	} {
		code, out, errs := ctl(t, append([]string{"scm"}, x.args...)...)
		require.Equal(t, x.code, code, "%v: %s", x.args, errs)
		require.Empty(t, out)
		require.Contains(t, errs, x.text, "%v", x.args)
		require.Equal(t, 1, strings.Count(errs, "\n"), errs)
	}
	code, out, _ = ctl(t, "__complete", "scm", "--scm-address", socket, "rm", "")
	require.Zero(t, code)
	require.Equal(t, "a", strings.SplitN(out, "\n", 2)[0])
}

// Who is interrupted does not wait, and the daemon does not go on.
func TestInterruptedExport(t *testing.T) {
	socket, store := regionServer(t, region.Options{Rate: 16 << 20})
	good(t, socket, "create", "a", "--size", "8m")
	require.NoError(t, os.WriteFile(dataOf(socket, "volume+default+a"), bytes.Repeat([]byte{7}, 8<<20), 0o600))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var errs bytes.Buffer
	code := run(ctx, []string{"scm", "--scm-address", socket, "export", "a"}, writer(func([]byte) { cancel() }), &errs)
	require.Equal(t, exitFailure, code)
	require.Equal(t, "nhybridctl: export was interrupted\n", errs.String())
	require.NotEmpty(t, store.List(""))
}
