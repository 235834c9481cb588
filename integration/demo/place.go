// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/integration/hddsim/block"
	"github.com/nhybrid/nhybrid/integration/rig"
)

const hddSize = 4 << 30 // of a sparse file

// place is where a demo works: one directory, with a locked file beside it that says who is there and what to remove
// when it is gone. So a demo that was killed is cleared away by the next.
type place struct {
	dir  string
	lock *os.File
	note note
}

// note is the content of the lock file.
type note struct {
	Pid    int     `json:"pid"`
	Guests []guest `json:"guests,omitempty"`
}

// guest is a directory of ours on storage that somebody else owns.
type guest struct {
	Device string `json:"device,omitempty"` // "": Dir is a path of this machine, else one on the device's filesystem
	Dir    string `json:"dir"`
}

// errBusy says that another process holds the place.
var errBusy = errors.New("busy")

// openPlace takes the place of that name, by default one for each working directory. Where another process has it, the
// place comes with errBusy and holds nothing but the note.
func openPlace(name string) (*place, error) {
	if name == "" {
		wd, err := os.Getwd()
		if err != nil {
			return nil, err
		}
		sum := sha256.Sum256([]byte(wd))
		name = hex.EncodeToString(sum[:4])
	}
	if strings.ContainsAny(name, "/\x00") {
		return nil, fmt.Errorf("name %q: must not hold a slash", name)
	}
	p := &place{dir: filepath.Join(os.TempDir(), "nh-demo-"+name)}
	for {
		f, err := os.OpenFile(p.dir+".lock", os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			return nil, fmt.Errorf("open lock: %w", err)
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			busy := errors.Is(err, unix.EWOULDBLOCK)
			err = fmt.Errorf("lock %q: %w", f.Name(), err)
			if busy {
				_ = json.NewDecoder(f).Decode(&p.note) // half written: nothing is known of the holder
				err = errBusy
			}
			return p, errors.Join(err, f.Close())
		}
		// The one who had it may have removed the file in between; then ours has no name any more.
		held, err := f.Stat()
		if err != nil {
			return nil, errors.Join(err, f.Close())
		}
		if named, err := os.Stat(f.Name()); err != nil || !os.SameFile(held, named) {
			_ = f.Close()
			continue
		}
		_ = json.NewDecoder(f).Decode(&p.note) // a new file is empty
		p.lock = f
		return p, nil
	}
}

// leftovers says if an earlier demo was killed.
func (p *place) leftovers() bool {
	_, err := os.Lstat(p.dir)
	return err == nil || len(p.note.Guests) > 0
}

// enter makes the place ours.
func (p *place) enter() error {
	p.note.Pid = os.Getpid()
	return errors.Join(p.write(), os.MkdirAll(p.dir, 0o711))
}

func (p *place) write() error {
	b, err := json.Marshal(p.note)
	if err != nil {
		return err
	}
	if err := p.lock.Truncate(0); err != nil {
		return err
	}
	_, err = p.lock.WriteAt(append(b, '\n'), 0)
	return err
}

// remove takes down all that is in the place: processes, mounts, loop devices, files, here and where we were guests.
// What fails is kept in the note for another try.
func (p *place) remove() error {
	err := rig.Remove(p.dir)
	if err != nil {
		return err // what is still mounted below must not be removed
	}
	var errs []error
	p.note.Guests = slices.DeleteFunc(p.note.Guests, func(g guest) bool {
		err := p.leave(g)
		errs = append(errs, err)
		return err == nil
	})
	if err := errors.Join(errs...); err != nil {
		return errors.Join(err, p.write())
	}
	return errors.Join(os.Remove(p.lock.Name()), p.lock.Close())
}

func (p *place) leave(g guest) error {
	if g.Device == "" {
		return os.RemoveAll(g.Dir)
	}
	return p.onDevice(g.Device, func(mnt string) error { return os.RemoveAll(filepath.Join(mnt, g.Dir)) })
}

// onDevice calls f with a mount of the device that lasts as long as the call. It is not in our directory, which is
// removed with all that is in it.
func (p *place) onDevice(device string, f func(mnt string) error) (err error) {
	fstype, err := filesystemOn(device)
	if err != nil {
		return err
	}
	mnt := p.dir + ".device"
	if err := block.Mount(device, mnt, fstype, unix.MS_NOATIME, ""); err != nil {
		return err
	}
	defer func() {
		// Remove, not RemoveAll: it fails where the unmount has failed.
		err = errors.Join(err, block.Unmount(mnt), os.Remove(mnt))
	}()
	return f(mnt)
}

// filesystemOn never leads to formatting: a device without a filesystem may hold what nobody recognises.
func filesystemOn(device string) (string, error) {
	out, err := exec.Command("blkid", "-p", "-o", "value", "-s", "TYPE", device).Output()
	fstype := strings.TrimSpace(string(out))
	if err != nil || fstype == "" {
		return "", fmt.Errorf("device %q has no filesystem that is known; if nothing on it matters: mkfs.ext4 %s", device, device)
	}
	return fstype, nil
}

// tier gives the root of a tier on the storage that the user names: a directory of our own on it.
func (p *place) tier(what, where string) (string, error) {
	where, err := filepath.Abs(where)
	if err != nil {
		return "", err
	}
	st, err := os.Stat(where)
	if err != nil {
		return "", fmt.Errorf("%s: %w; name a directory or a block device", what, err)
	}
	g := guest{Dir: filepath.Base(p.dir) + "-" + strings.ToLower(what)}
	root := filepath.Join(p.dir, strings.ToLower(what))
	bind := func(parent string) error {
		own := filepath.Join(parent, filepath.Base(g.Dir))
		if err := os.Mkdir(own, 0o711); err != nil {
			return err
		}
		// By a bind mount, so that whatever is mounted in it lies below our directory and goes with it.
		return block.Mount(own, root, "", unix.MS_BIND, "")
	}
	switch mode := st.Mode(); {
	case mode.IsDir():
		g.Dir = filepath.Join(where, g.Dir)
		if err := p.promise(g); err != nil {
			return "", err
		}
		err = bind(where)
	case mode&os.ModeDevice != 0 && mode&os.ModeCharDevice == 0:
		g.Device = where
		if _, err := filesystemOn(where); err != nil {
			return "", fmt.Errorf("%s: %w", what, err)
		}
		if err := p.promise(g); err != nil {
			return "", err
		}
		err = p.onDevice(where, bind)
	default:
		return "", fmt.Errorf("%s: %q is neither a directory nor a block device", what, where)
	}
	if errors.Is(err, os.ErrExist) {
		// Not made by this demo, so not to be removed by it.
		p.note.Guests = p.note.Guests[:len(p.note.Guests)-1]
		err = errors.Join(fmt.Errorf("%w; remove it if it is left from a demo before a reboot", err), p.write())
	}
	if err != nil {
		return "", fmt.Errorf("%s: make tier on %q: %w", what, where, err)
	}
	return root, nil
}

// promise writes down what is to be removed, before it is made.
func (p *place) promise(g guest) error {
	p.note.Guests = append(p.note.Guests, g)
	return p.write()
}

// emulatedHDD makes ext4 on a loop device over a sparse file. It has no disk's slowness; what goes where is the same.
func (p *place) emulatedHDD(ctx context.Context) (string, error) {
	img, root := filepath.Join(p.dir, "hdd.img"), filepath.Join(p.dir, "hdd")
	f, err := os.OpenFile(img, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return "", err
	}
	if err := errors.Join(f.Truncate(hddSize), f.Close()); err != nil {
		return "", err
	}
	loop, err := block.Attach(img)
	if err != nil {
		return "", err
	}
	defer loop.Close() // the mount keeps it
	if err := block.MakeExt4(ctx, loop.Path()); err != nil {
		return "", err
	}
	if err := block.Mount(loop.Path(), root, "ext4", unix.MS_NOATIME, ""); err != nil {
		return "", err
	}
	return filepath.Join(root, "nhybrid"), nil
}
