// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package rig runs a real containerd with nhybrid, a registry and a link between them, in a directory of its own, for
// tests, the demo and benchmarks. Any number of rigs may run side by side. It needs root and the programs of `make
// tools build`.
package rig

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/nhybrid/nhybrid/integration/image"
	"github.com/nhybrid/nhybrid/integration/link"
)

// PauseName is the image of pod sandboxes, which a rig with CRI pushes to its registry.
const PauseName = "pause:1"

// Options of a rig. The zero value is a rig with the daemon on an NVM of 512 MiB and an unlimited link.
type Options struct {
	// Dir is the working directory, at most 40 bytes long for the sake of the sockets in it. "": a new one in the
	// directory for temporary files. Close removes it in either case.
	Dir string
	// Bin holds the programs. "": $NHYBRID_BIN, else bin/ of the repository around the working directory.
	Bin string

	// NoDaemon leaves nhybrid out: containerd alone, with its overlayfs snapshotter.
	NoDaemon bool
	// NVM and HDD are the roots of the tiers. NVM "": ext4 over tmpfs, of NVMSize bytes (0: 512 MiB).
	// HDD "": a directory in Dir. Given ones are not removed by Close.
	NVM, HDD string
	NVMSize  int64
	NVMMkfs  []string // further options of mkfs.ext4
	// ContainerdRoot is containerd's directory for content and metadata. "": a directory in Dir.
	ContainerdRoot string

	// DaemonArgs are further arguments of the daemon, for example "--set", "placement.policy=hdd".
	DaemonArgs []string
	// DaemonConfig is TOML added to the daemon's configuration file, which sets version, control_address and
	// containerd.address: tables, or keys before the first table.
	DaemonConfig string
	// DaemonEnv is added to the daemon's environment, "NAME=value".
	DaemonEnv []string
	// ContainerdEnv is added to containerd's environment, "NAME=value".
	ContainerdEnv []string
	// ContainerdConfig is TOML added at the end of containerd's configuration file: tables.
	ContainerdConfig string
	// ConcurrentUnpacks above 1 lets containerd unpack so many layers of an image at a time, by the capability
	// "rebase".
	ConcurrentUnpacks int
	// NoDiffer leaves layers to containerd's own applier, as for a client that was not told of ours.
	NoDiffer bool
	// DiffService makes our differ the first of containerd's diff service, for clients that unpack by themselves.
	DiffService bool
	// Capabilities of the proxy plugin. nil: "remap-ids", and "rebase" where ConcurrentUnpacks is above 1.
	Capabilities []string
	// Sockets holds the daemon's sockets in this process and passes them to the daemon, as systemd does for a socket unit.
	Sockets bool
	// CRI turns containerd's CRI plugin on.
	CRI bool

	// Rate (bytes a second; 0: no limit) and Latency of the link.
	Rate    float64
	Latency time.Duration
	// RegistryDir keeps the blobs of the registry. "": a directory in Dir.
	RegistryDir string

	// Keep lets Close leave everything but the registry running and the directory in place. Remove takes it down.
	Keep bool
}

// Rig is a running rig.
type Rig struct {
	// Dir is its working directory.
	Dir string
	// NVM and HDD are the roots of the tiers, "" with NoDaemon.
	NVM, HDD string
	// Namespace is containerd's namespace of the rig's commands. It is unique on the machine, since runc's state
	// is common to all containerds.
	Namespace string
	// Snapshotter is the default of the rig's commands: nhybrid, or overlayfs with NoDaemon.
	Snapshotter string
	Registry    *Registry
	Link        *link.Link
	Containerd  *Process
	// Daemon is nil with NoDaemon.
	Daemon *Process

	options    Options
	bin        string
	linkServer *http.Server
	linkAddr   string
	nvm        *NVM
	sockets    []*os.File // with Options.Sockets

	mu     sync.Mutex
	client *client.Client
}

// TB is the part of testing.TB that New needs.
type TB interface {
	Helper()
	Context() context.Context
	Cleanup(func())
	Failed() bool
	Logf(format string, args ...any)
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
}

// New starts a rig that is taken down when the test ends. After a failed test the ends of the logs are shown.
func New(t TB, o Options) *Rig {
	t.Helper()
	r, err := Start(t.Context(), o)
	if err != nil {
		t.Fatalf("start rig: %v", err)
		return nil
	}
	t.Cleanup(func() {
		if t.Failed() {
			for _, p := range []*Process{r.Daemon, r.Containerd} {
				if p != nil {
					t.Logf("the end of the log of %s:\n%s", p.name, p.LogTail(6000))
				}
			}
		}
		if err := r.Close(); err != nil {
			t.Errorf("take down rig: %v", err)
		}
	})
	return r
}

// Start starts a rig. What was started before a failure is taken down again.
func Start(ctx context.Context, o Options) (_ *Rig, err error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("the rig mounts filesystems and runs containers: run it as root")
	}
	r := &Rig{options: o, Snapshotter: "nhybrid"}
	if o.NoDaemon {
		r.Snapshotter = "overlayfs"
	}
	if r.bin, err = findBin(o.Bin); err != nil {
		return nil, err
	}
	if err := r.makeDir(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			r.options.Keep = false
			err = errors.Join(err, r.Close())
		}
	}()
	if err := r.serveImages(ctx); err != nil {
		return nil, err
	}
	if err := r.makeTiers(ctx); err != nil {
		return nil, err
	}
	if r.options.Capabilities == nil {
		r.options.Capabilities = []string{"remap-ids"}
		if o.ConcurrentUnpacks > 1 {
			r.options.Capabilities = append(r.options.Capabilities, "rebase")
		}
	}
	r.defineProcesses()
	if err := errors.Join(r.writeContainerdConfig(), r.writeDaemonConfig()); err != nil {
		return nil, fmt.Errorf("write configuration: %w", err)
	}
	if o.Sockets {
		if err := r.holdSockets(); err != nil {
			return nil, err
		}
	}
	if r.Daemon != nil {
		if err := r.Daemon.Start(ctx); err != nil {
			return nil, err
		}
	}
	if err := r.Containerd.Start(ctx); err != nil {
		return nil, err
	}
	return r, nil
}

// findBin looks for the programs.
func findBin(bin string) (string, error) {
	if bin == "" {
		bin = os.Getenv("NHYBRID_BIN")
	}
	if bin == "" {
		dir, err := os.Getwd()
		if err != nil {
			return "", err
		}
		for ; bin == ""; dir = filepath.Dir(dir) {
			if _, err := os.Stat(filepath.Join(dir, "tools", "go.mod")); err == nil {
				bin = filepath.Join(dir, "bin")
			} else if dir == "/" {
				return "", errors.New("no repository around the working directory: set NHYBRID_BIN to its bin/")
			}
		}
	}
	if _, err := os.Stat(filepath.Join(bin, "containerd")); err != nil {
		return "", fmt.Errorf("%w: run `make tools build` first", err)
	}
	return filepath.Abs(bin)
}

func (r *Rig) makeDir() error {
	var random [4]byte
	_, _ = rand.Read(random[:]) // never fails
	id := hex.EncodeToString(random[:])
	r.Dir, r.Namespace = r.options.Dir, "nh-"+id
	if r.Dir == "" {
		r.Dir = filepath.Join(os.TempDir(), "nh-"+id)
	}
	// A unix socket's path has at most 107 bytes; the longest of ours is containerd's "run/…/shim…", the next
	// "c.sock.ttrpc".
	if !filepath.IsAbs(r.Dir) || len(r.Dir) > 40 {
		return fmt.Errorf("directory of rig %q: must be absolute and at most 40 bytes long; set TMPDIR to a shorter one", r.Dir)
	}
	if r.options.ContainerdRoot == "" {
		r.options.ContainerdRoot = filepath.Join(r.Dir, "containerd")
	}
	return os.MkdirAll(r.Dir, 0o711)
}

func (r *Rig) serveImages(ctx context.Context) (err error) {
	dir := r.options.RegistryDir
	if dir == "" {
		dir = filepath.Join(r.Dir, "registry")
	}
	if r.Registry, err = NewRegistry(dir); err != nil {
		return err
	}
	r.Link, r.linkServer, r.linkAddr, err = newLink(link.Options{
		Upstream: r.Registry.Addr(), Rate: r.options.Rate, Latency: r.options.Latency,
	})
	if err != nil || !r.options.CRI {
		return err
	}
	pause, err := image.Pause()
	if err != nil {
		return err
	}
	return r.Push(ctx, PauseName, pause)
}

func (r *Rig) makeTiers(ctx context.Context) (err error) {
	if r.options.NoDaemon {
		return nil
	}
	if r.HDD = r.options.HDD; r.HDD == "" {
		r.HDD = filepath.Join(r.Dir, "hdd")
	}
	if r.NVM = r.options.NVM; r.NVM == "" {
		size := r.options.NVMSize
		if size == 0 {
			size = 512 << 20
		}
		if r.nvm, err = NewNVM(ctx, filepath.Join(r.Dir, "pm"), size, r.options.NVMMkfs...); err != nil {
			return err
		}
		r.NVM = filepath.Join(r.nvm.Mountpoint(), "nhybrid")
	}
	return errors.Join(os.MkdirAll(r.HDD, 0o711), os.MkdirAll(r.NVM, 0o711))
}

func (r *Rig) defineProcesses() {
	path := "PATH=" + r.bin + ":" + os.Getenv("PATH")
	r.Containerd = &Process{
		name: "containerd", keep: r.options.Keep, env: append([]string{path}, r.options.ContainerdEnv...),
		args:    []string{filepath.Join(r.bin, "containerd"), "--config", filepath.Join(r.Dir, "containerd.toml")},
		logPath: filepath.Join(r.Dir, "log", "containerd.log"),
		ready: func(ctx context.Context) error {
			c, err := r.Client()
			if err != nil {
				return err
			}
			_, err = c.IsServing(ctx)
			return err
		},
	}
	if r.options.NoDaemon {
		return
	}
	r.Daemon = &Process{
		name: "containerd-nhybrid-grpc", keep: r.options.Keep, env: append([]string{path}, r.options.DaemonEnv...),
		args: append([]string{
			filepath.Join(r.bin, "containerd-nhybrid-grpc"), "--config", filepath.Join(r.Dir, "nhybrid.toml"),
			"--address", r.DaemonSocket(), "--root", r.HDD, "--nvm-root", r.NVM, "--log-level", "debug",
			// Runtimes look for CDI specifications in directories of the whole machine.
			"--set", "scm.address=" + r.RegionSocket(), "--set", "scm.cdi_spec=", "--set", "scm.nri_socket=" + r.NRISocket(),
		}, r.options.DaemonArgs...),
		logPath: filepath.Join(r.Dir, "log", "nhybrid.log"),
		ready:   func(ctx context.Context) error { return serving(ctx, r.ControlSocket()) },
	}
}

// serving asks the health service behind a socket.
func serving(ctx context.Context, socket string) error {
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	answer, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{})
	if err != nil {
		return err
	}
	if answer.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		return fmt.Errorf("health of %q: %v", socket, answer.GetStatus())
	}
	return nil
}

// ContainerdSocket is the path of containerd's socket.
func (r *Rig) ContainerdSocket() string { return filepath.Join(r.Dir, "c.sock") }

// DaemonSocket is the path of the snapshotter's socket.
func (r *Rig) DaemonSocket() string { return filepath.Join(r.Dir, "n.sock") }

// ControlSocket is the path of the socket of nhybridctl.
func (r *Rig) ControlSocket() string { return filepath.Join(r.Dir, "ctl.sock") }

// RegionSocket is the path of the socket of regions.
func (r *Rig) RegionSocket() string { return filepath.Join(r.Dir, "scm.sock") }

// NRISocket is the path of the socket on which containerd waits for plugins of NRI, with CRI.
func (r *Rig) NRISocket() string { return filepath.Join(r.Dir, "nri.sock") }

// Client is a client of containerd, the same for all callers, that the rig closes.
func (r *Rig) Client() (*client.Client, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.client == nil {
		c, err := client.New(r.ContainerdSocket(), client.WithDefaultNamespace(r.Namespace))
		if err != nil {
			return nil, fmt.Errorf("connect to containerd: %w", err)
		}
		r.client = c
	}
	return r.client, nil
}

// Context adds the rig's namespace for calls of Client.
func (r *Rig) Context(ctx context.Context) context.Context {
	return namespaces.WithNamespace(ctx, r.Namespace)
}

// Ref is the reference by which an image is pulled through the link.
func (r *Rig) Ref(name string) string { return r.linkAddr + "/" + name }

// BlobPath is where a blob of an image is fetched over the link: host, port and path.
func (r *Rig) BlobPath(name, digest string) string {
	repository, _, _ := strings.Cut(name, ":")
	return r.linkAddr + "/v2/" + repository + "/blobs/" + digest
}

// Push stores an image in the registry, past the link.
func (r *Rig) Push(ctx context.Context, name string, img v1.Image) error {
	return image.Push(ctx, r.Registry.Addr()+"/"+name, img)
}

// PushTiny makes an image of generated files and stores it under the name.
func (r *Rig) PushTiny(ctx context.Context, name string, spec image.TinySpec) (v1.Image, error) {
	img, err := image.Tiny(spec)
	if err != nil {
		return nil, err
	}
	return img, r.Push(ctx, name, img)
}

// PushBusybox stores an image with Debian's static busybox as a single layer, plus the layers that are given.
func (r *Rig) PushBusybox(ctx context.Context, name string, above ...v1.Layer) (v1.Image, error) {
	img, err := image.Busybox(above...)
	if err != nil {
		return nil, err
	}
	return img, r.Push(ctx, name, img)
}

func tidyLines(s string) string { return strings.TrimRight(s, "\n") }
