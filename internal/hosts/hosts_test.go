// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hosts

import (
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/stretchr/testify/require"
)

// server is a registry with TLS by a certificate that nobody trusts, at an address that is not localhost to containerd, which would not verify it.
type server struct {
	addr string
	ca   string // file

	mu    sync.Mutex
	asked []string
}

// guarded begins a registry behind a handler.
func guarded(t *testing.T, wrap func(http.Handler) http.Handler) *server {
	t.Helper()
	h := registry.New(registry.WithReferrersSupport(true), registry.Logger(log.New(io.Discard, "", 0)))
	if wrap != nil {
		h = wrap(h)
	}
	s := &server{ca: filepath.Join(t.TempDir(), "ca.crt")}
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.asked = append(s.asked, r.Method+" "+r.URL.Path+" ns="+r.URL.Query().Get("ns"))
		s.mu.Unlock()
		h.ServeHTTP(w, r)
	}))
	srv.Config.ErrorLog = log.New(io.Discard, "", 0) // of clients that do not trust it
	srv.StartTLS()
	t.Cleanup(srv.Close)
	s.addr = srv.Listener.Addr().String()
	require.NoError(t, os.WriteFile(s.ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}), 0o600))
	return s
}

func (s *server) requests() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Join(s.asked, "\n")
}

// hostsFile writes the hosts.toml of a registry and returns the directory of all.
func hostsFile(t *testing.T, registry, content string) string {
	t.Helper()
	root := t.TempDir()
	dir := filepath.Join(root, registry)
	require.NoError(t, os.MkdirAll(dir, 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(content), 0o600))
	return root
}

// docker writes docker's configuration with a password for an address.
func dockerConfig(t *testing.T, addr, user string) {
	t.Helper()
	dir := t.TempDir()
	b, err := json.Marshal(map[string]any{"auths": map[string]any{addr: map[string]string{"auth": base64.StdEncoding.EncodeToString([]byte(user))}}})
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "config.json"), b, 0o600))
	t.Setenv("DOCKER_CONFIG", dir)
}

// basic asks for a password.
func basic(user string) func(http.Handler) http.Handler {
	return func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if n, p, _ := r.BasicAuth(); n+":"+p != user {
				w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
				w.WriteHeader(http.StatusUnauthorized)
				return
			}
			h.ServeHTTP(w, r)
		})
	}
}

// tokens gives tokens for scopes to who has the password, and asks for them.
func tokens(user string) func(http.Handler) http.Handler {
	return func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/token" {
				if n, p, _ := r.BasicAuth(); n+":"+p != user {
					w.WriteHeader(http.StatusUnauthorized)
					return
				}
				fmt.Fprintf(w, `{"token":%q}`, base64.RawURLEncoding.EncodeToString([]byte(strings.Join(r.URL.Query()["scope"], " "))))
				return
			}
			want := "pull"
			if r.Method != http.MethodGet && r.Method != http.MethodHead {
				want = "pull,push"
			}
			scope, err := base64.RawURLEncoding.DecodeString(strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer "))
			granted := slices.ContainsFunc(strings.Fields(string(scope)), func(s string) bool { return strings.HasPrefix(s, "repository:app/web:"+want) })
			if err != nil || !granted {
				w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="https://%s/token",service="x",scope="repository:app/web:%s"`, r.Host, want))
				w.WriteHeader(http.StatusUnauthorized)
				return
			}
			h.ServeHTTP(w, r)
		})
	}
}

// Tests go by the library that speaks to registries.
func push(t *testing.T, h *Hosts, ref string) (v1.Image, error) {
	t.Helper()
	img, err := random.Image(5000, 2)
	require.NoError(t, err)
	tag, err := name.ParseReference(ref)
	require.NoError(t, err)
	return img, remote.Write(tag, img, remote.WithTransport(h.For(true, false)), remote.WithContext(t.Context()))
}

func pull(t *testing.T, h *Hosts, ref string) (v1.Image, error) {
	t.Helper()
	tag, err := name.ParseReference(ref)
	require.NoError(t, err)
	opts := []remote.Option{remote.WithTransport(h.For(false, false)), remote.WithContext(t.Context())}
	img, err := remote.Image(tag, opts...)
	if err != nil {
		return nil, err
	}
	layers, err := img.Layers()
	require.NoError(t, err)
	for _, l := range layers {
		r, err := l.Compressed()
		if err != nil {
			return nil, err
		}
		_, err = io.Copy(io.Discard, r) // compares the digest
		require.NoError(t, err)
		require.NoError(t, r.Close())
	}
	dgst, err := img.Digest()
	require.NoError(t, err)
	_, err = remote.Referrers(tag.Context().Digest(dgst.String()), opts...)
	return img, err
}

func requireSame(t *testing.T, want, got v1.Image) {
	t.Helper()
	w, err := want.Digest()
	require.NoError(t, err)
	g, err := got.Digest()
	require.NoError(t, err)
	require.Equal(t, w, g)
}

// The registry is known by a name that leads nowhere; where it is, and whom to trust, hosts.toml says.
const registryName = "registry.test:5000"

func TestPrivateCertificateAndPassword(t *testing.T) {
	for kind, guard := range map[string]func(string) func(http.Handler) http.Handler{"basic": basic, "token": tokens} {
		t.Run(kind, func(t *testing.T) {
			s := guarded(t, guard("user:secret"))
			ref := registryName + "/app/web:1"
			h := New("/none:" + hostsFile(t, registryName, fmt.Sprintf("server = 'https://%s'\nca = %q\n", s.addr, s.ca)))
			_, err := push(t, h, ref)
			require.ErrorIs(t, err, errdefs.ErrUnauthenticated, "it has no password yet")
			require.ErrorContains(t, err, s.addr)
			dockerConfig(t, s.addr, "user:secret")
			img, err := push(t, h, ref)
			require.NoError(t, err)
			got, err := pull(t, h, ref)
			require.NoError(t, err)
			requireSame(t, img, got)

			untrusted := New(hostsFile(t, registryName, fmt.Sprintf("server = 'https://%s'\nskip_verify = false\n", s.addr)))
			_, err = pull(t, untrusted, ref)
			require.ErrorContains(t, err, "unknown authority")
			require.ErrorContains(t, err, s.addr)
		})
	}
}

// Many hosts files name the registry itself as a host that serves pulls, with its certificate there. It is the same registry for pushes and referrers.
func TestCertificateInTheTableOfAHost(t *testing.T) {
	t.Parallel()
	s := guarded(t, nil)
	ref := registryName + "/app/web:1"
	h := New(hostsFile(t, registryName, fmt.Sprintf("server = 'https://%s'\n[host.'https://%[1]s']\ncapabilities = ['pull', 'resolve']\nca = %q\n", s.addr, s.ca)))
	img, err := push(t, h, ref)
	require.NoError(t, err)
	got, err := pull(t, h, ref)
	require.NoError(t, err)
	requireSame(t, img, got)
}

func TestMirror(t *testing.T) {
	t.Parallel()
	origin, mirror := guarded(t, nil), guarded(t, nil)
	ref := registryName + "/app/web:1"
	dirs := hostsFile(t, registryName, fmt.Sprintf("server = 'https://%s'\nca = %q\n[host.'https://%s']\ncapabilities = ['pull', 'resolve']\nca = %q\n", origin.addr, origin.ca, mirror.addr, mirror.ca))
	h := New(dirs)
	img, err := push(t, h, ref)
	require.NoError(t, err)
	require.Empty(t, mirror.requests(), "pushes do not go there, nor does it say what the registry has")

	got, err := pull(t, h, ref)
	require.NoError(t, err, "what the mirror does not have the registry has")
	requireSame(t, img, got)
	require.Contains(t, mirror.requests(), "GET /v2/app/web/manifests/1 ns="+registryName)
	require.Contains(t, origin.requests(), "/v2/app/web/referrers/", "the mirror has no such capability")
	require.NotContains(t, mirror.requests(), "/referrers/")

	// What it has it serves.
	_, err = push(t, New(hostsFile(t, registryName, fmt.Sprintf("server = 'https://%s'\nca = %q\n", mirror.addr, mirror.ca))), ref)
	require.NoError(t, err)
	before := strings.Count(origin.requests(), "/blobs/")
	other, err := pull(t, h, ref)
	require.NoError(t, err)
	require.NotEqual(t, img, other)
	require.Equal(t, before, strings.Count(origin.requests(), "/blobs/"))
	require.Contains(t, mirror.requests(), "/blobs/")

	// One that cannot be reached is passed over; where it is the only one its error is told.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	gone := l.Addr().String()
	require.NoError(t, l.Close())
	h = New(hostsFile(t, registryName, fmt.Sprintf("server = 'https://%s'\nca = %q\n[host.'https://%s']\ncapabilities = ['pull', 'resolve']\n", origin.addr, origin.ca, gone)))
	got, err = pull(t, h, ref)
	require.NoError(t, err)
	requireSame(t, img, got)
	h = New(hostsFile(t, registryName, fmt.Sprintf("server = 'https://%s'\n", gone)))
	_, err = pull(t, h, ref)
	require.ErrorContains(t, err, gone)
	h = New(hostsFile(t, registryName, fmt.Sprintf("server = 'https://%s'\nca = %q\ncapabilities = ['pull', 'resolve']\n", origin.addr, origin.ca)))
	_, err = push(t, h, ref)
	require.ErrorContains(t, err, `has the capability "push"`)
}

// A path and a header of hosts.toml come with every request, those to the place of an upload too.
func TestPathAndHeader(t *testing.T) {
	t.Parallel()
	s := guarded(t, func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			rest, ok := strings.CutPrefix(r.URL.Path, "/team/a")
			if !ok || r.Header.Get("X-Team") != "a" {
				w.WriteHeader(http.StatusForbidden)
				return
			}
			r.URL.Path = rest
			h.ServeHTTP(prefixed{w}, r)
		})
	})
	h := New(hostsFile(t, registryName, fmt.Sprintf("server = 'https://%s/team/a'\nca = %q\n[header]\nX-Team = 'a'\n", s.addr, s.ca)))
	ref := registryName + "/app/web:1"
	img, err := push(t, h, ref)
	require.NoError(t, err)
	got, err := pull(t, h, ref)
	require.NoError(t, err)
	requireSame(t, img, got)
}

// prefixed is what a proxy does to the places that a registry names.
type prefixed struct{ http.ResponseWriter }

func (p prefixed) WriteHeader(code int) {
	if l := p.Header().Get("Location"); strings.HasPrefix(l, "/v2/") {
		p.Header().Set("Location", "/team/a"+l)
	}
	p.ResponseWriter.WriteHeader(code)
}

// Without hosts.toml localhost needs no TLS, and others only where they are said to have none.
func TestWithoutHostsFile(t *testing.T) {
	t.Parallel()
	srv := httptest.NewServer(registry.New(registry.WithReferrersSupport(true), registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(srv.Close)
	ref := strings.TrimPrefix(srv.URL, "http://") + "/app/web:1"
	h := New("/none")
	img, err := push(t, h, ref)
	require.NoError(t, err)
	got, err := pull(t, h, ref)
	require.NoError(t, err)
	requireSame(t, img, got)
}

func TestDockerHub(t *testing.T) {
	dockerConfig(t, "https://index.docker.io/v1/", "me:secret")
	h := New("/none")
	user, secret, err := h.credentials(dockerHost)
	require.NoError(t, err)
	require.Equal(t, "me:secret", user+":"+secret)
	user, secret, err = h.credentials("other.test")
	require.NoError(t, err)
	require.Empty(t, user+secret)
	h.keychain = fixed{&authn.AuthConfig{IdentityToken: "refresh"}}
	user, secret, err = h.credentials("other.test")
	require.NoError(t, err)
	require.Equal(t, []string{"", "refresh"}, []string{user, secret})

	tr, ok := New("/none").For(false, false).(*transport)
	require.True(t, ok)
	able, err := tr.of(dockerName, "/v2/library/redis/manifests/7")
	require.NoError(t, err)
	require.Len(t, able, 1)
	require.Equal(t, dockerHost, able[0].Host)
	req, err := http.NewRequest(http.MethodGet, "https://index.docker.io/v2/library/redis/manifests/7", nil)
	require.NoError(t, err)
	req.Header.Set("Authorization", "what the library has")
	r, err := address(t.Context(), able[0], req, dockerName)
	require.NoError(t, err)
	require.Equal(t, "https://registry-1.docker.io/v2/library/redis/manifests/7", r.URL.String())
	require.Empty(t, r.Header.Get("Authorization"))
}

type fixed struct{ *authn.AuthConfig }

func (f fixed) Resolve(authn.Resource) (authn.Authenticator, error) {
	return authn.FromConfig(*f.AuthConfig), nil
}

func TestNeeds(t *testing.T) {
	t.Parallel()
	require.Equal(t, docker.HostCapabilityResolve, needs(false, "/v2/a/manifests/latest")[0])
	require.Equal(t, docker.HostCapabilityPull, needs(false, "/v2/a/manifests/sha256:00")[0])
	require.Equal(t, docker.HostCapabilityPull, needs(false, "/v2/a/blobs/sha256:00")[0])
	require.Equal(t, docker.HostCapabilityPush, needs(true, "/v2/a/blobs/sha256:00")[0])
	for path, want := range map[string]string{"/v2/a/b/manifests/1": "a/b", "/v2/a/blobs/uploads/": "a", "/v2/manifests/manifests/1": "manifests", "/v2/": "", "/upload/1": ""} {
		got, _ := repositoryOf(path)
		require.Equal(t, want, got, path)
	}
}
