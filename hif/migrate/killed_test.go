// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package migrate

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/hif/plan"
)

// The engine is killed at each of its steps, and at random moments, in a process
// of its own; the next one goes on.
func TestKilled(t *testing.T) {
	if dir := os.Getenv("MIGRATE_TEST_DIR"); dir != "" {
		child(t, dir)
		return
	}
	steps := 0
	for at := 1; ; at++ {
		r := newRig(t)
		p, want := scene(r)
		killed := r.child("MIGRATE_TEST_STEP="+strconv.Itoa(at), 0)
		r.whole()
		e := r.engine(Config{})
		e.Apply(p)
		r.reaches(e, want)
		require.NoError(t, e.Close())
		if !killed {
			break
		}
		steps++
	}
	require.GreaterOrEqual(t, steps, 12)
	random := 0
	for i := range 4 {
		r := newRig(t)
		p, want := scene(r)
		for range 2 {
			if r.child("MIGRATE_TEST_STEP=0", time.Duration(rand.IntN(16000*(i+1)))*time.Microsecond) {
				random++
			}
			r.whole()
		}
		e := r.engine(Config{})
		e.Apply(p)
		r.reaches(e, want)
	}
	t.Logf("killed at %d steps and %d random moments", steps, random)
}

// child runs the scene's plan in another process, which it kills after a time
// from the moment that the process begins to work, and tells whether it died.
func (r *rig) child(env string, after time.Duration) bool {
	r.t.Helper()
	cmd := exec.CommandContext(r.t.Context(), os.Args[0], "-test.run=^TestKilled$")
	cmd.Env = append(os.Environ(), "MIGRATE_TEST_DIR="+r.dir, env)
	var said bytes.Buffer
	cmd.Stderr = &said
	ready, err := cmd.StdoutPipe()
	require.NoError(r.t, err)
	require.NoError(r.t, cmd.Start())
	if after > 0 {
		b := make([]byte, 1)
		if _, err := ready.Read(b); err == nil {
			time.Sleep(after) // the moment is random, nothing waits for it
			_ = cmd.Process.Kill()
		}
	} else {
		_, _ = new(bytes.Buffer).ReadFrom(ready)
	}
	err = cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == unix.SIGKILL {
		return true
	}
	require.NoError(r.t, err, said.String())
	return false
}

func child(t *testing.T, dir string) {
	r := openRig(t, dir, filepath.Join(dir, "nvm"))
	at, err := strconv.ParseInt(os.Getenv("MIGRATE_TEST_STEP"), 10, 64)
	require.NoError(t, err)
	var n atomic.Int64
	e := r.engine(Config{step: func(string) {
		if n.Add(1) == at {
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
			select {}
		}
	}})
	fmt.Print(".")
	e.Apply(scenePlan())
	require.NoError(t, e.Wait(t.Context()))
}

// scenePlan is the plan of scene.
func scenePlan() plan.Plan {
	return plan.Plan{
		Down: []plan.Reduction{
			{Layer: "2", AtHome: true, Keep: keep(name(2, 4), name(2, 6))},
			{Layer: "1", Keep: keep(hot)},
		},
		Up: []plan.Promotion{{Redirect: name(2, 6), Size: 1_500_001}, {Redirect: name(2, 4), Size: 900_001}},
	}
}
