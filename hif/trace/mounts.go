// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package trace

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"unsafe"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// overlay is one mount of an overlay filesystem that may be a container's.
type overlay struct {
	dev    devnum
	point  string // in our mount namespace; empty if it was found through a process
	upper  string
	tree   string    // first lower directory
	clones [3]uint64 // of its data-only layers, by slot; 0: not known yet
}

// The places of data-only layers in overlay.clones.
const (
	nvmSlot = iota
	partsSlot
	homeSlot
)

// wants tells whether w is the watch of this overlay. An overlay without an
// upper directory is a view, which serves every start on the tree, or what
// containerd mounts for a moment to look into a rootfs: a view, or the snapshot
// read-only, with the upper directory in front of the lower ones
// (mount.WithReadonlyTempMount).
func (o *overlay) wants(w *Watch) bool {
	if o.upper != "" {
		return o.upper == w.start.Upper
	}
	return o.tree != "" && (o.tree == w.start.Tree || o.tree == w.start.Upper)
}

// mountTable is our own mountinfo, read again only when it changed. A list that
// was given out stays as it is.
type mountTable struct {
	mu   sync.Mutex
	file *os.File
	list []*overlay
}

func (m *mountTable) close() {
	if m.file != nil {
		m.file.Close()
	}
}

// overlays lists the overlays in our mount namespace, newest first.
func (m *mountTable) overlays() ([]*overlay, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.file == nil {
		// Not by os.Open: the runtime would put it into its epoll set, which
		// asks for the state of the file and so takes the flag away from us.
		fd, err := unix.Open("/proc/self/mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, fmt.Errorf("open mount table: %w", err)
		}
		m.file = os.NewFile(uintptr(fd), "mountinfo")
	} else {
		// The kernel flags a change of the table as POLLPRI, once a reader.
		p := []unix.PollFd{{Fd: int32(m.file.Fd()), Events: unix.POLLPRI}}
		if n, err := unix.Poll(p, 0); err == nil && n == 0 {
			return m.list, nil
		}
		if _, err := m.file.Seek(0, 0); err != nil {
			return nil, fmt.Errorf("rewind mount table: %w", err)
		}
	}
	infos, err := mountinfo.GetMountsFromReader(m.file, mountinfo.FSTypeFilter("overlay"))
	if err != nil {
		return nil, fmt.Errorf("read mount table: %w", err)
	}
	m.list = m.list[:0:0]
	seen := map[devnum]bool{}
	for i := len(infos) - 1; i >= 0; i-- {
		o := overlayOf(infos[i])
		// A bind mount of a directory inside is not the rootfs.
		if infos[i].Root != "/" || seen[o.dev] {
			continue
		}
		seen[o.dev] = true
		m.list = append(m.list, o)
	}
	return m.list, nil
}

func overlayOf(info *mountinfo.Info) *overlay {
	o := &overlay{dev: devnum{uint32(info.Major), uint32(info.Minor)}, point: info.Mountpoint}
	for opt := range strings.SplitSeq(info.VFSOptions, ",") {
		switch k, v, _ := strings.Cut(opt, "="); k {
		case "upperdir":
			o.upper = unescape(v)
		case "lowerdir", "lowerdir+":
			// "tree::data::home", or one option for each; no path of ours has a colon.
			if o.tree == "" {
				v, _, _ = strings.Cut(v, ":")
				o.tree = unescape(v)
			}
		}
	}
	return o
}

// unescape undoes the kernel's octal escapes (seq_escape) in a mount option.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+4 <= len(s) {
			if c, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(c))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// rootOf finds the overlay that is the root of a process. The descriptor leads
// there, whatever mount namespace it is in.
func rootOf(pid int32) (*overlay, int, error) {
	proc := "/proc/" + strconv.Itoa(int(pid))
	fd, err := unix.Open(proc+"/root", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, -1, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return nil, -1, err
	}
	dev := devnum{unix.Major(st.Dev), unix.Minor(st.Dev)}
	table, err := os.ReadFile(proc + "/mountinfo")
	if err == nil {
		var infos []*mountinfo.Info
		infos, err = mountinfo.GetMountsFromReader(bytes.NewReader(table), mountinfo.FSTypeFilter("overlay"))
		for _, info := range infos {
			if o := overlayOf(info); o.dev == dev {
				o.point = ""
				return o, fd, nil
			}
		}
	}
	unix.Close(fd)
	if err == nil {
		err = unix.ENOENT
	}
	return nil, -1, err
}

// probe finds the private clone through which an overlay opens a file: it marks
// the data file in a group of its own, opens the file through the overlay, and
// looks at the event of that open. The answer is exact; 0 if the overlay has no
// such file. dir is the root of the overlay, or -1 (see try), data a descriptor of the data file. t.mu is not held.
func (t *Tracer) probe(o *overlay, dir, data int, path string) (uint64, error) {
	if dir < 0 {
		// A mount of our own of the same overlay: whoever wants to unmount the one at
		// that path would find it busy, and containerd, which mounts a rootfs for a
		// moment to look up users, tries again after 50 ms only (mount.Unmount).
		fd, err := unix.OpenTree(unix.AT_FDCWD, o.point, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_SYMLINK_NOFOLLOW)
		if err != nil {
			return 0, nil // unmounted since
		}
		// Where it was unmounted meanwhile this ends the overlay, and overlayfs then
		// syncs the filesystem of its upper directory: nobody need wait for that.
		defer t.wg.Go(func() { unix.Close(fd) })
		var st unix.Statx_t
		if err := statx(fd, &st); err != nil || devOf(&st) != o.dev {
			return 0, err
		}
		dir = fd
	}
	if t.probing != nil {
		t.probing(o)
	}
	group, err := unix.FanotifyInit(unix.FAN_CLASS_NOTIF|unix.FAN_CLOEXEC|unix.FAN_NONBLOCK, eventFlags)
	if err != nil {
		return 0, fmt.Errorf("open probe group: %w", err)
	}
	defer unix.Close(group)
	if err := unix.FanotifyMark(group, unix.FAN_MARK_ADD, unix.FAN_OPEN, data, ""); err != nil {
		return 0, fmt.Errorf("mark data of %q: %w", path, err)
	}
	fd, err := openRegular(dir, path)
	if err != nil {
		return 0, nil // not there, or hidden, in this container
	}
	unix.Close(fd)
	var found uint64
	buf := make([]byte, 4096)
	for {
		n, err := unix.Read(group, buf)
		if err != nil {
			return found, nil // EAGAIN: that was all
		}
		for b := buf[:n]; len(b) >= unix.FAN_EVENT_METADATA_LEN; {
			ev := (*unix.FanotifyEventMetadata)(unsafe.Pointer(&b[0]))
			b = b[min(int(ev.Event_len), len(b)):]
			if ev.Fd < 0 {
				continue
			}
			var st unix.Statx_t
			if ev.Pid == t.self && statx(int(ev.Fd), &st) == nil && !t.isRoot(st.Mnt_id) {
				found = st.Mnt_id
			}
			unix.Close(int(ev.Fd))
		}
	}
}
