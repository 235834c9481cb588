// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package region

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/nhybrid/nhybrid/scmlib/region/api"
)

// CDI says how containers ask for regions (Container Device Interface, cncf-tags/container-device-interface SPEC.md).
type CDI struct {
	Path   string  // of the specification, *.json in a directory of them
	Hook   string  // absolute path of nhybrid-scm-hook
	Socket string  // of the daemon, as the hook sees it
	Sizes  []int64 // that can be asked for
	Kind   string  // of the devices; "": nhybrid.io/scm
}

// HookTimeout is how many seconds the hook may take: a region that is not in the pool is written first.
const HookTimeout = 300

// HookArgs is how a runtime has to call the hook, so that it asks the daemon at socket for what a describes. Container and Pid are told by the runtime.
func HookArgs(hook, socket string, a api.Attach) []string {
	args := []string{filepath.Base(hook), "-socket", socket}
	switch {
	case a.Volume != "":
		args = append(args, "-volume", a.Volume)
	case a.FromImage:
		args = append(args, "-image")
	default:
		args = append(args, "-size", fmt.Sprint(a.Size))
	}
	if a.Tenant != "" {
		args = append(args, "-tenant", a.Tenant)
	}
	return args
}

// DefaultSizes are the powers of two from 1 MiB to 16 GiB.
func DefaultSizes() (sizes []int64) {
	for n := int64(1 << 20); n <= 16<<30; n *= 2 {
		sizes = append(sizes, n)
	}
	return sizes
}

type cdiSpec struct {
	Version string      `json:"cdiVersion"`
	Kind    string      `json:"kind"`
	Devices []cdiDevice `json:"devices"`
}

type cdiDevice struct {
	Name  string   `json:"name"`
	Edits cdiEdits `json:"containerEdits"`
}

type cdiEdits struct {
	Env   []string  `json:"env"`
	Hooks []cdiHook `json:"hooks"`
}

type cdiHook struct {
	Name    string   `json:"hookName"`
	Path    string   `json:"path"`
	Args    []string `json:"args"`
	Timeout int      `json:"timeout"`
}

// Write writes the specification, with a device for each size, one for the region of the image, and one for each volume. Runtimes
// that watch the directory see it change at once.
func (c CDI) Write(volumes []string) error {
	if !filepath.IsAbs(c.Hook) {
		return fmt.Errorf("write CDI specification: the path of the hook, %q, is not absolute", c.Hook)
	}
	spec := cdiSpec{Version: "0.6.0", Kind: cmp.Or(c.Kind, api.Kind)}
	add := func(name string, a api.Attach) {
		hook := cdiHook{Name: "createRuntime", Path: c.Hook, Args: HookArgs(c.Hook, c.Socket, a), Timeout: HookTimeout}
		spec.Devices = append(spec.Devices, cdiDevice{name, cdiEdits{[]string{"SCM_REGION=" + api.Device}, []cdiHook{hook}}})
	}
	for _, n := range c.Sizes {
		add(FormatSize(n), api.Attach{Size: n})
	}
	add("image", api.Attach{FromImage: true})
	for _, v := range volumes {
		add(v, api.Attach{Volume: v})
	}
	b, err := json.MarshalIndent(spec, "", " ")
	if err != nil {
		return fmt.Errorf("write CDI specification: %w", err)
	}
	if old, err := os.ReadFile(c.Path); err == nil && bytes.Equal(old, b) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(c.Path), 0o755); err != nil {
		return fmt.Errorf("write CDI specification: %w", err)
	}
	// Not a name that a runtime would read.
	tmp := c.Path + ".new"
	err = os.WriteFile(tmp, b, 0o644)
	if err == nil {
		err = os.Rename(tmp, c.Path)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write CDI specification: %w", err), os.Remove(tmp))
	}
	return nil
}
