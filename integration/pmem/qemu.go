// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
)

// machine is a guest with its disks, which outlive its boots.
type machine struct {
	kernel          kernel
	initramfs, root string
	fs, snapshotter string
	registry        *registryServer // set by test
	out             string
}

// bootResult is what came of one boot.
type bootResult struct {
	planned, seen  []string
	passed, failed int
	end            string // "kill" where the guest asked for it, "done" where it ended by itself, else empty
}

// boots of a machine, in order. Those that end by "kill" lose their power at a random moment: while programs work in persistent memory, or
// while containers are given it and programs recover. Each has another persistence domain, which the library must notice.
var boots = []struct{ name, end, domain string }{
	{"first", "kill", ""},
	{"cut-working", "kill", "mem-ctrl"},
	{"cut-starting", "kill", "cpu"},
	{"second", "done", "mem-ctrl"},
}

// test boots the machine again and again, up to its end.
func (m machine) test(ctx context.Context, image [][]entry) (passed, failed int) {
	nvdimm, hdd := filepath.Join(m.out, m.fs+"-nvdimm.img"), filepath.Join(m.out, m.fs+"-hdd.img")
	defer os.Remove(nvdimm)
	defer os.Remove(hdd)
	if err := errors.Join(sparseFile(nvdimm, nvdimmBytes), sparseFile(hdd, hddBytes)); err != nil {
		progress("%s FAIL disks: %v", m.fs, err)
		return 0, 1
	}
	var err error
	if m.registry, err = serveRegistry(image); err != nil {
		progress("%s FAIL registry: %v", m.fs, err)
		return 0, 1
	}
	defer m.registry.Close()
	var blobs int64
	said := promises{}
	for _, boot := range boots {
		if m.snapshotter != "nhybrid" && strings.HasPrefix(boot.name, "cut-") {
			continue // there are no regions for containers without nhybrid
		}
		prefix := m.fs + "/" + boot.name
		r, err := m.boot(ctx, boot.name, boot.domain, nvdimm, hdd, said)
		switch {
		case err != nil:
			r.missing(prefix, err.Error())
		case r.end != boot.end:
			r.missing(prefix, "the guest ended before this check; its console is in "+m.console(boot.name))
		default:
			r.missing(prefix, "the guest has left this check out")
		}
		if err := said.read(m.promises(boot.name)); err != nil {
			r.report(prefix, "promises", err.Error())
		}
		if boot.name == "second" && r.end == "done" {
			why := ""
			if n := m.registry.blobs.Load(); n != blobs {
				why = fmt.Sprintf("%d blobs were asked for", n-blobs)
			}
			r.report(prefix, "nothing-pulled-again", why)
		}
		blobs = m.registry.blobs.Load()
		passed, failed = passed+r.passed, failed+r.failed
		if r.failed > 0 {
			progress("%s the guest's console is in %s", prefix, m.console(boot.name))
		}
		if r.end != boot.end {
			break
		}
	}
	return passed, failed
}

func (m machine) console(boot string) string {
	return filepath.Join(m.out, m.fs+"-"+boot+".log")
}

// boot starts QEMU, follows the checks, and returns when the guest has ended. It kills the guest when that asks for it, when ctx
// ends, and after bootTimeout.
func (m machine) boot(ctx context.Context, boot, domain, nvdimm, hdd string, said promises) (r *bootResult, err error) {
	r = &bootResult{}
	ctx, cancel := context.WithTimeoutCause(ctx, bootTimeout, fmt.Errorf("no end after %v; its console is in %s", bootTimeout, m.console(boot)))
	defer cancel()
	cmdline := fmt.Sprintf("console=ttyS0 quiet panic=-1 nhybrid.fs=%s nhybrid.boot=%s nhybrid.snapshotter=%s nhybrid.registry=%s nhybrid.domain=%s nhybrid.said=%s",
		m.fs, boot, m.snapshotter, m.registry.guestHost, domain, said)
	board := "q35,nvdimm=on"
	if domain != "" {
		board += ",nvdimm-persistence=" + domain
	}
	ports := m.promises(boot)
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64",
		"-machine", board, "-accel", "tcg", "-smp", "1", "-m", "1536M,slots=2,maxmem=8G",
		// QEMU 7.2 corrupts the flags of the guest at cmpxchg16b, and Linux 6.12 then dies at random.
		"-cpu", "max,-cx16",
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-monitor", "none",
		"-kernel", m.kernel.image(), "-initrd", m.initramfs, "-append", cmdline,
		"-object", "memory-backend-file,id=mem,share=on,size="+fmt.Sprint(nvdimmBytes)+",mem-path="+nvdimm, "-device", "nvdimm,id=nvdimm,memdev=mem",
		"-drive", "if=virtio,format=raw,readonly=on,file="+m.root,
		"-drive", "if=virtio,format=raw,cache=writeback,file="+hdd,
		"-nic", "user,model=virtio-net-pci",
		// QEMU writes what comes out of these to files at once: all that is in them was said before the power went.
		"-device", "virtio-serial-pci",
		"-chardev", "file,id=go,path="+ports["go"], "-device", "virtserialport,chardev=go,name=promises.go",
		"-chardev", "file,id=c,path="+ports["c"], "-device", "virtserialport,chardev=c,name=promises.c",
		"-serial", "file:"+m.console(boot), "-serial", "stdio")
	// The guest goes where this program goes, even if that is killed. The signal is bound to the thread that starts it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return r, fmt.Errorf("start guest: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return r, fmt.Errorf("start guest: %w", err)
	}
	r.follow(out, m.fs+"/"+boot, func(when string) {
		cut(ctx, m.fs+"/"+boot, when, ports)
		_ = cmd.Process.Kill()
	})
	err = cmd.Wait()
	if context.Cause(ctx) != nil {
		return r, context.Cause(ctx)
	}
	if err != nil && r.end != "kill" {
		return r, fmt.Errorf("run guest: %w: %s", err, lastLines(stderr.String(), 3))
	}
	return r, nil
}

// follow reads the lines of a guest until it ends. Each is a word and its argument: "plan" with the names of all the checks to come,
// "ok" and "FAIL" with a check, "note" with a text, "kill" with the moment that is meant, and "done".
func (r *bootResult) follow(lines io.Reader, prefix string, kill func(when string)) {
	scanner := bufio.NewScanner(lines)
	for scanner.Scan() {
		word, rest, _ := strings.Cut(strings.TrimSpace(scanner.Text()), " ")
		switch word {
		case "plan":
			r.planned = strings.Fields(rest)
		case "ok":
			r.report(prefix, rest, "")
		case "FAIL":
			name, why, _ := strings.Cut(rest, ": ")
			if why == "" {
				why = "no reason was given"
			}
			r.report(prefix, name, why)
		case "note":
			progress("%s      %s", prefix, rest)
		case "kill":
			r.end = word
			kill(rest)
		case "done":
			r.end = word
		}
	}
}
