// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package hosts reaches registries as containerd does: through the mirrors, with the certificates and headers that its hosts directories
// (certs.d/HOST/hosts.toml) name, by containerd's own reading of them. Libraries that speak to registries take it as their transport; it authorizes the
// requests, so they need no credentials.
//
// Credentials are those of docker's configuration of this process (DOCKER_CONFIG, else ~/.docker/config.json), and headers in hosts.toml. Those that a kubelet or
// a client passes along with a pull are containerd's for that pull alone, and known to nobody else.
package hosts

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/sirupsen/logrus"
)

// Hosts are the registries that hosts directories describe, and all others. It may be used concurrently.
type Hosts struct {
	dirs     []string
	keychain authn.Keychain
}

// New looks for the directories of hosts below those of path, which are separated by colons as in CRI's config_path; none need exist.
func New(path string) *Hosts {
	return &Hosts{filepath.SplitList(path), authn.DefaultKeychain}
}

// For is the transport of one operation: a push, all of whose requests go where pushes go, or else a pull, which tries mirrors first. plainHTTP: a registry
// without hosts.toml has no TLS. What the directories say is read once for each registry, and tokens live as long.
func (h *Hosts) For(push, plainHTTP bool) http.RoundTripper {
	o := config.HostOptions{HostDir: h.dir, Credentials: h.credentials}
	if plainHTTP {
		o.DefaultScheme = "http"
	}
	return &transport{hosts: config.ConfigureHosts(quiet(), o), push: push, known: map[string][]docker.RegistryHost{}}
}

// Registries are the hosts of registries as containerd's own resolver takes them, for pulls.
func (h *Hosts) Registries() docker.RegistryHosts {
	return config.ConfigureHosts(quiet(), config.HostOptions{HostDir: h.dir, Credentials: h.credentials})
}

// quiet is a context whose logger takes warnings only: containerd tells at each reading that it tries TLS on localhost first.
func quiet() context.Context {
	l := logrus.New()
	l.SetOutput(log.L.Logger.Out)
	l.SetFormatter(log.L.Logger.Formatter)
	l.SetLevel(logrus.WarnLevel)
	return log.WithLogger(context.Background(), logrus.NewEntry(l))
}

// dir finds the directory of a registry.
func (h *Hosts) dir(host string) (string, error) {
	for _, d := range h.dirs {
		dir, err := config.HostDirFromRoot(d)(host)
		if err == nil || !errdefs.IsNotFound(err) && !errors.Is(err, os.ErrNotExist) {
			return dir, err
		}
	}
	return "", errdefs.ErrNotFound
}

// credentials are asked for by the host that a request goes to.
func (h *Hosts) credentials(host string) (user, secret string, err error) {
	if host == dockerHost {
		host = dockerKey
	}
	registry, err := name.NewRegistry(host)
	if err != nil {
		return "", "", fmt.Errorf("look for credentials of %q: %w", host, err)
	}
	auth, err := h.keychain.Resolve(registry)
	if err != nil {
		return "", "", fmt.Errorf("look for credentials of %q: %w", host, err)
	}
	c, err := auth.Authorization()
	if err != nil {
		return "", "", fmt.Errorf("look for credentials of %q: %w", host, err)
	}
	if c.IdentityToken != "" {
		return "", c.IdentityToken, nil
	}
	return c.Username, c.Password, nil
}

// Docker Hub has three names: in references and hosts directories, of its registry, and in docker's configuration.
const (
	dockerName = "docker.io"
	dockerHost = "registry-1.docker.io"
	dockerKey  = "index.docker.io"
)

// transport implements [http.RoundTripper] for requests to registries by the names that references have.
type transport struct {
	hosts docker.RegistryHosts
	push  bool

	mu    sync.Mutex
	known map[string][]docker.RegistryHost // by name of the registry
}

// of are the hosts of a registry that can serve a request, in the order in which they are asked.
func (t *transport) of(registry, path string) (able []docker.RegistryHost, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	all, ok := t.known[registry]
	if !ok {
		if all, err = t.hosts(registry); err != nil {
			return nil, fmt.Errorf("read hosts of registry %q: %w", registry, err)
		}
		share(all)
		t.known[registry] = all
	}
	for _, need := range needs(t.push, path) {
		for _, h := range all {
			if h.Capabilities.Has(need) {
				able = append(able, h)
			}
		}
		if len(able) > 0 {
			return able, nil
		}
	}
	what := "pull"
	if t.push {
		what = "push"
	}
	return nil, fmt.Errorf("no host of registry %q in its hosts.toml has the capability %q: %w", registry, what, errdefs.ErrFailedPrecondition)
}

// share gives entries of one address the certificates and headers of the first: many files name the registry itself as a host that serves pulls, with its
// certificate, and again as the server, without.
func share(all []docker.RegistryHost) {
	for i := range all {
		first := slices.IndexFunc(all[:i], func(h docker.RegistryHost) bool {
			return h.Scheme == all[i].Scheme && h.Host == all[i].Host && h.Path == all[i].Path
		})
		if first >= 0 {
			all[i].Client, all[i].Authorizer, all[i].Header = all[first].Client, all[first].Authorizer, all[first].Header
		}
	}
}

// needs are the capabilities that a host must have for a request, the better one first.
func needs(push bool, path string) []docker.HostCapabilities {
	switch {
	case push:
		return []docker.HostCapabilities{docker.HostCapabilityPush}
	case strings.Contains(path, "/referrers/"):
		return []docker.HostCapabilities{docker.HostCapabilityReferrers, docker.HostCapabilityResolve}
	case strings.Contains(path, "/manifests/") && !strings.Contains(path, "/manifests/sha256:"):
		return []docker.HostCapabilities{docker.HostCapabilityResolve}
	}
	return []docker.HostCapabilities{docker.HostCapabilityPull}
}

// used finds a host that was used before, to which the place of an upload leads.
func (t *transport) used(host string) (docker.RegistryHost, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, all := range t.known {
		if i := slices.IndexFunc(all, func(h docker.RegistryHost) bool { return h.Host == host }); i >= 0 {
			return all[i], true
		}
	}
	return docker.RegistryHost{}, false
}

// RoundTrip implements [http.RoundTripper].
func (t *transport) RoundTrip(req *http.Request) (*http.Response, error) {
	registry, path := req.URL.Host, req.URL.Path
	if registry == dockerKey {
		registry = dockerName
	}
	if path == "/v2/" { // whether the registry asks for credentials is our own affair
		return &http.Response{Status: "200 OK", StatusCode: http.StatusOK, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Header: http.Header{}, Body: http.NoBody, Request: req}, nil
	}
	repository, isAPI := repositoryOf(path)
	if h, ok := t.used(registry); ok && !t.named(registry) || !isAPI && ok {
		return t.do(h, req, "", scope(repository, t.push))
	}
	able, err := t.of(registry, path)
	if err != nil {
		return nil, err
	}
	var first error
	for i, h := range able {
		last := i == len(able)-1
		resp, err := t.do(h, req, registry, scope(repository, t.push))
		if err != nil {
			err = fmt.Errorf("ask %s for registry %s: %w", h.Host, registry, err)
			if first == nil {
				first = err
			}
			if last || req.Context().Err() != nil || t.push {
				return nil, first
			}
			continue
		}
		// A mirror need not have what the registry has, nor let us in.
		if last || t.push || resp.StatusCode < http.StatusBadRequest {
			return resp, nil
		}
		resp.Body.Close()
	}
	return nil, first // not reached: the last one returns
}

func (t *transport) named(registry string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	_, ok := t.known[registry]
	return ok
}

// maxTries bounds how often one host is asked: a token may have to be fetched, and may have expired.
const maxTries = 3

// do sends a request to a host. registry is empty for the place of an upload, which the host has named itself.
func (t *transport) do(h docker.RegistryHost, req *http.Request, registry, scope string) (*http.Response, error) {
	ctx := req.Context()
	if scope != "" {
		ctx = docker.WithScope(ctx, scope)
	}
	var asked []*http.Response
	for try := 1; ; try++ {
		r, err := address(ctx, h, req, registry)
		if err != nil {
			return nil, err
		}
		if h.Authorizer != nil {
			if err := h.Authorizer.Authorize(ctx, r); err != nil {
				return nil, unauthenticated(err)
			}
		}
		client := *h.Client
		client.CheckRedirect = nil // the default forwards credentials to the same host only
		resp, err := client.Do(r)
		if err != nil {
			return nil, err
		}
		again := req.Body == nil || req.Body == http.NoBody || req.GetBody != nil
		if resp.StatusCode != http.StatusUnauthorized || h.Authorizer == nil || !again || try == maxTries {
			return resp, nil
		}
		asked = append(asked, resp)
		if err := h.Authorizer.AddResponses(ctx, asked); err != nil {
			if errdefs.IsNotImplemented(err) { // there are no credentials for what it asks
				return resp, nil
			}
			resp.Body.Close()
			return nil, unauthenticated(err)
		}
		_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10))
		resp.Body.Close()
	}
}

// unauthenticated classes an error of containerd's authorizer, which has no class where credentials are missing or refused.
func unauthenticated(err error) error {
	var refused remoteerrors.ErrUnexpectedStatus
	if errors.Is(err, docker.ErrInvalidAuthorization) || errors.As(err, &refused) && refused.StatusCode == http.StatusUnauthorized {
		err = fmt.Errorf("%w: %w", err, errdefs.ErrUnauthenticated)
	}
	return fmt.Errorf("authorize: %w", err)
}

// address makes the request to a host of one to its registry.
func address(ctx context.Context, h docker.RegistryHost, req *http.Request, registry string) (*http.Request, error) {
	r := req.Clone(ctx)
	r.RequestURI, r.Host = "", ""
	r.Header.Del("Authorization") // the library has none of its own
	for k, v := range h.Header {
		r.Header[k] = append(r.Header[k], v...)
	}
	if req.GetBody != nil {
		body, err := req.GetBody()
		if err != nil {
			return nil, fmt.Errorf("read the body of the request again: %w", err)
		}
		r.Body = body
	}
	if registry == "" {
		return r, nil
	}
	r.URL.Scheme, r.URL.Host = h.Scheme, h.Host
	r.URL.Path = strings.TrimSuffix(h.Path, "/") + strings.TrimPrefix(r.URL.Path, "/v2")
	r.URL.RawPath = ""
	if registry != h.Host && (registry != dockerName || h.Host != dockerHost) { // a mirror of several registries is told which is meant
		q := r.URL.Query()
		q.Set("ns", registry)
		r.URL.RawQuery = q.Encode()
	}
	return r, nil
}

// repositoryOf finds the repository in a path of the API of registries.
func repositoryOf(path string) (repository string, ok bool) {
	rest, ok := strings.CutPrefix(path, "/v2/")
	if !ok {
		return "", false
	}
	for _, kind := range []string{"/manifests/", "/blobs/", "/referrers/", "/tags/"} {
		if i := strings.LastIndex(rest, kind); i > 0 {
			return rest[:i], true
		}
	}
	return "", true
}

func scope(repository string, push bool) string {
	switch {
	case repository == "":
		return ""
	case push:
		return "repository:" + repository + ":pull,push"
	}
	return "repository:" + repository + ":pull"
}
