//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"strings"
	"testing"

	"github.com/nhybrid/nhybrid/integration/rig"
)

func TestPullAndRun(t *testing.T) {
	r := rig.New(t, rig.Options{})
	ctx := t.Context()
	if _, err := r.PushBusybox(ctx, "busybox:1"); err != nil {
		t.Fatal(err)
	}
	if err := r.Pull(ctx, "busybox:1"); err != nil {
		t.Fatal(err)
	}
	out, err := r.RunContainer(ctx, "busybox:1", "c1", "echo", "hello from nhybrid")
	if err != nil || !strings.Contains(out, "hello from nhybrid") {
		t.Fatalf("run: %v: %q", err, out)
	}
	for _, args := range [][]string{{"status"}, {"ls"}, {"inspect", r.Ref("busybox:1")}, {"why", r.Ref("busybox:1")}, {"du"}} {
		out, err := r.Nhybridctl(ctx, args...)
		t.Logf("%v: %v\n%s", args, err, out)
	}
	t.Log(r.Daemon.Log())
}
