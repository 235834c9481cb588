// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package hddsim is a disk with the timing of an HDD, counters, and a power cut: one file served through FUSE, a loop
// device with direct I/O on it, ext4 on that. All I/O of the device passes through the model: misses of the page cache,
// read-ahead, write-back by the kernel, journal, flushes; whatever the cgroup, which blkio.throttle cannot say.
//
// The server is a process of its own, this program once more under another name: importing the package is enough.
package hddsim

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/integration/hddsim/block"
)

// serverName is the name under which this program starts itself as the server.
const serverName = "nhybrid-hddsim"

// init turns the process into a server when it was started as one. It must happen before main, of which this package
// knows nothing.
func init() {
	if filepath.Base(os.Args[0]) != serverName {
		return
	}
	if err := serveChild(os.Args[1:]); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	os.Exit(0)
}

// childArgs are the arguments of a server process.
type childArgs struct {
	Image    string `json:"image"`
	Dir      string `json:"dir"`
	Mount    string `json:"mount"`
	Model    Model  `json:"model"`
	Volatile bool   `json:"volatile"`
	// Detached servers live on when the process that started them is gone.
	Detached bool `json:"detached"`
}

const readyLine = "ready"

// serveChild's first argument, the image, is there for whoever looks at the list of processes.
func serveChild(args []string) error {
	if len(args) != 2 {
		return errors.New("hddsim: the server is started by hddsim.Start only")
	}
	var a childArgs
	if err := json.Unmarshal([]byte(args[1]), &a); err != nil {
		return fmt.Errorf("hddsim: arguments of server: %w", err)
	}
	faults := newBreaker()
	if !a.Detached {
		go func() {
			// The pipe ends when the other process does, however it dies. umount is a process of its own, since it
			// waits for what this one serves.
			_, _ = io.Copy(io.Discard, os.Stdin)
			_ = faults.set(Fault{}) // the zero value is right
			_ = exec.Command("umount", "-l", a.Mount).Run()
			_ = exec.Command("umount", "-l", a.Dir).Run()
			os.Exit(1)
		}()
	}
	return serve(a.Image, a.Dir, a.Model, a.Volatile, faults, func() { fmt.Println(readyLine) })
}

// Options of a disk.
type Options struct {
	// Dir is the directory of the disk's files, made by Start and removed by Close. Required.
	Dir string
	// Size in bytes. 0: 2 GiB. The image is sparse.
	Size int64
	// Model is the timing; nil: HDD(). A pointer to the zero Model costs nothing.
	Model *Model
	// Volatile keeps what is written in memory until a flush, so that PowerCut loses it.
	Volatile bool
	// NoJournal leaves out ext4's journal. A journal that cannot be written makes all of the filesystem read-only.
	NoJournal bool
	// Detached lets the disk live on when this process ends without Close.
	Detached bool
}

// Disk is a mounted disk. Its methods must not be called at the same time, except Counters, SetModel and SetFault.
type Disk struct {
	options Options
	cmd     *exec.Cmd
	stdin   io.Closer
	exited  chan struct{}
	loop    *block.Loop
}

// Start makes the disk and mounts it.
func Start(ctx context.Context, o Options) (_ *Disk, err error) {
	if !filepath.IsAbs(o.Dir) {
		return nil, fmt.Errorf("start disk: Options.Dir %q is not an absolute path", o.Dir)
	}
	if o.Size == 0 {
		o.Size = 2 << 30
	}
	if o.Model == nil {
		m := HDD()
		o.Model = &m
	}
	d := &Disk{options: o}
	if err := os.MkdirAll(o.Dir, 0o711); err != nil {
		return nil, fmt.Errorf("start disk: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("start disk in %q: %w", o.Dir, err), d.Close())
		}
	}()
	if err := makeImage(ctx, d.imagePath(), o); err != nil {
		return nil, err
	}
	return d, d.boot(ctx)
}

// makeImage formats the image before the model is in the way.
func makeImage(ctx context.Context, path string, o Options) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(o.Size), f.Close()); err != nil {
		return err
	}
	if o.NoJournal {
		return block.MakeExt4(ctx, path, "-O", "^has_journal")
	}
	return block.MakeExt4(ctx, path)
}

func (d *Disk) imagePath() string { return filepath.Join(d.options.Dir, "hdd.img") }
func (d *Disk) fuseDir() string   { return filepath.Join(d.options.Dir, "fuse") }

// Mountpoint is where the disk's ext4 is mounted.
func (d *Disk) Mountpoint() string { return filepath.Join(d.options.Dir, "hdd") }

// Device is the path of the block device.
func (d *Disk) Device() string { return d.loop.Path() }

// Pid is the server's process.
func (d *Disk) Pid() int { return d.cmd.Process.Pid }

func (d *Disk) boot(ctx context.Context) error {
	if err := d.serve(ctx); err != nil {
		return err
	}
	loop, err := block.Attach(filepath.Join(d.fuseDir(), diskName))
	if err != nil {
		return err
	}
	d.loop = loop
	return block.Mount(loop.Path(), d.Mountpoint(), "ext4", unix.MS_NOATIME, "")
}

func (d *Disk) serve(ctx context.Context) error {
	if err := os.MkdirAll(d.fuseDir(), 0o700); err != nil {
		return err
	}
	args, err := json.Marshal(childArgs{
		d.imagePath(), d.fuseDir(), d.Mountpoint(), *d.options.Model, d.options.Volatile, d.options.Detached,
	})
	if err != nil {
		return err
	}
	// Not bound to ctx: the disk outlives Start, and dies with Close or the pipe.
	cmd := exec.Command("/proc/self/exe", d.imagePath(), string(args))
	cmd.Args[0] = serverName
	// Out of the terminal's reach: an interrupt is for the caller, who then closes the disk in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(d.options.Dir, "hddsim.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd.Stderr = log
	read, write, err := os.Pipe()
	if err != nil {
		return err
	}
	defer read.Close()
	cmd.Stdout = write
	err = cmd.Start()
	_ = write.Close()
	if err != nil {
		return fmt.Errorf("start server: %w", err)
	}
	d.cmd, d.stdin, d.exited = cmd, stdin, make(chan struct{})
	go func() {
		_ = cmd.Wait() // its status says no more than that it ended
		close(d.exited)
	}()
	answer := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(read).ReadString('\n')
		answer <- strings.TrimSpace(line)
	}()
	select {
	case line := <-answer:
		if line != readyLine {
			return fmt.Errorf("start server: %q", line)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("start server: %w", ctx.Err())
	}
}

// Counters asks the running disk what it has been asked so far.
func (d *Disk) Counters() (Counters, error) {
	var c Counters
	b, err := os.ReadFile(filepath.Join(d.fuseDir(), countersName))
	if err == nil {
		err = json.Unmarshal(b, &c)
	}
	if err != nil {
		return c, fmt.Errorf("read counters of disk: %w", err)
	}
	return c, nil
}

// SetModel changes the timing from the next request on, for example to prepare a benchmark at no cost.
func (d *Disk) SetModel(m Model) error {
	if err := d.control(modelName, m); err != nil {
		return err
	}
	*d.options.Model = m
	return nil
}

// SetFault lets requests fail, or wait, from the next one on. It takes the place of the fault that was set before; requests
// that wait are looked at again. A disk works again after PowerOn.
func (d *Disk) SetFault(f Fault) error { return d.control(faultName, f) }

// Keep is the share of blocks, from 0 to 1, that a disk had written by itself when the power was cut, though nobody had asked
// for it. Equal seeds choose equal blocks.
type Keep struct {
	Share float64 `json:"share"`
	Seed  uint64  `json:"seed"`
}

// Persist makes a share of what was not flushed durable, as any disk does for itself in any order. What it did not choose, a
// PowerCut that follows loses.
func (d *Disk) Persist(k Keep) error { return d.control(keepName, k) }

// control writes a value to one of the server's files.
func (d *Disk) control(name string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(d.fuseDir(), name), os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("set %s of disk: %w", name, err)
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("set %s of disk: %w", name, err)
	}
	return nil
}

// PowerCut ends the disk at once: with Options.Volatile what was written since the last flush is lost. The filesystem is
// unmounted; programs that use it get I/O errors, and should have been killed before, as a power cut would.
func (d *Disk) PowerCut() error {
	if err := d.signal(syscall.SIGUSR1); err != nil {
		return fmt.Errorf("cut power of disk: %w", err)
	}
	<-d.exited
	return d.unmount()
}

// PowerOn starts and mounts a disk after PowerCut, on what it had kept.
func (d *Disk) PowerOn(ctx context.Context) error {
	if err := d.boot(ctx); err != nil {
		return fmt.Errorf("power on disk: %w", err)
	}
	return nil
}

func (d *Disk) signal(s os.Signal) error {
	if err := d.cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return nil
}

// unmount takes the layers down from the top.
func (d *Disk) unmount() error {
	errs := []error{block.UnmountBelow(d.Mountpoint())}
	if d.loop != nil {
		errs = append(errs, d.loop.Close())
		d.loop = nil
	}
	return errors.Join(append(errs, block.DetachBelow(d.options.Dir), block.UnmountBelow(d.fuseDir()))...)
}

// stopTimeout is how long the server has to end once it is unmounted. An HDD may have seconds of writes to do.
const stopTimeout = time.Minute

// Close unmounts the disk and removes it with all that is stored there, whatever state it is in.
func (d *Disk) Close() error {
	_ = d.SetFault(Fault{}) // or the unmount would wait for requests that are held; there may be no server any more
	errs := []error{d.unmount()}
	if d.cmd != nil && d.exited != nil {
		errs = append(errs, d.signal(syscall.SIGTERM))
		select {
		case <-d.exited:
		case <-time.After(stopTimeout):
			errs = append(errs, fmt.Errorf("server of disk did not end within %v, killed", stopTimeout), d.signal(syscall.SIGKILL))
			<-d.exited
		}
		_ = d.stdin.Close() // the other end is gone
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close disk in %q: %w", d.options.Dir, err)
	}
	return os.RemoveAll(d.options.Dir)
}
