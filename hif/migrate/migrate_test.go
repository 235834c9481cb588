// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package migrate

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/hif/plan"
	"github.com/nhybrid/nhybrid/placement"
)

// scene fills a store: layer 1 is on NVM and was never brought home, layer 2 is
// at home with one cold copy on NVM. It returns the plan and what is on NVM after it.
func scene(r *rig) (plan.Plan, []string) {
	for i := range 6 {
		r.file(placement.NVM, name(1, i+1), 5000*i+1)
		r.file(placement.HDD, name(2, i+1), 300_000*i+1)
	}
	r.file(placement.NVM, hot, 70_000)
	r.file(placement.HDD, was, 10_000)
	r.file(placement.NVM, was, 10_000)
	r.atHome("2")
	return scenePlan(), []string{hot, name(2, 4), name(2, 6)}
}

// Files of a scene.
var hot, was = name(1, 16), name(2, 16)

func (r *rig) reaches(e *Engine, want []string) {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), 20*time.Second)
	defer cancel()
	require.NoError(r.t, e.Wait(ctx))
	require.Equal(r.t, want, r.onNVM("1", "2"))
	r.whole()
	for _, id := range []string{"1", "2"} {
		var n int64
		for f, err := range r.host.OnNVM(id) {
			require.NoError(r.t, err)
			n += f.Bytes
		}
		require.Equal(r.t, n, r.host.settled[id])
	}
}

func TestReachesThePlan(t *testing.T) {
	r := newRig(t)
	p, want := scene(r)
	e := r.engine(Config{})
	require.Equal(t, Idle, e.Progress().State)
	e.Apply(p)
	r.reaches(e, want)
	st, pr := e.Stats(), e.Progress()
	require.Equal(t, plan.Sum{Files: 7, Bytes: st.Down.Bytes}, st.Down)
	require.Equal(t, plan.Sum{Files: 2, Bytes: 2_400_002}, st.Up)
	require.EqualValues(t, 1, st.Home)
	require.Equal(t, Direction{Done: plan.Sum{Files: 7, Bytes: st.Down.Bytes}}, pr.Down)
	require.Zero(t, pr.Up.Left)

	e.Apply(p) // nothing is left to do
	r.reaches(e, want)
	require.Equal(t, st.Down, e.Stats().Down)
	require.Equal(t, st.Up, e.Stats().Up)
}

// Progress names what moves with its direction, at each step, and nothing once the plan is reached.
func TestProgressNamesTheDirection(t *testing.T) {
	r := newRig(t)
	p, want := scene(r)
	var e *Engine
	seen := map[string]string{}
	e = r.engine(Config{step: func(step string) {
		if pr := e.Progress(); step == "home" || step == "demote" || step == "promote" {
			seen[step] = pr.CurrentDirection
			require.NotEmpty(t, pr.Current)
		}
	}})
	e.Apply(p)
	r.reaches(e, want)
	require.Equal(t, map[string]string{"home": "home", "demote": "down", "promote": "up"}, seen)
	require.Empty(t, e.Progress().Current+e.Progress().CurrentDirection)
}

// homing is a host that tells of the first piece of a layer, which then has to wait.
type homing struct {
	*host
	first chan struct{}
	busy  atomic.Bool
}

func (h *homing) BringHome(ctx context.Context, id string, pace func(int) error) error {
	h.busy.Store(true)
	defer h.busy.Store(false)
	return h.host.BringHome(ctx, id, func(n int) error {
		select {
		case h.first <- struct{}{}:
			h.set("a container is starting")
		default:
		}
		return pace(n)
	})
}

// A layer is not brought home while a container starts, and who pauses the engine
// then does not keep others from bringing home theirs.
func TestPauseWhileALayerIsBroughtHome(t *testing.T) {
	r := newRig(t)
	p, want := scene(r)
	h := &homing{host: r.host, first: make(chan struct{}, 1)}
	e, err := New(Config{HDD: r.host.home}, h)
	require.NoError(t, err)
	t.Cleanup(func() { _ = e.Close() })
	soon := func(what func() bool) {
		t.Helper()
		require.Eventually(t, what, 10*time.Second, time.Millisecond)
	}
	e.Apply(p)
	soon(func() bool { return e.Progress().State == Waiting && h.busy.Load() }) // it may have waited for the disk before
	e.Pause()
	soon(func() bool { return e.Progress().State == Paused })
	require.False(t, h.busy.Load())
	r.host.set("")
	e.Resume()
	r.reaches(e, want)
}

// Plans come once a minute, and name all layers that have hot files.
func TestNothingToDoIsNoWork(t *testing.T) {
	r := newRig(t)
	p, want := scene(r)
	var steps atomic.Int32
	e := r.engine(Config{step: func(string) { steps.Add(1) }})
	e.Apply(p)
	r.reaches(e, want)
	for i := range p.Down {
		p.Down[i].AtHome = true
	}
	steps.Store(0)
	e.Apply(p)
	r.reaches(e, want)
	require.Zero(t, steps.Load())

	r.put(placement.NVM, was, r.files[was])
	e.Apply(p)
	r.reaches(e, want)
	require.NotZero(t, steps.Load())
}

// Files that are open, mapped and running stay as they are, and cost space until they are let go.
func TestUnderARunningContainer(t *testing.T) {
	r := newRig(t)
	sleep, err := os.ReadFile("/bin/sleep")
	require.NoError(t, err)
	r.put(placement.NVM, name(1, 1), sleep)
	r.file(placement.NVM, name(1, 2), 3_000_000)
	path := r.mount()
	running := exec.CommandContext(t.Context(), path(name(1, 1)), "1000")
	require.NoError(t, running.Start())
	t.Cleanup(func() { _ = running.Process.Kill(); _ = running.Wait() })
	held, err := os.Open(path(name(1, 2)))
	require.NoError(t, err)
	defer held.Close()
	mapped, err := unix.Mmap(int(held.Fd()), 0, 3_000_000, unix.PROT_READ, unix.MAP_SHARED)
	require.NoError(t, err)
	defer func() { _ = unix.Munmap(mapped) }()

	e := r.engine(Config{})
	down := plan.Plan{Down: []plan.Reduction{{Layer: "1", AtHome: false, Keep: keep()}}}
	back := plan.Plan{Up: up(r, name(1, 2), name(1, 1))}
	for range 3 {
		for _, p := range []plan.Plan{down, back} {
			e.Apply(p)
			require.NoError(t, e.Wait(t.Context()))
			require.True(t, bytes.Equal(mapped, r.files[name(1, 2)]), "a mapped file changed")
			b := make([]byte, 3_000_000)
			_, err := held.ReadAt(b, 0)
			require.NoError(t, err)
			require.True(t, bytes.Equal(b, r.files[name(1, 2)]), "an open file changed")
			require.NoError(t, exec.CommandContext(t.Context(), path(name(1, 1)), "0").Run())
			require.NoError(t, running.Process.Signal(unix.Signal(0)))
			r.whole()
		}
	}
	require.GreaterOrEqual(t, e.Progress().Pinned, int64(3_000_000))
}

func TestNoRoom(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	dir := t.TempDir()
	image, nvm := filepath.Join(dir, "image"), filepath.Join(dir, "mnt")
	require.NoError(t, os.Mkdir(nvm, 0o755))
	require.NoError(t, os.WriteFile(image, nil, 0o600))
	require.NoError(t, os.Truncate(image, 16<<20))
	command(t, "mkfs.ext4", "-q", "-O", "^has_journal", "-b", "4096", image)
	command(t, "mount", "-o", "loop", image, nvm)
	t.Cleanup(func() { require.NoError(t, unix.Unmount(nvm, unix.MNT_DETACH)) })
	r := openRig(t, dir, filepath.Join(nvm, "store"))
	var names []string
	for i := range 6 {
		names = append(names, name(1, i+1))
		r.file(placement.HDD, names[i], 4<<20)
	}
	e := r.engine(Config{})
	// As when others take the space after the engine has looked: the filesystem itself says no.
	e.Apply(plan.Plan{Up: up(r, names...), Floor: -1 << 40})
	err := e.Wait(t.Context())
	require.ErrorIs(t, err, unix.ENOSPC)
	require.True(t, errdefs.IsResourceExhausted(err), err)
	p := e.Progress()
	require.Equal(t, Waiting, waitState(t, e, Waiting), "%+v", p)
	require.Contains(t, e.Progress().Error, "no room on NVM for")
	r.whole()
	before := r.onNVM("1")
	require.NotEmpty(t, before)
	// With one it is not reached, and what leaves makes room.
	r.atHome("1")
	free, err := r.host.Free()
	require.NoError(t, err)
	e.Apply(plan.Plan{Down: []plan.Reduction{{Layer: "1", AtHome: true, Keep: keep(name(1, 6))}}, Up: up(r, name(1, 6)), Floor: free + 4<<20})
	require.NoError(t, e.Wait(t.Context()))
	require.Equal(t, []string{name(1, 6)}, r.onNVM("1"))
	e.Apply(plan.Plan{Up: up(r, name(1, 2)), Floor: 1 << 40})
	err = e.Wait(t.Context())
	require.True(t, errdefs.IsResourceExhausted(err), err)
	require.False(t, errors.Is(err, unix.ENOSPC), err)
	require.Equal(t, []string{name(1, 6)}, r.onNVM("1"))
	r.whole()
}

func waitState(t *testing.T, e *Engine, want State) State {
	t.Helper()
	require.Eventually(t, func() bool { return e.Progress().State == want }, 10*time.Second, time.Millisecond, "%+v", e.Progress())
	return want
}

func TestPauseResumeNowAndBusy(t *testing.T) {
	r := newRig(t)
	p, want := scene(r)
	r.host.set("a pull is under way")
	e := r.engine(Config{Rate: 1, Operations: 1})
	e.Apply(p)
	waitState(t, e, Waiting)
	require.Equal(t, "a pull is under way", e.Progress().Reason)
	e.Pause()
	waitState(t, e, Paused)
	r.host.set("")
	e.Resume()
	waitState(t, e, Running)
	e.Pause()
	waitState(t, e, Paused)
	require.NotEqual(t, want, r.onNVM("1", "2"))
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	require.ErrorIs(t, e.Wait(ctx), context.DeadlineExceeded)
	// One byte a second would take a month.
	r.host.set("another pull")
	e.Now()
	r.reaches(e, want)
	waitState(t, e, Idle)
	require.False(t, e.Progress().Now)
	e.Pause()
	waitState(t, e, Paused)
	// With nothing to do it hurries nobody later.
	e.Now()
	require.False(t, e.Progress().Now)
}

// Where NVM is short and starts follow on each other all day, cold files leave
// all the same.
func TestOthersNeverEnd(t *testing.T) {
	r := newRig(t)
	p, want := scene(r)
	r.host.set("a container is starting")
	e := r.engine(Config{patience: 300 * time.Millisecond})
	e.Apply(p)
	waitState(t, e, Waiting)
	require.Never(t, func() bool { return e.Reached() }, time.Second, 50*time.Millisecond, "NVM is not short")
	// For how long it made way before it had nothing to do counts no more.
	e.Apply(plan.Plan{})
	waitState(t, e, Idle)
	before := e.Stats().Waited["busy"]
	p.Pressure = true
	e.Apply(p)
	r.reaches(e, want)
	require.Greater(t, e.Stats().Waited["busy"], before)
}

// Another plan takes effect at once; the file that is being copied is finished if it is still wanted.
func TestAnotherPlan(t *testing.T) {
	r := newRig(t)
	r.file(placement.HDD, name(1, 1), 16<<20)
	r.file(placement.HDD, name(1, 2), 1)
	e := r.engine(Config{Rate: 1 << 20}) // the burst is spent after the first piece or two, and the rest takes long
	e.Apply(plan.Plan{Up: up(r, name(1, 1))})
	require.Eventually(t, func() bool { return e.Progress().Current == name(1, 1) && e.Progress().State == Running }, 10*time.Second, time.Millisecond)
	e.Apply(plan.Plan{Up: up(r, name(1, 2))})
	require.NoError(t, e.Wait(t.Context()))
	require.Equal(t, []string{name(1, 2)}, r.onNVM("1"))
	require.Zero(t, e.Progress().Failing)
}

func TestOneFailureDoesNotStopTheOthers(t *testing.T) {
	r := newRig(t)
	p, want := scene(r)
	r.host.fail["1"] = errors.New("the disk is on fire")
	e := r.engine(Config{retry: time.Hour})
	p.Up = append(p.Up, plan.Promotion{Redirect: name(2, 99), Size: 1})
	e.Apply(p)
	err := e.Wait(t.Context())
	require.ErrorContains(t, err, "on fire")
	require.True(t, errdefs.IsNotFound(err), err)
	pr := e.Progress()
	require.Equal(t, 2, pr.Failing)
	require.NotEmpty(t, pr.Error)
	require.WithinRange(t, pr.ErrorAt, time.Now().Add(-time.Minute), time.Now())
	require.Equal(t, want[1:], r.onNVM("2"))
	require.Len(t, r.onNVM("1"), 7, "layer 1 is as it was")
	r.whole()
	// The same plan does not make it try sooner, Now does.
	e.Apply(p)
	require.Error(t, e.Wait(t.Context()))
	require.EqualValues(t, 2, e.Stats().Failures)
	r.host.mu.Lock()
	delete(r.host.fail, "1")
	r.host.mu.Unlock()
	e.Now()
	require.Error(t, e.Wait(t.Context()))
	require.Equal(t, want, r.onNVM("1", "2"))
	require.Equal(t, 1, e.Progress().Failing)
	e.Apply(plan.Plan{})
	require.NoError(t, e.Wait(t.Context()))
	// After a short pause it tries again by itself.
	f := r.engine(Config{retry: time.Millisecond})
	f.Apply(plan.Plan{Up: []plan.Promotion{{Redirect: name(2, 100), Size: 5}}})
	require.Error(t, f.Wait(t.Context()))
	r.file(placement.HDD, name(2, 100), 5)
	require.Eventually(t, func() bool { return f.Wait(t.Context()) == nil && f.Progress().Failing == 0 }, 10*time.Second, time.Millisecond)
	require.Contains(t, r.onNVM("2"), name(2, 100))
}

// A layer that is removed meanwhile leaves nothing.
func TestLayerGone(t *testing.T) {
	r := newRig(t)
	r.file(placement.HDD, name(1, 1), 5)
	require.NoError(t, os.WriteFile(filepath.Join(r.dir, "gone-1"), nil, 0o600))
	e := r.engine(Config{})
	e.Apply(plan.Plan{Up: up(r, name(1, 1)), Down: []plan.Reduction{{Layer: "9", AtHome: true}}})
	require.NoError(t, e.Wait(t.Context()))
	require.NoDirExists(t, filepath.Join(r.host.nvm, "1"))
}

// What a store does not let go stays, and is told.
func TestPackWithHoles(t *testing.T) {
	r := newRig(t)
	r.file(placement.NVM, name(1, 1), 5)
	e := r.engine(Config{retry: time.Hour})
	e.Apply(plan.Plan{Down: []plan.Reduction{{Layer: "1", AtHome: true}}}) // by a record that is wrong
	require.ErrorIs(t, e.Wait(t.Context()), errdefs.ErrFailedPrecondition)
	require.Equal(t, []string{name(1, 1)}, r.onNVM("1"))
	r.whole()
}

func TestRefusesNonsense(t *testing.T) {
	r := newRig(t)
	for _, c := range []Config{{Rate: -1}, {Operations: -1}, {Disk: 2}, {Disk: -1}} {
		_, err := New(c, r.host)
		require.True(t, errdefs.IsInvalidArgument(err), "%+v", c)
	}
}
