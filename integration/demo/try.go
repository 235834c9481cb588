// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/nhybrid/nhybrid/integration/rig"
)

var plainWord = regexp.MustCompile(`^[A-Za-z0-9_@%+=:,./-]+$`)

// quote writes a command for a shell.
func quote(args []string) string {
	out := make([]string, len(args))
	for i, a := range args {
		if out[i] = a; !plainWord.MatchString(a) {
			out[i] = "'" + strings.ReplaceAll(a, "'", `'\''`) + "'"
		}
	}
	return strings.Join(out, " ")
}

// try is a command to paste, and what it does.
type try struct{ what, line string }

// printTry tells how to go on with a demo that is left running.
func printTry(ctx context.Context, r *rig.Rig, recipe recipe, o options) error {
	tries, err := tryLines(ctx, r, recipe)
	if err != nil {
		return err
	}
	down, err := takeDown(o)
	if err != nil {
		return err
	}
	tries = append(tries, try{"take it down", down})
	say("It is left running, in %s. To try, from anywhere, in this order or any:", r.Dir)
	for _, t := range tries {
		fmt.Printf("# %s\n%s\n", t.what, t.line)
	}
	return nil
}

// takeDown is the command that ends a demo which stays, from any directory.
func takeDown(o options) (string, error) {
	wd, err := os.Getwd()
	if err != nil {
		return "", err
	}
	args := []string{"go", "-C", wd, "run", "./integration/demo", "-clean"}
	if o.name != "" {
		args = append(args, "-name", o.name)
	}
	return quote(args), nil
}

// tryLines writes the configuration files that keep the commands short, and returns the commands.
func tryLines(ctx context.Context, r *rig.Rig, recipe recipe) ([]try, error) {
	ref := r.Ref(imageName)
	var tries []try
	var errs []error
	bin := ""
	add := func(what, tool string, args ...string) {
		cmd, err := r.Command(ctx, tool, args...)
		if err != nil {
			errs = append(errs, err)
			return
		}
		bin = filepath.Dir(cmd.Path)
		tries = append(tries, try{what, quote(cmd.Args)})
	}
	snapshotter := []string{"--snapshotter", r.Snapshotter}
	add("where each layer stands, and why", "nhybridctl", "inspect", ref)
	add("why a file stands where it does", "nhybridctl", "why", ref, recipe.file)
	add("who occupies which tier", "nhybridctl", "du")
	add("a container by ctr", "ctr", append(append([]string{"run", "--rm"}, append(snapshotter, ref, "try")...), recipe.command...)...)
	add("remove the image: both tiers are empty after it", "ctr", "images", "remove", "--sync", ref)
	add("pull it again through the link (nhybridctl watch, in another terminal, shows how)",
		"ctr", append([]string{"images", "pull", "--plain-http"}, append(snapshotter, ref)...)...)

	switch err := r.NerdctlUnobtainable(); {
	case err == nil:
		config := filepath.Join(r.Dir, "nerdctl.toml")
		errs = append(errs, os.WriteFile(config, []byte(nerdctlConfig(r)), 0o644))
		nerdctl := "NERDCTL_TOML=" + quote([]string{config}) + " " + quote([]string{filepath.Join(bin, "nerdctl")})
		tries = append(tries,
			try{"a pull by nerdctl", nerdctl + " pull " + ref},
			try{"a container by nerdctl", nerdctl + " run --rm --net none " + ref + " " + quote(recipe.command)})
	case errors.Is(err, rig.ErrNerdctlUnobtainable):
		fmt.Println("No lines for nerdctl:", err)
	default:
		fmt.Println("No lines for nerdctl: bin/nerdctl is not built; make tools builds it")
	}

	if _, err := os.Stat(filepath.Join(bin, "crictl")); err != nil {
		fmt.Println("No lines for crictl: bin/crictl is not built; make tools builds it")
		return tries, errors.Join(errs...)
	}
	config, pod, container := filepath.Join(r.Dir, "crictl.yaml"), filepath.Join(r.Dir, "pod.json"), filepath.Join(r.Dir, "container.json")
	endpoint := "unix://" + r.ContainerdSocket()
	errs = append(errs,
		os.WriteFile(config, fmt.Appendf(nil, "runtime-endpoint: %s\nimage-endpoint: %s\ntimeout: 60\n", endpoint, endpoint), 0o644),
		writeJSON(pod, podConfig(r)), writeJSON(container, containerConfig(ref, recipe.command)))
	crictl := quote([]string{filepath.Join(bin, "crictl"), "--config", config})
	tries = append(tries,
		try{"a pull by CRI, as Kubernetes does it (it has a namespace of its own)", crictl + " pull " + ref},
		try{"a container in a pod", fmt.Sprintf("%s logs -f $(%s run %s)", crictl, crictl, quote([]string{container, pod}))},
		try{"remove the pod", crictl + " rmp -f -a"})
	return tries, errors.Join(errs...)
}

func nerdctlConfig(r *rig.Rig) string {
	return fmt.Sprintf(`address = '%s'
namespace = '%s'
snapshotter = '%s'
data_root = '%s'
hosts_dir = ['%s']
cni_path = '/usr/lib/cni'
cni_netconfpath = '%s'
cgroup_manager = 'cgroupfs'
insecure_registry = true
`, r.ContainerdSocket(), r.Namespace, r.Snapshotter, filepath.Join(r.Dir, "nerdctl"), filepath.Join(r.Dir, "hosts"), filepath.Join(r.Dir, "cni"))
}

func podConfig(r *rig.Rig) any {
	const node = 2 // runtime.v1.NamespaceMode: the host's network, so that no CNI network is needed
	return map[string]any{
		"metadata":      map[string]any{"name": "demo", "namespace": "default", "uid": "demo", "attempt": 0},
		"log_directory": filepath.Join(r.Dir, "log", "pods"),
		"linux":         map[string]any{"security_context": map[string]any{"namespace_options": map[string]any{"network": node}}},
	}
}

func containerConfig(ref string, command []string) any {
	return map[string]any{
		"metadata": map[string]any{"name": "demo"}, "image": map[string]any{"image": ref}, "command": command,
		"log_path": "demo.log", "linux": map[string]any{},
	}
}

func writeJSON(path string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(b, '\n'), 0o644)
}
