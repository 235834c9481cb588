// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"fmt"
	"os"

	"github.com/nhybrid/nhybrid/cmd/internal/config"
	"github.com/nhybrid/nhybrid/snapshotter/control"
	"github.com/nhybrid/nhybrid/snapshotter/host"
)

// Namespaces tells whether containerd sees what the daemon, of process id daemon, mounts. Both may live in other mount
// namespaces than this process.
func Namespaces(c config.Config, daemon int) []Finding {
	f := &findings{area: "mounts"}
	const start = "start both, in one mount namespace, and run nhybridctl doctor again"
	containerd, err := host.Listener(c.Containerd.Address)
	if err != nil {
		f.add(Warn, start, "the mount namespaces of containerd and the daemon were not compared: %s", control.ErrorMessage(err))
		return f.all
	}
	var tables, namespaces [2]string
	for i, pid := range []int{daemon, containerd} {
		if namespaces[i], err = os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", pid)); err == nil {
			var b []byte
			b, err = os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pid))
			tables[i] = string(b)
		}
		if err != nil {
			f.add(Warn, start, "the mount namespaces of containerd and the daemon were not compared: %s", control.ErrorMessage(err))
			return f.all
		}
	}
	if namespaces[0] == namespaces[1] {
		f.ok("containerd and the daemon are in one mount namespace")
		return f.all
	}
	const cure = "run both in one mount namespace: without unshare, and in systemd units without PrivateMounts, PrivateTmp, ProtectSystem, ProtectHome and the like"
	for _, p := range []struct{ key, path string }{{"root", c.Root}, {"nvm_root", c.NVMRoot}, {"state", c.State}} {
		if !host.SameDir(daemon, containerd, p.path) {
			f.add(Fail, cure, "containerd (process %d) is in another mount namespace than the daemon (process %d) and does not see its %s, %q: no container starts", containerd, daemon, p.key, p.path)
			return f.all
		}
	}
	if !host.Propagates(tables[0], tables[1], c.State) {
		f.add(Fail, cure+"; or make the mount below state shared (mount --make-rshared) before containerd starts as its slave",
			"containerd (process %d) is in another mount namespace than the daemon (process %d), and what the daemon mounts below %q does not reach it: containers start with an empty root filesystem", containerd, daemon, c.State)
		return f.all
	}
	f.ok("containerd is in another mount namespace than the daemon, and what the daemon mounts reaches it")
	return f.all
}
