//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/integration/rig"
)

// front is a TLS server before another, by a certificate that only who is told of it trusts, and with a password.
type front struct {
	addr, ca string
	upstream atomic.Pointer[url.URL]
	requests atomic.Int64
}

func newFront(t *testing.T, user string) *front {
	t.Helper()
	f := &front{ca: filepath.Join(t.TempDir(), "ca.crt")}
	proxy := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(f.upstream.Load()); r.Out.Host = r.In.Host }, ErrorLog: log.New(io.Discard, "", 0)}
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if name, password, _ := r.BasicAuth(); user != "" && name+":"+password != user {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		f.requests.Add(1)
		proxy.ServeHTTP(w, r)
	}))
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	srv.StartTLS()
	t.Cleanup(srv.Close)
	f.addr = srv.Listener.Addr().String()
	require.NoError(t, os.WriteFile(f.ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}), 0o600))
	return f
}

// A registry that only containerd's hosts directory leads to, by a name of its own, a mirror, a certificate and a password, is reached for profiles and regions too.
func TestRegistriesOfHostsDirectory(t *testing.T) {
	t.Parallel()
	const user = "user:secret"
	origin, mirror := newFront(t, user), newFront(t, "")
	dirs, docker := t.TempDir(), t.TempDir()
	const registry = "registry.test:5000"
	require.NoError(t, os.Mkdir(filepath.Join(dirs, registry), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(dirs, registry, "hosts.toml"), fmt.Appendf(nil,
		"server = 'https://%s'\nca = '%s'\n[host.'https://%s']\ncapabilities = ['pull', 'resolve', 'referrers']\nca = '%s'\n", origin.addr, origin.ca, mirror.addr, mirror.ca), 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(docker, "config.json"),
		fmt.Appendf(nil, `{"auths":{%q:{"auth":%q}}}`, origin.addr, base64.StdEncoding.EncodeToString([]byte(user))), 0o600))
	r := newRig(t, rig.Options{
		CRI: true, DaemonArgs: hot("--set", "containerd.hosts="+dirs, "--set", "hot.predict=off"), DaemonEnv: []string{"DOCKER_CONFIG=" + docker},
		ContainerdConfig: fmt.Sprintf("[plugins.'io.containerd.cri.v1.images'.registry]\n  config_path = '%s'\n", dirs),
	})
	upstream, err := url.Parse("http://" + r.Registry.Addr())
	require.NoError(t, err)
	origin.upstream.Store(upstream)
	mirror.upstream.Store(upstream)
	_, err = r.PushBusybox(soon(t), "busybox:1")
	require.NoError(t, err)
	ref := registry + "/busybox:1"
	_, err = r.Crictl(soon(t), "pull", "--creds", user, ref)
	require.NoError(t, err)
	require.Positive(t, mirror.requests.Load())

	_, err = r.Ctr(soon(t), "-n", "k8s.io", "run", "--rm", ref, "c", "true")
	require.NoError(t, err)
	awaitMigration(t, r, 1)
	before := origin.requests.Load()
	_, err = r.Nhybridctl(soon(t), "profile", "-n", "k8s.io", "push", ref)
	require.NoError(t, err)
	require.Greater(t, origin.requests.Load(), before, "pushes go to the registry itself")
	_, err = r.Nhybridctl(soon(t), "profile", "-n", "k8s.io", "rm", ref)
	require.NoError(t, err)
	before = mirror.requests.Load()
	_, err = r.Nhybridctl(soon(t), "profile", "-n", "k8s.io", "pull", ref)
	require.NoError(t, err)
	require.Greater(t, mirror.requests.Load(), before, "pulls ask the mirror")

	_, err = r.Nhybridctl(soon(t), "scm", "create", "orders", "--size", "1m")
	require.NoError(t, err)
	_, err = r.Nhybridctl(soon(t), "scm", "push", "orders", registry+"/orders:1")
	require.NoError(t, err)
	_, err = r.Nhybridctl(soon(t), "scm", "pull", registry+"/orders:1", "again")
	require.NoError(t, err)
}
