// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package thread runs code in the namespaces of others.
package thread

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// Run calls fn on a thread that ends with it, whatever namespaces it has entered, and waits.
//
// It is never the first thread of the process. That one cannot end: it would stay in those namespaces and keep all that is
// mounted there, and /proc/self, which is the first thread's, would tell of them.
func Run(fn func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and not unlocked: so the thread ends with the goroutine
		if unix.Gettid() == unix.Getpid() {
			Run(fn) // while this goroutine keeps the first thread, no other gets it
			runtime.UnlockOSThread()
			return
		}
		fn()
	}()
	<-done
}
