// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package rig

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// Pod starts a pod in the host's network (so that no CNI network is needed) and returns its id. It is of namespace "default", and has the annotations.
func (r *Rig) Pod(ctx context.Context, name string, annotations ...map[string]string) (string, error) {
	pod := r.podConfig(name)
	for _, a := range annotations {
		pod["annotations"] = a
	}
	config, err := r.writeJSON("pod-"+name, pod)
	if err != nil {
		return "", err
	}
	return r.Crictl(ctx, "runp", config)
}

// Container starts a container of the pod and returns its id. The pod is named as for Pod.
func (r *Rig) Container(ctx context.Context, pod, podName, name, ref string, command ...string) (string, error) {
	container, err := r.writeJSON("container-"+name, map[string]any{
		"metadata": map[string]any{"name": name},
		"image":    map[string]any{"image": ref},
		"command":  command,
		"log_path": pod + "-" + name + ".log",
		"linux":    map[string]any{},
	})
	if err != nil {
		return "", err
	}
	config, err := r.writeJSON("pod-"+podName, r.podConfig(podName))
	if err != nil {
		return "", err
	}
	id, err := r.Crictl(ctx, "create", "--no-pull", pod, container, config)
	if err != nil {
		return "", err
	}
	_, err = r.Crictl(ctx, "start", id)
	return id, err
}

// RunPod runs a command in a pod of its own until it ends, removes the pod, and returns what the command wrote.
func (r *Rig) RunPod(ctx context.Context, ref string, command ...string) (_ string, err error) {
	const name = "run"
	pod, err := r.Pod(ctx, name)
	if err != nil {
		return "", err
	}
	defer func() {
		_, removeErr := r.Crictl(ctx, "rmp", "-f", pod)
		err = errors.Join(err, removeErr)
	}()
	return r.PodRun(ctx, pod, name, name, ref, command...)
}

// PodRun runs a command in a container of the pod until it ends, and returns what it wrote. The pod is named as for Pod.
func (r *Rig) PodRun(ctx context.Context, pod, podName, name, ref string, command ...string) (string, error) {
	id, err := r.Container(ctx, pod, podName, name, ref, command...)
	if err != nil {
		return "", err
	}
	err = Await(ctx, func(ctx context.Context) error {
		out, err := r.Crictl(ctx, "inspect", "--output", "go-template", "--template", "{{.status.state}}", id)
		if err == nil && out != "CONTAINER_EXITED" {
			err = fmt.Errorf("container is in state %s", out)
		}
		return err
	})
	if err != nil {
		return "", err
	}
	return r.Crictl(ctx, "logs", id)
}

func (r *Rig) podConfig(name string) map[string]any {
	const hostNetwork = 2 // runtime.v1.NamespaceMode NODE
	return map[string]any{
		"metadata":      map[string]any{"name": name, "namespace": "default", "uid": name, "attempt": 0},
		"log_directory": filepath.Join(r.Dir, "log", "pods"),
		"linux": map[string]any{"security_context": map[string]any{
			"namespace_options": map[string]any{"network": hostNetwork},
		}},
	}
}

func (r *Rig) writeJSON(name string, v any) (string, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return "", err
	}
	path := filepath.Join(r.Dir, name+".json")
	return path, os.WriteFile(path, b, 0o600)
}
