// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package trace

import (
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"github.com/stretchr/testify/require"
)

func TestOverlayOf(t *testing.T) {
	for options, want := range map[string][2]string{
		"rw,lowerdir=/run/t/7::/nvm/d::/hdd/d,upperdir=/nvm/s/8/fs,workdir=/nvm/s/8/work": {"/run/t/7", "/nvm/s/8/fs"},
		"ro,lowerdir=/run/t/7::/nvm/d::/hdd/d,redirect_dir=on":                            {"/run/t/7", ""},
		"ro,lowerdir+=/run/t/7,datadir+=/nvm/d,datadir+=/hdd/d":                           {"/run/t/7", ""},
		`rw,lowerdir=/run/a\040b::/nvm/d,upperdir=/u\040v`:                                {"/run/a b", "/u v"},
		`ro,lowerdir=/run/i\134\054workdir=\134\054uidmap\134\054/7::/nvm/d`:              {`/run/i\,workdir=\,uidmap\,/7`, ""}, // as it was given
		"rw,lowerdir=/l1:/l2,upperdir=/u":                                                 {"/l1", "/u"},
		"rw":                                                                              {"", ""},
	} {
		o := overlayOf(&mountinfo.Info{VFSOptions: options})
		require.Equal(t, want, [2]string{o.tree, o.upper}, options)
	}
}

// containerd looks users up in the snapshot of a container before it starts, mounted
// read-only with the upper directory as the first of the lower ones.
func TestMountToLookIntoASnapshot(t *testing.T) {
	w := &Watch{start: Start{Upper: "/nvm/s/8/fs", Tree: "/run/t/7"}}
	for options, want := range map[string]bool{
		"ro,lowerdir=/nvm/s/8/fs:/run/t/7::/nvm/d::/hdd/d": true,
		"ro,lowerdir=/nvm/s/9/fs:/run/t/7::/nvm/d::/hdd/d": false,
		"ro,lowerdir=/run/t/7::/nvm/d::/hdd/d":             true,
		"ro,lowerdir=/run/t/8::/nvm/d::/hdd/d":             false,
	} {
		require.Equal(t, want, overlayOf(&mountinfo.Info{VFSOptions: options}).wants(w), options)
	}
}

// What containerd reads before it starts a program does not end the watch.
func TestQuietBeforeAnythingWasExecuted(t *testing.T) {
	w := &Watch{t: &Tracer{cfg: Config{Quiet: 1, Max: 100, Unused: 50}}, opened: 5}
	due := func(want int, why Reason) {
		t.Helper()
		at, reason := w.due()
		require.EqualValues(t, want, at)
		require.Equal(t, why, reason)
	}
	due(55, EndUnused)
	w.touch(10)
	due(14, EndQuiet)
	w.executed = true
	due(11, EndQuiet)
	w.touch(110)
	due(110, EndMax)
}

// Who asks for the mounts again is about to mount them: the start is not over,
// for as long as it took from the look at its users.
func TestAskedAgain(t *testing.T) {
	s := newStore(t)
	cfg := s.config()
	cfg.Quiet = time.Minute
	tr := s.tracer(cfg)
	c := s.container("7")
	w := watch(t, tr, c)
	tr.mu.Lock()
	w.touch(w.opened + 1)
	before, _ := w.due()
	tr.mu.Unlock()
	require.Same(t, w, watch(t, tr, c))
	tr.mu.Lock()
	defer tr.mu.Unlock()
	after, _ := w.due()
	require.Greater(t, after, before)
	w.executed = true
	before, _ = w.due()
	tr.mu.Unlock()
	require.Same(t, w, watch(t, tr, c))
	tr.mu.Lock()
	after, _ = w.due()
	require.Equal(t, before, after, "somebody looks at a container that runs")
}
