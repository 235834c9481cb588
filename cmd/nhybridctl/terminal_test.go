// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/cmd/internal/config"
)

// pty is a terminal of 100 columns; what is written to it is handed to seen, line ends included.
func pty(t *testing.T, seen func(string)) *os.File {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skip("no pseudo-terminals here")
	}
	fd := int(master.Fd())
	require.NoError(t, unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0))
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	require.NoError(t, err)
	require.NoError(t, unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: 40, Col: 100}))
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	require.NoError(t, err)
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, 4096)
		for {
			n, err := master.Read(b)
			if err != nil { // EIO: the other end is closed
				return
			}
			seen(string(b[:n]))
		}
	}()
	t.Cleanup(func() {
		require.NoError(t, slave.Close())
		<-done
		require.NoError(t, master.Close())
	})
	return slave
}

func TestOnATerminal(t *testing.T) {
	t.Setenv("TERM", "xterm")
	t.Setenv("NO_COLOR", "")
	h := newHot(t)
	socket := serve(t, &backend{hot: h}, config.Default())
	for _, x := range []struct {
		args []string
		want string
	}{
		{[]string{"top", "--interval", "100ms"}, "\x1b[11A\x1b[2Ktime"}, // drawn over
		{[]string{"inspect", "--files", image}, "\x1b[31m#"},
		{[]string{"migrate", "now", "--wait"}, "waiting"}, // the bar says so
	} {
		t.Run(x.args[0], func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			var text strings.Builder // of the reader, until found is closed
			found := make(chan struct{})
			tty := pty(t, func(s string) {
				if text.Len() < 1<<20 && !strings.Contains(text.String(), x.want) {
					if text.WriteString(s); strings.Contains(text.String(), x.want) {
						close(found)
						if x.args[0] != "inspect" {
							cancel()
						}
					}
				}
			})
			run(ctx, append(x.args, "--address", socket), tty, tty)
			select {
			case <-found:
			case <-time.After(20 * time.Second):
				require.Fail(t, "never shown", x.want)
			}
		})
	}
}

func TestColour(t *testing.T) {
	require.False(t, colour(&bytes.Buffer{}))
	tty, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Skip("no pseudo-terminals here")
	}
	defer tty.Close()
	t.Setenv("TERM", "xterm")
	t.Setenv("NO_COLOR", "")
	require.True(t, colour(tty))
	t.Setenv("NO_COLOR", "1")
	require.False(t, colour(tty))
	t.Setenv("NO_COLOR", "")
	t.Setenv("TERM", "dumb")
	require.False(t, colour(tty))
}
