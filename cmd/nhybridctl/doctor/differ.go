// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"fmt"
	"runtime"
	"slices"
	"strings"

	"github.com/nhybrid/nhybrid/cmd/internal/config"
)

// walking is containerd's own differ, which writes to the mounts of any snapshotter.
const walking = "walking"

// entry finds the proxy plugin of one of two types: the one of that name, else one that has the daemon's address. The name
// comes back as it was where there is none.
func entry(t Table, c config.Config, name string, types ...string) (string, bool) {
	plugins := t.at("proxy_plugins")
	if _, ok := plugins[name]; ok {
		return name, true
	}
	for _, other := range keys(plugins) {
		p := plugins.at(other)
		if strings.TrimPrefix(p.text("address"), "unix://") == c.Address && slices.Contains(types, p.text("type")) {
			return other, true
		}
	}
	return name, false
}

// reaches tells whether a proxy plugin has its type, the first of types, and the daemon's address.
func reaches(f *findings, file string, p Table, section string, c config.Config, types ...string) bool {
	good := true
	if kind := p.text("type"); !slices.Contains(types, kind) {
		good = false
		f.add(Fail, fmt.Sprintf("in %s, %s: type = %q", file, section, types[0]), "%s has type %q", section, kind)
	}
	if have := p.text("address"); have != c.Address {
		good = false
		f.add(Fail, fmt.Sprintf("in %s, %s: address = %q", file, section, c.Address), "%s has address %q, the daemon listens on %q", section, have, c.Address)
	}
	return good
}

// proxyDiffer looks for the entry of the differ and gives the name that it goes by, "" where there is none. It is that of the
// snapshotter with -diff behind it.
func proxyDiffer(f *findings, file string, t Table, c config.Config, snapshotter string) string {
	name, ok := entry(t, c, snapshotter+"-diff", "diff", pluginDiffer)
	section := "[proxy_plugins." + name + "]"
	if !ok {
		f.add(Warn, fmt.Sprintf("add to %s: %s with type = \"diff\" and address = %q", file, section, c.Address),
			"containerd knows no differ %q: layers are unpacked by containerd after they have arrived, and packed once more by nhybrid", name)
		return ""
	}
	if reaches(f, file, t.at("proxy_plugins", name), section, c, "diff", pluginDiffer) {
		f.ok("differ %q at %s", name, c.Address)
	}
	return name
}

// unpack looks at what the transfer service unpacks for: it is behind ctr, nerdctl from 2.3 on and CRI. An empty differ is
// one that containerd does not know.
func unpack(f *findings, file string, t Table, name, differ string) {
	transfer := t.at("plugins", pluginTransfer)
	section := fmt.Sprintf("[[plugins.'%s'.unpack_config]]", pluginTransfer)
	have := map[string]Table{}
	for _, u := range transfer.tables("unpack_config") {
		platform := u.text("platform")
		s := u.text("snapshotter")
		if _, known := have[s]; !known && (platform == "" || platform == "linux" || platform == "linux/"+runtime.GOARCH || strings.HasPrefix(platform, "linux/"+runtime.GOARCH+"/")) {
			have[s] = u
		}
	}
	cure := func(s, differ string) string {
		return fmt.Sprintf("add to %s: %s with platform = \"linux/%s\", snapshotter = %q and differ = %q", file, section, runtime.GOARCH, s, differ)
	}
	ours := differ
	if ours == "" {
		ours = name + "-diff"
	}
	u, ok := have[name]
	if !ok {
		f.add(Fail, cure(name, ours), "no unpack_config names %q: ctr, nerdctl and CRI cannot pull for it (\"no unpack platforms defined\")", name)
		return
	}
	set := fmt.Sprintf("in %s, %s of snapshotter %q: differ = %q", file, section, name, ours)
	switch got := u.text("differ"); {
	case differ == "" && got == ours:
		f.add(Fail, "add the entry of the differ, as above", "unpack_config of %q names differ %q, which containerd does not know: it does not start", name, got)
	case differ == "": // told already
	case got == differ:
		f.ok("unpack_config names %q with differ %q: ctr, nerdctl from 2.3 on and CRI have layers stored while they download", name, differ)
	case got == "":
		f.add(Warn, set, "unpack_config of %q names no differ: containerd takes any, and where it takes its own, layers are stored after they have arrived", name)
	default:
		f.add(Warn, set, "unpack_config of %q names differ %q: layers are stored after they have arrived", name, got)
	}
	if n := transfer.number("max_concurrent_unpacks"); n > 1 && u.text("differ") != ours && slices.Contains(t.at("proxy_plugins", name).texts("capabilities"), "rebase") {
		f.add(Warn, fmt.Sprintf("%s; or in [plugins.'%s']: max_concurrent_unpacks = 1", set, pluginTransfer),
			"containerd unpacks %d layers at a time by itself, and then gives a directory that a layer implies without naming it mode 0755, whatever the layers below say: /tmp may not be writable", n)
	}
	if _, ok := have["overlayfs"]; !ok {
		f.add(Warn, cure("overlayfs", walking), "unpack_config does not name overlayfs any more, since a list of one's own replaces containerd's: pulls for overlayfs fail")
	}
	for _, s := range keys(have) {
		switch got := have[s].text("differ"); {
		case s == name || differ == "":
		case got == "":
			f.add(Warn, fmt.Sprintf("in %s, %s of snapshotter %q: differ = %q", file, section, s, walking),
				"unpack_config of %q names no differ: containerd may take %q, which does not unpack for it", s, differ)
		case got == differ:
			f.add(Fail, fmt.Sprintf("in %s, %s of snapshotter %q: differ = %q", file, section, s, walking), "unpack_config of %q names differ %q, which unpacks for %q only: pulls fail", s, got, name)
		}
	}
}

// others are the clients that unpack through containerd's diff service.
const others = "ctr --local, nerdctl before 2.3, BuildKit, and the first use of an image that another snapshotter unpacked"

// service looks at the differs that the diff service asks, one after the other, until one takes the mounts. It reports
// whether nhybrid's is the first.
func service(f *findings, file string, t Table, differ string) bool {
	order := t.at("plugins", pluginDiff).texts("default")
	if len(order) == 0 {
		order = []string{walking}
	}
	if differ == "" {
		return false
	}
	section := fmt.Sprintf("[plugins.'%s']", pluginDiff)
	cure := fmt.Sprintf("in %s, %s: default = [%q, %q]", file, section, differ, walking)
	switch at := slices.Index(order, differ); {
	case at < 0:
		f.ok("clients of the diff service (%s) have layers stored after they have arrived; to change that, %s, at the price that while the daemon is down their pulls and commits fail for every snapshotter", others, cure)
	case !slices.Contains(order, walking):
		f.add(Fail, cure, "%s names no other differ than nhybrid's: pulls and commits for other snapshotters fail", section)
	case at > slices.Index(order, walking):
		f.add(Warn, cure, "%s has %q behind %q, which takes everything: nhybrid is never asked", section, differ, walking)
	default:
		f.add(Warn, fmt.Sprintf("in %s, %s: default = [%q], if only clients of the transfer service pull for nhybrid", file, section, walking),
			"every snapshotter depends on the daemon: while it is down, pulls and commits by clients of the diff service (%s) fail for all of them", others)
		return true
	}
	return false
}

// localPull is the setting that has CRI pull by itself instead of by the transfer service; "" where none does.
func localPull(t, images Table) string {
	old := t.at("plugins", pluginCRI) // configuration version 2
	number := func(key string) int64 { return max(images.number(key), old.number(key)) }
	annotated := false
	for _, section := range []Table{images, old} {
		v, ok := section["disable_snapshot_annotations"].(bool)
		annotated = annotated || (ok && !v)
	}
	switch registry := images.at("registry"); {
	case images.truth("use_local_image_pull"):
		return "use_local_image_pull"
	case annotated:
		return "disable_snapshot_annotations = false"
	case images.truth("discard_unpacked_layers"):
		return "discard_unpacked_layers"
	case images.truth("image_pull_with_sync_fs") || old.truth("image_pull_with_sync_fs"):
		return "image_pull_with_sync_fs"
	case number("max_concurrent_downloads") != 0 && number("max_concurrent_downloads") != 3:
		return "max_concurrent_downloads"
	case len(registry.at("mirrors")) > 0 || len(old.at("registry", "mirrors")) > 0:
		return "registry.mirrors"
	case len(registry.at("configs")) > 0 || len(old.at("registry", "configs")) > 0:
		return "registry.configs"
	case len(registry.at("auths")) > 0 || len(old.at("registry", "auths")) > 0:
		return "registry.auths"
	}
	return ""
}
