// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
)

// A registry that does not answer, or refuses, is told until it answers: also that it has no profile.
func TestUnansweredRegistries(t *testing.T) {
	const gone = "127.0.0.1:1"
	refuses := true
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if refuses {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		w.WriteHeader(http.StatusNotFound)
	}))
	defer server.Close()
	host := strings.TrimPrefix(server.URL, "http://")
	m := &Manager{config: Config{Fetch: true}, early: newEarlyProfiles(), ctx: t.Context()}
	ask := func(ref string) {
		a := m.ask(ref, digest.FromString(ref))
		require.NotNil(t, a)
		require.Error(t, a.wait(t.Context()))
	}
	require.Empty(t, m.Unanswered())
	ask(gone + "/app:1")
	ask(host + "/app:1")
	failed := m.Unanswered()
	require.ErrorContains(t, failed[gone], "connection refused")
	require.ErrorContains(t, failed[host], "403")
	require.Len(t, failed, 2)
	refuses = false
	ask(host + "/app:2")
	require.Len(t, m.Unanswered(), 1)
}
