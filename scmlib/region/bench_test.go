// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package region

import (
	"fmt"
	"testing"
	"time"

	"github.com/nhybrid/nhybrid/scmlib/region/api"
)

// BenchmarkAttach is what the daemon does while a container waits: a new region from the pool, and that of a container that starts again.
func BenchmarkAttach(b *testing.B) {
	const ready = 200
	for _, kind := range []string{"tmpfs", "ext4", "xfs"} {
		b.Run(kind, func(b *testing.B) {
			s := open(b, filesystem(b, kind, 512*mib), Options{Pool: map[int64]int{mib: ready}})
			pid := sleeper(b).Process.Pid
			attach := func(i int) {
				f, _, err := s.Attach(b.Context(), api.Attach{Namespace: "default", Container: fmt.Sprintf("c%d", i), Pid: pid, Size: mib}, nil)
				if err != nil {
					b.Fatal(err)
				}
				f.Close()
			}
			b.Run("new", func(b *testing.B) {
				for i := 0; b.Loop(); i++ {
					b.StopTimer()
					if s.Pooled(mib) == 0 { // all of them, so that none is made meanwhile
						for s.Pooled(mib) < ready {
							time.Sleep(tick)
						}
					}
					if i > 0 {
						if err := s.Release(b.Context(), "default", fmt.Sprintf("c%d", i-1)); err != nil {
							b.Fatal(err)
						}
					}
					b.StartTimer()
					attach(i)
				}
			})
			b.Run("again", func(b *testing.B) {
				for b.Loop() {
					attach(1 << 30)
				}
			})
		})
	}
}
