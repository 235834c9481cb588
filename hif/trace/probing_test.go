// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package trace

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nhybrid/nhybrid/placement"
)

// Every Mounts of the snapshotter begins a watch: it must not wait while overlays are probed, of which a node may have hundreds.
func TestWatchDoesNotWaitForProbes(t *testing.T) {
	s := newStore(t)
	s.put(placement.NVM, "3", "etc/passwd", []byte("root"))
	tr := s.tracer(s.config())
	first, second := s.container("7"), s.container("8")
	w := watch(t, tr, first)
	probed, goOn := make(chan struct{}, 1), make(chan struct{})
	release := hold(t, tr)
	tr.probing = func(*overlay) {
		select {
		case probed <- struct{}{}:
			<-goOn
		default: // later ones
		}
	}
	run(t, "cat", first.mount()+"/etc/passwd")
	release()
	<-probed

	done := make(chan *Watch)
	go func() {
		other, err := tr.Watch(second.Start)
		if err != nil {
			t.Error(err)
		}
		if tr.Find("8") != other {
			t.Error("the second watch is not found")
		}
		w.Ready()
		done <- other
	}()
	retried := make(chan struct{})
	go func() { tr.Retry(); close(retried) }() // it waits, and nobody for it
	var other *Watch
	select {
	case other = <-done:
		close(goOn)
	case <-time.After(20 * time.Second):
		close(goOn)
		t.Fatal("a watch waits for a probe")
	}
	<-retried
	got := w.Result()
	require.Equal(t, []string{"etc/passwd"}, s.paths(got))
	require.False(t, got.Files[0].Assumed)
	run(t, "cat", second.mount()+"/etc/passwd")
	require.Equal(t, []string{"etc/passwd"}, s.paths(ready(other)))
}

// Close waits for whoever still probes: it closes the descriptors that a probe reads.
func TestCloseWaitsForProbes(t *testing.T) {
	s := newStore(t)
	s.put(placement.NVM, "3", "etc/passwd", []byte("root"))
	tr, err := New(s.config())
	require.NoError(t, err)
	c := s.container("7")
	c.Path = nil // nothing can be probed until Retry
	w := watch(t, tr, c)
	run(t, "cat", c.mount()+"/etc/passwd")
	require.Eventually(t, func() bool { return tr.Stats().Events > 0 }, 20*time.Second, time.Millisecond)
	probed, goOn := make(chan struct{}, 1), make(chan struct{})
	release := hold(t, tr)
	w.start.Path = s.container("7").Path
	tr.probing = func(*overlay) {
		select {
		case probed <- struct{}{}:
			<-goOn
		default:
		}
	}
	release()
	go tr.Retry()
	<-probed
	closed := make(chan error, 1)
	go func() { closed <- tr.Close() }()
	require.Eventually(t, func() bool { // it has begun
		tr.mu.Lock()
		defer tr.mu.Unlock()
		return tr.closed
	}, 20*time.Second, time.Millisecond)
	select {
	case err := <-closed:
		t.Fatal("closed under a probe", err)
	default:
	}
	close(goOn)
	require.NoError(t, <-closed)
	<-w.Done()
	tr.Retry() // nothing, and no harm
}
