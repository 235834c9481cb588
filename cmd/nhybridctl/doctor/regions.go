// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/cmd/internal/config"
	"github.com/nhybrid/nhybrid/scmlib"
	"github.com/nhybrid/nhybrid/snapshotter/control"
	"github.com/nhybrid/nhybrid/snapshotter/host"
)

// Regions looks at what persistent memory the programs in containers can have, by making a region on NVM, and at how containers ask for it. Where none are served,
// which its caller reports, nothing of that is ok.
func Regions(nvm host.Dir, c config.Config, served bool) []Finding {
	f := &findings{area: "regions"}
	if !c.SCM.Enabled {
		f.ok("regions are turned off (scm.enabled)")
		return f.all
	}
	info, err := try(nvm.Path)
	if lacks, is := noRoom(err, nvm); is {
		f.add(Warn, cureFull, "what persistent memory regions can be was not tried: %s", lacks)
		return f.all
	}
	if err != nil {
		f.add(Fail, "see dmesg for errors of the device", "a region was tried on NVM: %s", control.ErrorMessage(err))
		return f.all
	}
	guarantee(f, info, nvm)
	if c.SCM.CDISpec != "" && served { // how containers would ask for what none can have does not matter
		specification(f, c)
	}
	if !served {
		f.all = slices.DeleteFunc(f.all, func(f Finding) bool { return f.Level == OK })
	}
	return f.all
}

// try makes a region and looks at it.
func try(dir string) (i scmlib.Info, err error) {
	tmp, err := os.MkdirTemp(dir, ".nhybrid-doctor-")
	if err != nil {
		return i, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()
	r, err := scmlib.Open(filepath.Join(tmp, "region"), scmlib.Options{Create: true, Size: 64 << 10})
	if err != nil {
		return i, err
	}
	return r.Info(), r.Close()
}

func guarantee(f *findings, i scmlib.Info, nvm host.Dir) {
	pmem := strings.HasPrefix(nvm.Source, "/dev/pmem") || i.DAX
	why := control.Message(i.Why)
	switch {
	case i.Durability < scmlib.PowerLoss:
		f.add(Warn, "put nvm_root on persistent memory, or on any disk, mounted with barriers", "what programs persist in regions survives a %s and nothing more: %s", i.Durability, why)
	case i.Granularity < scmlib.Page:
		how := i.Granularity.String() + " by " + i.Instruction
		if i.Granularity == scmlib.Byte {
			how = "byte, a fence is enough"
		}
		f.ok("regions are persistent memory (%s), and survive loss of power: %s", how, why)
	case pmem && !i.DAX:
		f.add(Warn, fmt.Sprintf("mount %s with -o dax=always (ext4, or xfs without reflink, on an fsdax namespace)", nvm.Source),
			"regions are files in the page cache, written back by msync a page at a time, though the device is persistent memory: %s", why)
	case pmem:
		f.add(Warn, "use ext4 or xfs straight on an fsdax namespace (ndctl create-namespace -m fsdax), without device mapper", "NVM has DAX, but regions are written back by msync, a page at a time: %s", why)
	default:
		f.ok("regions survive loss of power, written back by msync a page at a time, as on any disk: %s", why)
	}
}

// specification reads what container runtimes read.
func specification(f *findings, c config.Config) {
	const restart = "install nhybrid-scm-hook beside the daemon's program, or set scm.hook, and restart the daemon; or set scm.cdi_spec = \"\""
	b, err := os.ReadFile(c.SCM.CDISpec)
	if errors.Is(err, fs.ErrNotExist) {
		f.add(Warn, restart, "containers cannot ask for regions: %q does not exist", c.SCM.CDISpec)
		return
	}
	var spec struct {
		Kind    string `json:"kind"`
		Devices []struct {
			Edits struct {
				Hooks []struct {
					Path string   `json:"path"`
					Args []string `json:"args"`
				} `json:"hooks"`
			} `json:"containerEdits"`
		} `json:"devices"`
	}
	if err == nil {
		err = json.Unmarshal(b, &spec)
	}
	if err == nil && (len(spec.Devices) == 0 || len(spec.Devices[0].Edits.Hooks) == 0) {
		err = errors.New("it names no hook")
	}
	if err != nil {
		f.add(Warn, "restart the daemon, which writes it anew", "containers cannot ask for regions: %q: %s", c.SCM.CDISpec, control.ErrorMessage(err))
		return
	}
	hook := spec.Devices[0].Edits.Hooks[0]
	switch err := unix.Access(hook.Path, unix.X_OK); {
	case err != nil:
		f.add(Fail, restart, "no container with a region starts: its hook %q cannot be run: %s", hook.Path, control.ErrorMessage(err))
	case spec.Kind != c.SCM.CDIKind || !slices.Contains(hook.Args, c.SCM.Address):
		f.add(Fail, "restart the daemon, which writes it anew", "%q is not that of this daemon: it is of kind %q and does not lead to %s", c.SCM.CDISpec, spec.Kind, c.SCM.Address)
	default:
		f.ok("containers ask for regions by %d devices of kind %s", len(spec.Devices), spec.Kind)
	}
}

// pluginNRI is the Node Resource Interface of containerd.
const pluginNRI = "io.containerd.nri.v1.nri"

// nri looks whether the annotations of pods reach the daemon.
func nri(f *findings, file string, t Table, c config.Config) {
	if !c.SCM.Enabled || !c.SCM.NRI {
		return
	}
	section, plugin := "[plugins.'"+pluginNRI+"']", t.at("plugins", pluginNRI)
	socket := plugin.text("socket_path")
	if socket == "" {
		socket = config.Default().SCM.NRISocket
	}
	// containerd 1.7, whose configurations are of version 2, has it turned off unless told otherwise, containerd 2 not.
	off, said := plugin["disable"].(bool)
	const without, or = "CRI: annotations of pods get no regions, ", ", or nhybrid's scm.nri = false"
	switch {
	case off || slices.Contains(t.texts("disabled_plugins"), pluginNRI):
		f.add(Warn, fmt.Sprintf("in %s, %s: disable = false, and not in disabled_plugins", file, section)+or, without+"NRI is turned off")
	case plugin.truth("disable_connections"):
		f.add(Warn, fmt.Sprintf("in %s, %s: disable_connections = false", file, section)+or, without+"NRI takes no plugins from outside")
	case strings.TrimPrefix(socket, "/var") != strings.TrimPrefix(c.SCM.NRISocket, "/var"): // the one is a link to the other
		f.add(Warn, fmt.Sprintf("set scm.nri_socket = %q in nhybrid's configuration", socket), without+"NRI is at %q and nhybrid looks at %q", socket, c.SCM.NRISocket)
	case plugin.at("default_validator").truth("enable") && plugin.at("default_validator").truth("reject_oci_hook_adjustment"):
		f.add(Warn, fmt.Sprintf("in %s, [plugins.'%s'.default_validator]: reject_oci_hook_adjustment = false", file, pluginNRI)+or, without+"NRI refuses the hook that brings them")
	case said || t.number("version") >= 3:
		f.ok("CRI: annotations of pods ask for regions by NRI at %s", socket)
	}
}

// cdi looks whether pods can ask, too. ctr and nerdctl look in the usual directories, whatever CRI is told.
func cdi(f *findings, file string, t Table, c config.Config) {
	if !c.SCM.Enabled || c.SCM.CDISpec == "" {
		return
	}
	section, runtime := pluginRuntime, t.at("plugins", pluginRuntime)
	if t.number("version") < 3 {
		section, runtime = pluginCRI, t.at("plugins", pluginCRI)
	}
	usual := []string{"/etc/cdi", "/var/run/cdi"}
	dir := filepath.Dir(c.SCM.CDISpec)
	dirs := runtime.texts("cdi_spec_dirs")
	if _, said := runtime["cdi_spec_dirs"]; !said {
		dirs = usual
	}
	if on, said := runtime["enable_cdi"].(bool); said && !on {
		f.add(Warn, fmt.Sprintf("in %s, [plugins.'%s']: enable_cdi = true", file, section), "CRI: pods cannot have regions, CDI is turned off")
	} else if !slices.Contains(dirs, dir) {
		f.add(Warn, fmt.Sprintf("in %s, [plugins.'%s']: add %q to cdi_spec_dirs", file, section, dir), "CRI: pods cannot have regions, %q is not searched for CDI specifications", dir)
	}
	if !slices.Contains(usual, dir) && dir != "/run/cdi" {
		f.add(Warn, "set scm.cdi_spec = \"/etc/cdi/nhybrid-scm.json\"", "ctr and nerdctl look for CDI specifications in %s, not in %q", strings.Join(usual, " and "), dir)
	}
}
