// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package host finds out what this machine's kernel and filesystems can do: by doing it in a scratch directory, since
// versions and configuration tell less than a trial.
package host

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Features is what trial mounts showed.
type Features struct {
	DataOnly   bool   // overlayfs takes data-only layers and follows redirects into them
	Metacopy   bool   // it does so only with metacopy=on (Linux before 6.16)
	FileBacked bool   // EROFS mounts from a plain file, without a loop device
	StackOK    bool   // on a container whose tree is file-backed, one more overlay can be mounted
	Loop       bool   // EROFS mounts through a loop device
	IDMap      bool   // an EROFS tree can be idmapped and carries an overlay then
	IndexOff   bool   // overlayfs takes index=off
	UserNS     bool   // this process runs in a user namespace other than the first
	Kernel     string // release, as uname -r gives it
}

// Options are the mount options that Features asks for beside the paths.
func (f Features) Options() []string {
	var o []string
	if f.IndexOff {
		o = append(o, "index=off")
	}
	if f.Metacopy {
		o = append(o, "metacopy=on")
	}
	return o
}

// UseLoop tells if trees are to be mounted through loop devices: where files cannot be mounted, and where doing so
// would take from containers the overlay mounts of their own.
func (f Features) UseLoop() bool { return f.Loop && (!f.FileBacked || !f.StackOK) }

// Check gives the reason why nhybrid cannot run here, with the cure, as an errdefs.ErrFailedPrecondition; nil: it can.
func (f Features) Check() error {
	switch {
	case f.UserNS:
		return fmt.Errorf("kernel: this process runs in a user namespace, where overlayfs would trust attributes that an image can forge; run it in the first one: %w", errdefs.ErrFailedPrecondition)
	case !f.FileBacked && !f.Loop:
		return fmt.Errorf("kernel %s: EROFS mounts neither from a file nor from a loop device; enable CONFIG_EROFS_FS, CONFIG_EROFS_FS_XATTR and CONFIG_BLK_DEV_LOOP, or load the modules erofs and loop: %w", f.Kernel, errdefs.ErrFailedPrecondition)
	case !f.DataOnly:
		return fmt.Errorf("kernel %s: overlayfs has no data-only layers; Linux 6.5 or newer with CONFIG_OVERLAY_FS is needed: %w", f.Kernel, errdefs.ErrFailedPrecondition)
	}
	return nil
}

const (
	// The tree of an image for Probe holds one file of this name and size, whose data is found at this redirect.
	probeName     = "probe"
	probeRedirect = "/probe/data"
	probeData     = "nhybrid finds out what the kernel can do\n"
)

// Probe makes trial mounts below dir, a directory on a tier, and leaves nothing behind. The least privileged way is tried
// first. image is a valid EROFS image, of which Image makes one; only with that one is it also seen that a file's data
// is found. The error is about the trial itself (no permission, no space): what the kernel cannot do is no error.
func Probe(dir string, image []byte) (f Features, err error) {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return f, fmt.Errorf("ask the kernel for its release: %w", err)
	}
	f.Kernel = unix.ByteSliceToString(uts.Release[:])
	f.UserNS = inUserNS()

	t, err := newTrial(dir, image)
	if err != nil {
		return f, err
	}
	defer func() { err = errors.Join(err, t.clean()) }()

	tree := t.tree
	fileErr := t.mountFile(tree)
	f.FileBacked = fileErr == nil
	loop := filepath.Join(t.dir, "loop")
	loopErr := t.mountLoop(loop)
	f.Loop = loopErr == nil
	switch {
	case errors.Is(fileErr, unix.EPERM) || errors.Is(loopErr, unix.EPERM):
		return f, fmt.Errorf("mount a trial tree below %q: %w; nhybrid needs CAP_SYS_ADMIN", dir, unix.EPERM)
	case !f.FileBacked && !f.Loop:
		return f, nil
	case !f.FileBacked:
		tree = loop
	}

	// A writable and a read-only one: both kinds of container mounts.
	for _, metacopy := range []bool{false, true} {
		f.Metacopy = metacopy
		options := f.Options()
		if t.overlay("rw", tree, true, options) == nil && t.overlay("ro", tree, false, options) == nil && t.reads("rw") && t.reads("ro") {
			f.DataOnly = true
			break
		}
		t.unmount("rw", "ro")
	}
	if !f.DataOnly {
		f.Metacopy = false
		return f, nil
	}
	t.unmount("ro")
	f.IndexOff = t.overlay("ro", tree, false, append(f.Options(), "index=off")) == nil
	f.StackOK = t.stacks("rw")
	f.IDMap = t.idmaps(tree, f.Options())
	return f, nil
}

// trial is a scratch directory with what the trials need, and the mounts made so far.
type trial struct {
	dir, image, tree string
	mounts           []string
	whole            bool // the image is the one of Image
}

func newTrial(dir string, image []byte) (*trial, error) {
	tmp, err := os.MkdirTemp(dir, ".trial-")
	if err != nil {
		return nil, fmt.Errorf("make a directory for trial mounts: %w", err)
	}
	t := &trial{dir: tmp, image: filepath.Join(tmp, "image"), tree: filepath.Join(tmp, "tree")}
	for _, d := range []string{"tree", "loop", "nvm/probe", "hdd", "rw", "ro", "deep", "over", "idmap", "mapped"} {
		err = errors.Join(err, os.MkdirAll(filepath.Join(tmp, d), 0o755))
	}
	err = errors.Join(err,
		os.WriteFile(t.image, image, 0o600),
		os.WriteFile(filepath.Join(tmp, "nvm", probeRedirect), []byte(probeData), 0o644))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("prepare trial mounts: %w", err), os.RemoveAll(tmp))
	}
	t.whole = bytes.Equal(image, Image())
	return t, nil
}

func (t *trial) clean() error {
	for len(t.mounts) > 0 {
		last := len(t.mounts) - 1
		// Detached, so that whoever looks into the directory just now does not make it stay.
		if err := unix.Unmount(t.mounts[last], unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount trial %q: %w", t.mounts[last], err)
		}
		t.mounts = t.mounts[:last]
	}
	return os.RemoveAll(t.dir)
}

func (t *trial) mount(source, target, fs string, flags uintptr, options ...string) error {
	if err := unix.Mount(source, target, fs, flags, strings.Join(options, ",")); err != nil {
		return err
	}
	t.mounts = append(t.mounts, target)
	return nil
}

// unmount takes down those of the named mounts that exist.
func (t *trial) unmount(names ...string) {
	for _, name := range names {
		target := filepath.Join(t.dir, name)
		for i, m := range t.mounts {
			if m == target && unix.Unmount(m, unix.MNT_DETACH) == nil {
				t.mounts = append(t.mounts[:i], t.mounts[i+1:]...)
				break
			}
		}
	}
}

const treeFlags = unix.MS_RDONLY | unix.MS_NODEV | unix.MS_NOSUID

func (t *trial) mountFile(target string) error {
	return t.mount(t.image, target, "erofs", treeFlags)
}

func (t *trial) mountLoop(target string) error {
	device, err := AttachLoop(t.image)
	if err != nil {
		return err
	}
	defer device.Close() // autoclear: from here on the mount alone holds the device
	return t.mount(device.Name(), target, "erofs", treeFlags)
}

// overlay mounts a root filesystem as a container gets it, at name, with the trial's two data roots.
func (t *trial) overlay(name, tree string, writable bool, options []string) error {
	o := []string{"lowerdir=" + strings.Join([]string{tree, filepath.Join(t.dir, "nvm"), filepath.Join(t.dir, "hdd")}, "::")}
	if !writable {
		return t.mount("overlay", filepath.Join(t.dir, name), "overlay", unix.MS_RDONLY, append(o, options...)...)
	}
	// One pair a mount: overlayfs refuses a work directory that another mount uses, and one it used may be left mode 000.
	upper, err := t.upper(name)
	if err != nil {
		return err
	}
	return t.mount("overlay", filepath.Join(t.dir, name), "overlay", 0, append(append(o, upper...), options...)...)
}

func (t *trial) upper(name string) ([]string, error) {
	dir, err := os.MkdirTemp(t.dir, "upper-"+name+"-")
	if err != nil {
		return nil, err
	}
	upper, work := filepath.Join(dir, "fs"), filepath.Join(dir, "work")
	if err := errors.Join(os.Mkdir(upper, 0o755), os.Mkdir(work, 0o711)); err != nil {
		return nil, err
	}
	return []string{"upperdir=" + upper, "workdir=" + work}, nil
}

// reads tells if the data behind the tree is found; a foreign image has none that is known.
func (t *trial) reads(name string) bool {
	if !t.whole {
		return true
	}
	b, err := os.ReadFile(filepath.Join(t.dir, name, probeName))
	return err == nil && string(b) == probeData
}

// stacks tells if a container whose root is the mount at name can mount an overlay over it: filesystems may stack two
// deep, and some kernels count a file-backed EROFS as one level.
func (t *trial) stacks(name string) bool {
	upper, err := t.upper("over")
	if err != nil {
		return false
	}
	options := append([]string{"lowerdir=" + filepath.Join(t.dir, name)}, upper...)
	return t.mount("overlay", filepath.Join(t.dir, "over"), "overlay", 0, options...) == nil
}

// idmaps tells if a clone of the tree with other owners carries an overlay.
func (t *trial) idmaps(tree string, options []string) bool {
	// The user that is 0 in the tree becomes 65536 in the mount.
	ns, err := mount.GetUsernsFD("0:65536:65536", "0:65536:65536")
	if err != nil {
		return false
	}
	defer ns.Close()
	target := filepath.Join(t.dir, "idmap")
	if err := mount.IDMapMount(tree, target, int(ns.Fd())); err != nil {
		return false
	}
	t.mounts = append(t.mounts, target)
	if t.overlay("mapped", target, true, options) != nil || !t.reads("mapped") {
		return false
	}
	if !t.whole {
		return true
	}
	// Not the root: that one has the owner of the upper directory.
	var st unix.Stat_t
	return unix.Stat(filepath.Join(t.dir, "mapped", probeName), &st) == nil && st.Uid == 65536 && st.Gid == 65536
}

// inUserNS tells if the process's user ids are mapped, which they are not in the first user namespace.
func inUserNS() bool {
	b, err := os.ReadFile("/proc/self/uid_map")
	return err == nil && strings.Join(strings.Fields(string(b)), " ") != "0 0 4294967295"
}
