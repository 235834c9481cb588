// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/nhybrid/nhybrid/cmd/internal/config"
	"github.com/nhybrid/nhybrid/snapshotter/control"
	"github.com/nhybrid/nhybrid/snapshotter/host"
)

// What containerd calls the things that are looked at.
const (
	pluginTransfer = "io.containerd.transfer.v1.local"
	pluginImages   = "io.containerd.cri.v1.images" // since configuration version 3
	pluginRuntime  = "io.containerd.cri.v1.runtime"
	pluginCRI      = "io.containerd.grpc.v1.cri"    // version 2
	pluginGRPC     = "io.containerd.server.v1.grpc" // since version 4
	pluginDiff     = "io.containerd.service.v1.diff-service"
	pluginSnapshot = "io.containerd.snapshotter.v1" // types of proxy plugins
	pluginDiffer   = "io.containerd.differ.v1"
	annotations    = "enable_remote_snapshot_annotations"
)

// Containerd looks at containerd's configuration, whole and raw as Read gives them, for a daemon with configuration c
// that is to be known to containerd as name. sync measures what a small write takes until it is on the disk of a directory:
// Fsync, but for tests.
func Containerd(file string, whole, raw Table, c config.Config, name string, sync func(dir string) (time.Duration, error)) []Finding {
	f := &findings{area: "containerd"}
	switch v := whole.number("version"); {
	case v < 2:
		f.add(Warn, fmt.Sprintf("write \"version = 2\" or newer at the top of %s and its names for plugins", file), "the configuration is of version 1: what it says of plugins may be read otherwise than you think")
	case v > 4:
		f.add(Warn, "look for a newer nhybrid", "the configuration is of version %d, which is newer than what is known here", v)
	}
	name = proxy(f, file, whole, c, name)
	differ := proxyDiffer(f, file, whole, c, name)
	unpack(f, file, whole, name, differ)
	first := service(f, file, whole, differ)
	if cri(f, file, whole, name, first) {
		cdi(f, file, whole, c)
		nri(f, file, whole, c)
		validator(f, file, whole, c)
		registries(f, whole, c)
	}
	address(f, file, whole, raw, c)
	metadata(f, whole, sync)
	return f.all
}

// proxy looks for the entry of the snapshotter and gives the name that it goes by.
func proxy(f *findings, file string, t Table, c config.Config, name string) string {
	name, ok := entry(t, c, name, "snapshot", pluginSnapshot)
	section := "[proxy_plugins." + name + "]"
	if !ok {
		f.add(Fail, fmt.Sprintf("add to %s: %s with type = \"snapshot\" and address = %q", file, section, c.Address), "containerd knows no snapshotter %q: %s is missing", name, section)
		return name
	}
	p := t.at("proxy_plugins", name)
	if reaches(f, file, p, section, c, "snapshot", pluginSnapshot) {
		f.ok("snapshotter %q at %s", name, c.Address)
	}
	exports := section[:len(section)-1] + ".exports]"
	switch root := p.at("exports").text("root"); {
	case root == "":
		f.add(Warn, fmt.Sprintf("in %s, %s: root = %q", file, exports, c.Root), "exports.root is missing: the kubelet sees no image filesystem, so it neither reports nor collects images")
	case root != c.Root:
		f.add(Warn, fmt.Sprintf("in %s, %s: root = %q", file, exports, c.Root), "exports.root is %q and the daemon's root %q: the kubelet watches the wrong filesystem", root, c.Root)
	default:
		f.ok("exports.root is the HDD tier")
	}
	if v := p.at("exports")[annotations]; v == "true" {
		f.ok("containerd tells with each layer which image it belongs to")
	} else {
		f.add(Warn, fmt.Sprintf("in %s, %s: %s = \"true\"", file, exports, annotations), "%s is not \"true\": which image a layer belongs to has to be found from manifests, which takes longer", annotations)
	}
	capabilities := p.texts("capabilities")
	if slices.Contains(capabilities, "remap-ids") {
		f.ok("capability remap-ids: pods with user namespaces share layers")
	} else {
		f.add(Warn, fmt.Sprintf("in %s, %s: capabilities = [\"remap-ids\"]", file, section), "capability remap-ids is missing: for a pod with a user namespace containerd copies the whole image")
	}
	return name
}

// cri tells whether there is any. first tells whether the diff service asks nhybrid's differ first.
func cri(f *findings, file string, t Table, name string, first bool) bool {
	disabled := t.texts("disabled_plugins")
	if slices.Contains(disabled, pluginCRI) || slices.Contains(disabled, "cri") || slices.Contains(disabled, pluginImages) {
		f.ok("CRI is disabled: no Kubernetes on this containerd")
		return false
	}
	section, images := pluginImages, t.at("plugins", pluginImages)
	runtimes := t.at("plugins", pluginRuntime, "containerd", "runtimes")
	if t.number("version") < 3 {
		section, images = pluginCRI+"'.'containerd", t.at("plugins", pluginCRI, "containerd")
		runtimes = images.at("runtimes")
	}
	used := podsOf(f, file, section, images, runtimes, name)
	if images.truth("discard_unpacked_layers") {
		f.add(Warn, fmt.Sprintf("in %s, [plugins.'%s']: discard_unpacked_layers = false", file, section), "CRI throws blobs away once they are unpacked: after a crash or the loss of NVM, layers cannot be rebuilt from them")
	}
	if why := localPull(t, images); why != "" && used && !first {
		f.add(Warn, fmt.Sprintf("in %s, [plugins.'%s']: do without %s, or name the differ in [plugins.'%s']", file, section, why, pluginDiff),
			"CRI pulls without the transfer service because of %s, and so stores layers after they have arrived", why)
	}
	return true
}

// podsOf looks at which pods use the snapshotter, and reports whether any do.
func podsOf(f *findings, file, section string, images, runtimes Table, name string) bool {
	if images.text("snapshotter") == name {
		f.ok("CRI: pods use %q", name)
		return true
	}
	users := slices.DeleteFunc(keys(runtimes), func(r string) bool { return runtimes.at(r).text("snapshotter") != name })
	if len(users) > 0 {
		f.ok("CRI: pods of runtime %s use %q", strings.Join(users, ", "), name)
		return true
	}
	used := images.text("snapshotter")
	if used == "" {
		used = "overlayfs"
	}
	f.add(Warn, fmt.Sprintf("in %s, [plugins.'%s']: snapshotter = %q, if pods are to use it", file, section, name), "CRI: pods use %q", used)
	return false
}

// address compares the socket of containerd with the one that the daemon asks about downloads.
func address(f *findings, file string, whole, raw Table, c config.Config) {
	version := whole.number("version")
	have := whole.at("grpc").text("address")
	if version >= 4 {
		have = whole.at("plugins", pluginGRPC).text("address")
	}
	if raw.number("version") >= 4 && raw.at("grpc").text("address") != "" {
		f.add(Warn, fmt.Sprintf("in %s, write [plugins.'%s'] instead", file, pluginGRPC), "[grpc] in a configuration of version 4 is ignored")
	}
	if have == "" {
		have = config.Default().Containerd.Address
	}
	if have != c.Containerd.Address {
		f.add(Fail, fmt.Sprintf("set containerd.address = %q in nhybrid's configuration", have), "containerd listens on %q and nhybrid asks %q: no download would be seen, and each layer taken for the last", have, c.Containerd.Address)
	} else {
		f.ok("nhybrid asks the socket that containerd listens on")
	}
}

// startSyncs is how many times the start of a container waits for containerd's meta.db to reach the disk: six
// transactions of two fdatasync each, counted with strace under ctr run of containerd 2.4.
const startSyncs = 12

// slowSync is above what a solid disk takes for one small write and below half a turn of one with 7200 turns a minute.
const slowSync = 4 * time.Millisecond

func metadata(f *findings, t Table, measure func(dir string) (time.Duration, error)) {
	root := t.text("root")
	if root == "" {
		root = "/var/lib/containerd"
	}
	db := filepath.Join(root, "io.containerd.metadata.v1.bolt")
	dir, err := host.Existing(db)
	if err != nil {
		f.add(Warn, fmt.Sprintf("mend root = %q in containerd's configuration", root), "containerd's root was not looked at: %s", control.ErrorMessage(err))
		return
	}
	sync, err := measure(dir)
	if err != nil {
		f.add(Warn, fmt.Sprintf("run nhybridctl doctor as root, and make room in %q if it is full", dir), "the disk of containerd's meta.db was not measured: %s", control.ErrorMessage(err))
		return
	}
	cost := (startSyncs * sync).Round(time.Millisecond)
	if _, err := os.Stat(db); err != nil {
		db = root
	}
	if sync > slowSync {
		f.add(Warn, fmt.Sprintf("move %s to a fast disk, by a bind mount", db), "containerd's meta.db is on a slow disk, %.1f ms a write: each start of a container waits about %v for it", float64(sync)/1e6, cost)
		return
	}
	f.ok("containerd's meta.db takes %.2f ms a write, about %v a start", float64(sync)/1e6, cost)
}

func keys[V any](t map[string]V) []string {
	var all []string
	for k := range t {
		all = append(all, k)
	}
	slices.Sort(all)
	return all
}
