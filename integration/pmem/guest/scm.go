// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// languages of the library, each with a program ledger-go or ledger-c, on this machine and in the image.
var languages = []string{"go", "c"}

// facts are what a ledger says of its region, by the first word of each line.
type facts map[string]string

func readFacts(out string) facts {
	f := facts{}
	for line := range strings.Lines(out) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		f[key] = value
	}
	return f
}

// want compares facts with pairs of name and value.
func (f facts) want(pairs ...string) error {
	var wrong []string
	for i := 0; i+1 < len(pairs); i += 2 {
		if f[pairs[i]] != pairs[i+1] {
			wrong = append(wrong, fmt.Sprintf("%s is %q, want %q", pairs[i], f[pairs[i]], pairs[i+1]))
		}
	}
	if len(wrong) > 0 {
		return fmt.Errorf("%s (because %s)", strings.Join(wrong, "; "), f["why"])
	}
	return nil
}

// runner runs a program, on this machine or in a container.
type runner func(ctx context.Context, program string, args ...string) (string, error)

func onHost(ctx context.Context, program string, args ...string) (string, error) {
	return output(ctx, program, args...)
}

// info asks the ledger of a language what the region at path is.
func info(ctx context.Context, run runner, language string, args ...string) (facts, error) {
	out, err := run(ctx, "/bin/ledger-"+language, append([]string{"info"}, args...)...)
	return readFacts(out), err
}

// isRefused shows that a ledger does not get what it requires, and is told all of words.
func isRefused(ctx context.Context, run runner, language string, args []string, words ...string) error {
	f, err := info(ctx, run, language, args...)
	if err == nil {
		return fmt.Errorf("%s: %q is granted with %s, and should be refused", language, args, f["granularity"])
	}
	for _, word := range words {
		if !strings.Contains(f["failed:"], word) {
			return fmt.Errorf("%s: %q is refused, but not by naming %s: %w", language, args, word, err)
		}
	}
	return nil
}

// eADR tells whether this boot's persistent memory is one whose promise includes the processor's caches.
func (g *guest) eADR() bool { return g.domain == "cpu" }

// granularity is what regions on DAX must have, and what the flushes are done by.
func (g *guest) granularity() (granularity, instruction string) {
	if g.eADR() {
		return "byte", "none"
	}
	return "cache line", "clwb"
}

// checkDomain shows that the kernel says of the emulated memory what the host has chosen.
func (g *guest) checkDomain(context.Context) error {
	want := map[string]string{"mem-ctrl": "memory_controller", "cpu": "cpu_cache"}[g.domain]
	found, err := filepath.Glob("/sys/bus/nd/devices/region*/persistence_domain")
	if err != nil {
		return err
	}
	if want == "" {
		if len(found) > 0 {
			return fmt.Errorf("there is %s, and nothing was said of a domain", found[0])
		}
		return nil
	}
	if len(found) != 1 {
		return fmt.Errorf("%d regions say their persistence domain, want 1", len(found))
	}
	data, err := os.ReadFile(found[0])
	if err != nil {
		return err
	}
	if got := strings.TrimSpace(string(data)); got != want {
		return fmt.Errorf("%s is %q, want %q", found[0], got, want)
	}
	return nil
}

// checkDAX shows that a library that requires persistent memory gets it, at path or where the environment says, from that mount and as fine as this
// memory is.
func (g *guest) checkDAX(ctx context.Context, run runner, language, mount string, path ...string) error {
	granularity, instruction := g.granularity()
	eadr := map[bool]string{false: "0", true: "1"}[g.eADR()]
	f, err := info(ctx, run, language, append([]string{"-granularity", "cacheline", "-durability", "power"}, path...)...)
	if err != nil {
		return err
	}
	err = f.want("granularity", granularity, "durability", "power loss", "dax", "1", "mapsync", "1", "eadr", eadr, "instruction", instruction, "filesystem", g.fs)
	if err != nil {
		return fmt.Errorf("%s: %w", language, err)
	}
	if !strings.Contains(f["mount"], mount) {
		return fmt.Errorf("%s: the mount is %s, want %s", language, f["mount"], mount)
	}
	return nil
}

// scmHost shows what regions the programs of this machine get on the NVM tier, and that to require more is refused.
func (g *guest) scmHost(ctx context.Context) error {
	path, mount := filepath.Join(nvm, "trial-region"), fmt.Sprintf("%s %q on %q", g.fs, nvmDev, nvm)
	for _, language := range languages {
		err := g.checkDAX(ctx, onHost, language, mount, path)
		if err != nil {
			return err
		}
		byByte := []string{"-granularity", "byte", path}
		if g.eADR() {
			_, err = info(ctx, onHost, language, byByte...)
		} else {
			err = isRefused(ctx, onHost, language, byByte, mount, "byte is required", "gives cache line")
		}
		if err := errors.Join(err, os.Remove(path)); err != nil {
			return err
		}
	}
	return nil
}

// pageOnly shows that a region at path, which run sees at seen, is one of msync, and that to require more is refused by naming the mount, and leaves
// nothing there.
func pageOnly(ctx context.Context, run runner, language, path, seen, mount, why string) error {
	if err := isRefused(ctx, run, language, []string{"-granularity", "cacheline", seen}, "cache line is required", mount, "gives page", why); err != nil {
		return err
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s: the open was refused, but has left %s: %w", language, path, err)
	}
	f, err := info(ctx, run, language, seen)
	if err == nil {
		err = f.want("granularity", "page", "mapsync", "0", "instruction", "msync")
	}
	if err := errors.Join(err, os.Remove(path)); err != nil {
		return fmt.Errorf("%s: %w", language, err)
	}
	return nil
}

// scmRefused shows that nobody gets persistent memory from a disk, nor durability from tmpfs.
func scmRefused(ctx context.Context) error {
	path := filepath.Join(hdd, "trial-region")
	for _, language := range languages {
		if err := pageOnly(ctx, onHost, language, path, path, fmt.Sprintf("ext4 %q on %q", hddDev, hdd), "not mounted with DAX"); err != nil {
			return err
		}
		if err := isRefused(ctx, onHost, language, []string{"-durability", "power", "/run/trial-region"}, "power loss", `tmpfs "run" on "/run"`, "process crash"); err != nil {
			return err
		}
	}
	return nil
}

// withoutDAX shows the same of persistent memory whose filesystem somebody has mounted without the option.
func (g *guest) withoutDAX(ctx context.Context) error {
	if err := unix.Mount(nvmDev, nvm, g.fs, 0, ""); err != nil {
		return fmt.Errorf("mount %s without DAX: %w", nvmDev, err)
	}
	var err error
	path := filepath.Join(nvm, "trial-region")
	for _, language := range languages {
		err = errors.Join(err, pageOnly(ctx, onHost, language, path, path, fmt.Sprintf("%s %q on %q", g.fs, nvmDev, nvm), "not mounted with DAX"))
	}
	return errors.Join(err, unix.Unmount(nvm, 0))
}

// inContainer runs programs in a container that runs.
func inContainer(c container) runner {
	return func(ctx context.Context, program string, args ...string) (string, error) {
		return c.exec(ctx, append([]string{program}, args...)...)
	}
}

// scmContainer looks at persistent memory from within a container: its region, which is mounted there as one file; a file on a bind mount of the
// NVM tier; and a file of its root filesystem, which is an overlay.
func (g *guest) scmContainer(ctx context.Context) error {
	bound := filepath.Join(nvm, "bound")
	if err := os.MkdirAll(bound, 0o755); err != nil {
		return err
	}
	c, err := g.startContainer(ctx, "scm", g.image(), []string{
		"--device", "nhybrid.io/scm=8m", "--mount", "type=bind,src=" + bound + ",dst=/tmp,options=rbind:rw",
		"--snapshotter-label", "containerd.io/snapshot/nhybrid.upper-tier=nvm", "--cap-add", "CAP_SYS_ADMIN",
	})
	if err != nil {
		return err
	}
	run := inContainer(c)
	look := func() error {
		for _, language := range languages {
			// Where the environment says.
			if err := g.checkDAX(ctx, run, language, fmt.Sprintf("%s %q on %q", g.fs, nvmDev, "/dev/scm/region")); err != nil {
				return fmt.Errorf("region: %w", err)
			}
			if err := g.checkDAX(ctx, run, language, fmt.Sprintf("%s %q on %q", g.fs, nvmDev, "/tmp"), "/tmp/region-"+language); err != nil {
				return fmt.Errorf("bind mount: %w", err)
			}
			if err := pageOnly(ctx, run, language, c.root()+"/data/region", "/data/region", `on "/"`, "overlayfs refuses MAP_SYNC"); err != nil {
				return fmt.Errorf("root filesystem: %w", err)
			}
		}
		out, err := run(ctx, "/bin/probe-top", "/dev/scm/region")
		if err != nil {
			return err
		}
		return g.checkProbe(out, "file", true)
	}
	err = errors.Join(look(), c.remove(ctx), os.RemoveAll(bound))
	if err != nil {
		return err
	}
	return poll(ctx, func() error { return noRegion("container/scm") })
}

// noRegion shows that a region is gone from the store.
func noRegion(ref string) error {
	found, err := os.ReadDir(filepath.Join(nvm, "nhybrid/r/k"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	kind, name, _ := strings.Cut(ref, "/")
	for _, d := range found {
		if d.Name() == kind+"+default+"+name {
			return fmt.Errorf("region %s is still there", ref)
		}
	}
	return nil
}

// scmDoctor shows that the doctor has tried MAP_SYNC and says what it means.
func (g *guest) scmDoctor(ctx context.Context) error {
	out, err := output(ctx, "nhybridctl", "doctor")
	if err != nil {
		return err
	}
	granularity := "cache line by clwb"
	why := "MAP_SYNC is accepted"
	if g.eADR() {
		granularity, why = "byte, a fence is enough", "MAP_SYNC is accepted, and every persistence domain holds the processor caches"
	}
	for _, want := range []string{
		"regions are persistent memory (" + granularity + "), and survive loss of power: " + why,
		"containers ask for regions by ",
	} {
		if !strings.Contains(strings.Join(strings.Fields(out), " "), want) {
			return fmt.Errorf("the doctor does not say %q, but: %s", want, out)
		}
	}
	return nil
}
