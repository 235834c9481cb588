// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package migrate

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// Every listenEvery the engine holds its breath for listenFor. All that the
	// disk does then is of others: the engine reads from the HDD in one thread, so
	// that nothing of its own is under way but a last read-ahead.
	listenEvery = time.Second
	listenFor   = 100 * time.Millisecond
	// While others are at work it listens for longer at a time.
	listenBusy = time.Second
)

// disk knows how busy others keep the device of the HDD tier.
type disk struct {
	stat  string // the kernel's counters; "" if the device has none
	limit float64
	busy  bool
	share float64 // of the time, by others, when last listened to

	begun sample // of listening; zero: not listening
	next  time.Time
	until time.Time
}

// sample is the counter of a device at a time: how long it has had something to do.
type sample struct {
	at   time.Time
	busy time.Duration
}

func newDisk(path string, limit float64) *disk {
	d := &disk{limit: limit}
	if limit < 1 {
		d.stat = statFile(path)
	}
	return d
}

// statFile is where the kernel counts what the device of a path does; "" where
// st_dev names no block device: FUSE, tmpfs, btrfs.
func statFile(path string) string {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return ""
	}
	file := fmt.Sprintf("/sys/dev/block/%d:%d/stat", unix.Major(st.Dev), unix.Minor(st.Dev))
	if _, err := readBusy(file); err != nil {
		return ""
	}
	return file
}

// readBusy reads io_ticks, the milliseconds in which the device had at least one
// request (Documentation/block/stat.rst, tenth field).
func readBusy(file string) (time.Duration, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(b))
	if len(fields) < 10 {
		return 0, fmt.Errorf("%s: %d fields, want at least 10", file, len(fields))
	}
	ms, err := strconv.ParseInt(fields[9], 10, 64)
	return time.Duration(ms) * time.Millisecond, err
}

// listen returns how long the engine must hold still; 0: it may go on.
func (d *disk) listen() time.Duration {
	if d.stat == "" {
		return 0
	}
	now := time.Now()
	if d.begun.at.IsZero() && now.Before(d.next) {
		return 0
	}
	busy, err := readBusy(d.stat)
	if err != nil {
		d.stat = "" // the device is gone; the next access says so
		return 0
	}
	return d.hear(sample{now, busy})
}

// hear is listen without the clock and the device.
func (d *disk) hear(s sample) (wait time.Duration) {
	if !d.begun.at.IsZero() {
		if rest := d.until.Sub(s.at); rest > 0 {
			return rest // woken early
		}
		// io_ticks counts a request that is under way only when it ends, so a
		// window can hold more than its own time.
		d.share = min(1, float64(s.busy-d.begun.busy)/float64(s.at.Sub(d.begun.at)))
		d.busy = tooBusy(d.busy, d.share, d.limit)
		d.begun = sample{}
		d.next = s.at.Add(listenEvery)
		if !d.busy {
			return 0
		}
	}
	wait = listenFor
	if d.busy {
		wait = listenBusy
	}
	d.begun, d.until = s, s.at.Add(wait)
	return wait
}

// tooBusy wants half as much of a disk that was busy before, so that the engine
// does not start and stop all the time.
func tooBusy(before bool, share, limit float64) bool {
	if before {
		return share > limit/2
	}
	return share > limit
}
