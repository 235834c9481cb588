// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package nri

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/nhybrid/nhybrid/scmlib/region"
	"github.com/nhybrid/nhybrid/scmlib/region/api"
)

// Domain of the annotations. Of every container of a pod is what DOMAIN/WHAT says, of one what WHAT.DOMAIN/container.NAME says: a key has one slash in
// Kubernetes, and other NRI plugins write theirs so.
const Domain = "scm.nhybrid.io"

// What can be asked for.
const (
	size   = "size"
	volume = "volume"
	image  = "image"
)

const known = "known are " + Domain + "/size, /volume and /image for all containers of a pod, and size." + Domain + "/container.NAME and so on for one"

// Ask reads what the annotations of a pod say of one of its containers; nil if nothing. What is said of the container alone goes before what is said of all. Every
// annotation of the domain has to make sense, those of other containers too: what is misspelt would else be a container without its region.
func Ask(annotations map[string]string, container string) (*api.Attach, error) {
	var all, own asked
	for _, key := range slices.Sorted(maps.Keys(annotations)) {
		domain, name, _ := strings.Cut(key, "/")
		if domain != Domain && !strings.HasSuffix(domain, "."+Domain) {
			continue
		}
		what, of, single := strings.TrimSuffix(domain, "."+Domain), "", false
		if domain == Domain {
			what = name
		} else if of, single = strings.CutPrefix(name, "container."); !single || of == "" {
			return nil, fmt.Errorf("annotation %.100q: %s: %w", key, known, errdefs.ErrInvalidArgument)
		}
		a, err := read(what, annotations[key])
		if err != nil {
			return nil, fmt.Errorf("annotation %.100q: %w", key, err)
		}
		if !single {
			err = all.add(key, a)
		} else if of == container {
			err = own.add(key, a)
		}
		if err != nil {
			return nil, err
		}
	}
	if own.key == "" {
		own = all
	}
	return own.what, nil
}

// asked is what one scope asks for, and by which annotation.
type asked struct {
	key  string
	what *api.Attach
}

func (a *asked) add(key string, what *api.Attach) error {
	if a.key != "" {
		return fmt.Errorf("annotations %.100q and %.100q: a container has one region: %w", a.key, key, errdefs.ErrInvalidArgument)
	}
	a.key, a.what = key, what
	return nil
}

func read(what, value string) (*api.Attach, error) {
	switch what {
	case size:
		n, err := region.ParseSize(value)
		return &api.Attach{Size: n}, err
	case volume:
		_, err := region.ParseRef(Namespace, value)
		if err == nil && strings.Contains(value, "/") {
			err = fmt.Errorf("%.100q is not the name of a volume: %w", value, errdefs.ErrInvalidArgument)
		}
		return &api.Attach{Volume: value}, err
	case image:
		if value != "true" {
			return nil, fmt.Errorf("%.40q: write \"true\", or leave it out: %w", value, errdefs.ErrInvalidArgument)
		}
		return &api.Attach{FromImage: true}, nil
	}
	return nil, fmt.Errorf("%s: %w", known, errdefs.ErrInvalidArgument)
}

// Namespace is that of containerd in which CRI keeps all pods.
const Namespace = "k8s.io"

// Tenant is the namespace of regions for a namespace of Kubernetes. No pod can say that it is of another: the kubelet says it.
func Tenant(pods string) string { return pods + "." + Namespace }
