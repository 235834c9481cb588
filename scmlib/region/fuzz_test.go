// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package region

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/scmlib/region/api"
)

// fuzzDir is in memory: a store syncs much.
func fuzzDir(t *testing.T) string {
	dir, err := os.MkdirTemp("/dev/shm", "region-fuzz-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	return dir
}

// Whatever the files of a region hold, the store opens, and what it can read it can show, charge for and remove.
func FuzzMeta(f *testing.F) {
	f.Add("volume+default+a", []byte(`{"version":1,"id":"x","size":65536,"grow_to":131072}`), []byte(`{"users":[{"namespace":"default","container":"c","pid":1}],"frozen":["/sys/fs/cgroup/none/cgroup.freeze","/etc/passwd"]}`), true)
	f.Add("container+k8s.io+c", []byte(`{"version":1,"size":65536,"tenant":"shop.k8s.io","keep":true,"instance":"1"}`), []byte(`{}`), false)
	f.Add("snapshot+default+s", []byte(`{"version":1,"size":65536,"used":-1}`), []byte("null"), false)
	f.Fuzz(func(t *testing.T, key string, meta, use []byte, pooled bool) {
		if len(key) == 0 || len(key) > 200 || filepath.Base(key) != key || key == "." || key == ".." {
			t.Skip()
		}
		root := fuzzDir(t)
		dirs := []string{filepath.Join(root, "k", key)}
		if pooled {
			dirs = append(dirs, filepath.Join(root, "pool", "65536-x"))
		}
		for _, dir := range dirs {
			if err := os.MkdirAll(dir, 0o700); err != nil {
				t.Skip()
			}
			require.NoError(t, os.WriteFile(filepath.Join(dir, "data"), make([]byte, 65536), 0o600))
			require.NoError(t, os.WriteFile(filepath.Join(dir, "meta"), meta, 0o600))
			require.NoError(t, os.WriteFile(filepath.Join(dir, "use"), use, 0o600))
		}
		s, err := Open(context.Background(), root, Options{Limit: 1 << 30})
		require.NoError(t, err)
		for _, r := range s.List("") {
			require.Positive(t, r.Size)
			require.GreaterOrEqual(t, r.charge(), int64(0))
			require.NoError(t, r.check())
			_, err := s.Inspect(r.Ref)
			require.NoError(t, err)
			_, _ = s.Check(t.Context(), r.Ref, false)
			if !alive(r.Users) {
				require.NoError(t, s.Remove(t.Context(), r.Ref))
			}
		}
		b, err := s.Books()
		require.NoError(t, err)
		require.GreaterOrEqual(t, b.Promised, int64(0))
		require.NoError(t, s.Close())
	})
}

// Whatever comes on the socket is answered or hung up on, and harms nobody.
func FuzzProtocol(f *testing.F) {
	frame := func(s string) []byte { return append([]byte{byte(len(s)), byte(len(s) >> 8), 0, 0}, s...) }
	for _, op := range []string{OpList, OpBooks, OpInspect, OpCheck, OpCreate, OpRemove, OpKeep, OpResize, OpSnapshot, OpClone, OpUse, OpExport, OpImport, api.OpAttach} {
		f.Add(frame(`{"version":1,"op":"`+op+`","args":{"namespace":"default","region":"a","to":"b","create":{"size":65536},"container":"c","pid":1,"size":65536}}`), true)
	}
	f.Add([]byte{255, 255, 255, 255}, false)
	f.Add(frame(`{"version":2}`), false)
	f.Fuzz(func(t *testing.T, message []byte, withFile bool) {
		s, err := Open(context.Background(), fuzzDir(t), Options{Limit: 1 << 20, Quota: Quota{Regions: 4}})
		require.NoError(t, err)
		_, err = s.Create(t.Context(), "default", "a", CreateOptions{Size: 65536})
		require.NoError(t, err)
		srv := NewServer(s)
		path := filepath.Join(s.root, "s.sock")
		l, err := net.Listen("unix", path)
		require.NoError(t, err)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- srv.Serve(ctx, l) }()
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		require.NoError(t, err)
		conn := os.NewFile(uintptr(fd), "conn")
		require.NoError(t, unix.Connect(fd, &unix.SockaddrUnix{Name: path}))
		var oob []byte
		if withFile {
			r, w, err := os.Pipe()
			require.NoError(t, err)
			defer r.Close()
			go func() { _, _ = io.Copy(io.Discard, r) }()
			defer w.Close()
			oob = unix.UnixRights(int(w.Fd()))
		}
		if len(message) > 0 {
			_, err = unix.SendmsgN(fd, message, oob, nil, unix.MSG_NOSIGNAL)
			require.NoError(t, err)
		}
		require.NoError(t, unix.Shutdown(fd, unix.SHUT_WR))
		require.NoError(t, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 20}))
		var reply api.Reply
		files, err := api.Read(fd, &reply)
		api.CloseAll(files)
		require.False(t, errors.Is(err, unix.EAGAIN), "no answer within 20 s")
		require.NoError(t, conn.Close())
		cancel()
		select {
		case err := <-done:
			require.NoError(t, err)
		case <-time.After(20 * time.Second):
			t.Fatal("it does not end")
		}
		require.NoError(t, s.Close())
	})
}
