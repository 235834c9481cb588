//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"strings"
	"testing"

	"github.com/nhybrid/nhybrid/integration/rig"
)

// TestPullAndRun is a thin thread through everything, with what a rig has by itself.
func TestPullAndRun(t *testing.T) {
	t.Parallel()
	r := rig.New(t, rig.Options{})
	ctx := t.Context()
	if _, err := r.PushBusybox(ctx, "busybox:1"); err != nil {
		t.Fatal(err)
	}
	if err := r.Pull(ctx, "busybox:1"); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"c1", "extract-1"} { // a name that begins like the key of an unpack
		out, err := r.RunContainer(ctx, "busybox:1", id, "echo", "hello from nhybrid")
		if err != nil || !strings.Contains(out, "hello from nhybrid") {
			t.Fatalf("run: %v: %q", err, out)
		}
	}
	// Each view shows it, by whatever policy is the default.
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"status"}, "1 committed"},
		{[]string{"ls"}, r.Ref("busybox:1")},
		{[]string{"inspect", r.Ref("busybox:1")}, "layers     1"},
		{[]string{"why", r.Ref("busybox:1")}, "stands on"},
		{[]string{"du"}, r.Ref("busybox:1")},
	} {
		out, err := r.Nhybridctl(ctx, c.args...)
		if err != nil || !strings.Contains(out, c.want) {
			t.Errorf("nhybridctl %q: %v: want %q in\n%s", c.args, err, c.want, out)
		}
	}
}
