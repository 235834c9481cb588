//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/integration/rig"
)

// Each wrong configuration gets one line that names the thing and what to do, and no file is made.
func TestBadConfiguration(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	hdd, nvm := filepath.Join(dir, "hdd"), filepath.Join(dir, "nvm", "nhybrid")
	sockets := []string{"--address", filepath.Join(dir, "n.sock"), "--set", "control_address=" + filepath.Join(dir, "c.sock"), "--set", "state=" + filepath.Join(dir, "state")}
	file := func(text string) string {
		path := filepath.Join(t.TempDir(), "nhybrid.toml")
		require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
		return path
	}
	unknown := file("version = 1\n[placement]\npolcy = 'lass'\n")
	broken := file("version = 1\nroot = \n")
	newer := file("version = 7\n")
	for name, c := range map[string]struct {
		args []string
		want []string
	}{
		"unknown key":        {[]string{"--config", unknown}, []string{unknown, "polcy"}},
		"broken file":        {[]string{"--config", broken}, []string{broken, "2"}},
		"newer file":         {[]string{"--config", newer}, []string{"version", "7", "reads version 1"}},
		"missing file":       {[]string{"--config", filepath.Join(dir, "none.toml")}, []string{filepath.Join(dir, "none.toml")}},
		"unknown flag":       {[]string{"--polcy", "lass"}, []string{"--polcy"}},
		"unknown set":        {[]string{"--set", "placement.polcy=lass"}, []string{"polcy"}},
		"unknown policy":     {[]string{"--set", "placement.policy=fast"}, []string{"placement.policy", "fast", "lass", "drain"}},
		"boundary":           {[]string{"--set", "placement.policy=boundary=-1"}, []string{"placement.policy", "-1"}},
		"relative root":      {[]string{"--root", "hdd"}, []string{"root", `"hdd"`, "absolute"}},
		"relative nvm root":  {[]string{"--nvm-root", "nvm/x"}, []string{"nvm_root", `"nvm/x"`, "absolute"}},
		"one root":           {[]string{"--nvm-root", hdd}, []string{"nvm_root", "same directory as root"}},
		"root in root":       {[]string{"--nvm-root", hdd + "/nvm"}, []string{hdd + "/nvm"}},
		"colon":              {[]string{"--root", dir + "/h:dd"}, []string{dir + "/h:dd", "choose another path"}},
		"nvm not mounted":    {nil, []string{nvm, "mount"}},
		"reserve":            {[]string{"--set", "placement.nvm_reserve=much"}, []string{"placement.nvm_reserve", "much"}},
		"upper tier":         {[]string{"--set", "snapshot.upper_tier=ssd"}, []string{"snapshot.upper_tier", "ssd", "nvm", "hdd"}},
		"log level":          {[]string{"--log-level", "loud"}, []string{"log_level", "loud"}},
		"workers":            {[]string{"--set", "background.workers=0"}, []string{"background.workers", "0"}},
		"argument":           {[]string{"start"}, []string{"start"}},
		"relative socket":    {[]string{"--address", "n.sock"}, []string{"address", "n.sock", "absolute"}},
		"one socket for two": {[]string{"--set", "control_address=" + filepath.Join(dir, "n.sock")}, []string{"address", "control_address", "different"}},
	} {
		t.Run(name, func(t *testing.T) {
			said := refused(t, append(append([]string{"--root", hdd, "--nvm-root", nvm}, sockets...), c.args...)...)
			for _, w := range c.want {
				require.Contains(t, said, w)
			}
			require.NoDirExists(t, filepath.Dir(nvm), "a tier that is not mounted is not filled")
		})
	}
}

// Tiers on one filesystem work, with a warning: that is how one tries nhybrid.
func TestTiersOnOneFilesystem(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{NVM: filepath.Join(t.TempDir(), "nvm")})
	require.True(t, inLog(r, "level=warning", "one filesystem", r.NVM, r.HDD))
	_, err := r.PushBusybox(ctx, "busybox:1")
	require.NoError(t, err)
	require.NoError(t, r.Pull(ctx, "busybox:1"))
	out, err := r.RunContainer(ctx, "busybox:1", "c", "echo", "hello")
	require.NoError(t, err)
	require.Equal(t, "hello", out)
}

// A store that something is wrong with is refused as it is, and works again when that is mended.
func TestDamagedStoreIsLeftAlone(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{})
	_, err := r.PushTiny(ctx, "app:1", app(1))
	require.NoError(t, err)
	require.NoError(t, r.Pull(ctx, "app:1"))
	settled(t, r)

	// While it runs: no second daemon, neither on the sockets nor on the store.
	said := refused(t, arguments(r)...)
	require.Contains(t, said, r.DaemonSocket())
	require.Contains(t, said, "in use")
	before := print(t, r.NVM+"/d", r.HDD+"/p")
	said = refused(t, arguments(r, "--address", r.Dir+"/second.sock", "--set", "control_address="+r.Dir+"/second-control.sock")...)
	require.Contains(t, said, r.NVM)
	require.Contains(t, said, "second daemon")
	require.Equal(t, before, print(t, r.NVM+"/d", r.HDD+"/p"))
	require.Equal(t, "2", run(t, r, "app:1", "cat", "/data/shared"), "the first goes on")

	require.NoError(t, r.Daemon.Stop())
	reboot(t, r)
	database := filepath.Join(r.NVM, "nhybrid.db")
	schema := func(v string) (old string) {
		t.Helper()
		db, err := bolt.Open(database, 0o600, nil)
		require.NoError(t, err)
		defer func() { require.NoError(t, db.Close()) }()
		require.NoError(t, db.Update(func(tx *bolt.Tx) error {
			b := tx.Bucket([]byte("nhybrid"))
			old = string(b.Get([]byte("schema")))
			return b.Put([]byte("schema"), []byte(v))
		}))
		return old
	}
	swap := func(path string, make func(path string) error) (restore func()) {
		t.Helper()
		require.NoError(t, os.Rename(path, path+".aside"))
		require.NoError(t, make(path))
		return func() {
			require.NoError(t, os.RemoveAll(path))
			require.NoError(t, os.Rename(path+".aside", path))
		}
	}
	elsewhere := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(elsewhere, "precious"), []byte("precious"), 0o600))
	toElsewhere := func(path string) error { return os.Symlink(elsewhere, path) }
	remount := func(flags uintptr) {
		t.Helper()
		require.NoError(t, unix.Mount("", filepath.Dir(r.NVM), "", unix.MS_REMOUNT|flags, ""))
	}
	for _, c := range []struct {
		name  string
		spoil func() (mend func())
		want  []string
	}{
		{"database of a newer version", func() func() {
			old := schema("99")
			return func() { schema(old) }
		}, []string{database, "schema version 99", "newer"}},
		{"database with nonsense for a version", func() func() {
			old := schema("x")
			return func() { schema(old) }
		}, []string{database, "schema version", `"x"`}},
		{"database that is none", func() func() {
			return swap(database, func(p string) error { return os.WriteFile(p, make([]byte, 64<<10), 0o600) })
		}, []string{database, "move it away", "copy on the HDD root"}},
		{"read-only NVM", func() func() {
			remount(unix.MS_RDONLY)
			return func() { remount(0) }
		}, []string{r.NVM, "read-only", "remount"}},
		{"NVM of another store", func() func() {
			return swap(filepath.Join(r.NVM, "store-id"), func(p string) error { return os.WriteFile(p, []byte("ANOTHER\n"), 0o600) })
		}, []string{r.NVM, "ANOTHER", r.HDD}},
		{"HDD of another store", func() func() {
			return swap(filepath.Join(r.HDD, "store-id"), func(string) error { return nil })
		}, []string{r.NVM, r.HDD}},
		{"symlink for the data root on NVM", func() func() { return swap(filepath.Join(r.NVM, "d"), toElsewhere) },
			[]string{filepath.Join(r.NVM, "d"), "not a directory"}},
		{"symlink for the packs", func() func() { return swap(filepath.Join(r.HDD, "p"), toElsewhere) },
			[]string{filepath.Join(r.HDD, "p"), "not a directory"}},
		{"symlink for the staging root", func() func() { return swap(filepath.Join(r.HDD, "s"), toElsewhere) },
			[]string{filepath.Join(r.HDD, "s"), "not a directory"}},
		{"file for the views", func() func() {
			return swap(filepath.Join(r.HDD, "v"), func(p string) error { return os.WriteFile(p, nil, 0o600) })
		}, []string{filepath.Join(r.HDD, "v"), "not a directory"}},
		{"socket that is something else", func() func() {
			require.NoError(t, os.WriteFile(r.DaemonSocket(), []byte("precious"), 0o600))
			return func() { require.NoError(t, os.Remove(r.DaemonSocket())) }
		}, []string{r.DaemonSocket(), "socket"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			mend := c.spoil()
			defer mend()
			before := print(t, filepath.Dir(r.NVM), r.HDD, elsewhere)
			said := refused(t, arguments(r)...)
			for _, w := range c.want {
				require.Contains(t, said, w)
			}
			require.Equal(t, before, print(t, filepath.Dir(r.NVM), r.HDD, elsewhere), "nothing stored is touched")
		})
	}

	// A database that is empty or gone is replaced by its copy, and no layer is taken for garbage.
	for _, spoil := range []func(string) error{func(p string) error { return os.Truncate(p, 0) }, os.Remove} {
		layers := print(t, filepath.Join(r.NVM, "d"), filepath.Join(r.HDD, "p"))
		require.NoError(t, spoil(database))
		require.NoError(t, r.Daemon.Start(ctx))
		settled(t, r)
		require.Equal(t, layers, print(t, filepath.Join(r.NVM, "d"), filepath.Join(r.HDD, "p")))
		require.True(t, inLog(r, "restoring from the copy", r.HDD))
		require.NoError(t, r.Daemon.Stop())
	}

	// From then on what the database does not know is spared, until somebody says that it is garbage.
	require.NoError(t, os.Remove(filepath.Join(r.NVM, "restored")))
	// A symlink among the layers is removed as such.
	planted := filepath.Join(r.NVM, "d", "4711")
	require.NoError(t, os.Symlink(elsewhere, planted))
	foreign := filepath.Join(r.NVM, "d", "somebody's")
	require.NoError(t, os.Mkdir(foreign, 0o700))
	require.NoError(t, r.Daemon.Start(ctx))
	settled(t, r)
	require.NoFileExists(t, planted)
	require.FileExists(t, filepath.Join(elsewhere, "precious"))
	require.DirExists(t, foreign)
	require.True(t, inLog(r, "somebody's", "left alone"))
	require.NoError(t, os.Remove(foreign))

	await(t, reachable(r))
	require.Equal(t, contentSum(t, 1, 3), run(t, r, "app:1", "sh", "-c", "cat /data/*/* | sha256sum"))
	removeImage(t, r, "app:1")
	awaitEmpty(t, r)
}

// The image of a view is only derived: whatever has become of it, it is built again.
func TestDamagedViewIsMadeAgain(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{})
	_, err := r.PushTiny(ctx, "app:1", app(2))
	require.NoError(t, err)
	require.NoError(t, r.Pull(ctx, "app:1"))
	settled(t, r)
	for name, spoil := range map[string]func(path string, size int64) error{
		"truncated": func(p string, size int64) error { return os.Truncate(p, size/2) },
		"short":     func(p string, size int64) error { return os.Truncate(p, size-1) },
		"empty":     func(p string, _ int64) error { return os.Truncate(p, 0) },
		"missing":   func(p string, _ int64) error { return os.Remove(p) },
		"zeros":     func(p string, size int64) error { return os.WriteFile(p, make([]byte, size), 0o600) },
		"superblock": func(p string, _ int64) error {
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			b[1024+100] ^= 1
			return os.WriteFile(p, b, 0o600)
		},
	} {
		require.NoError(t, r.Daemon.Stop(), name)
		reboot(t, r)
		image := oneView(t, r)
		st, err := os.Stat(image)
		require.NoError(t, err)
		good := print(t, image)
		require.NoError(t, spoil(image, st.Size()), name)
		require.NoError(t, r.Daemon.Start(ctx), name)
		await(t, reachable(r))
		require.Equal(t, contentSum(t, 2, 3), run(t, r, "app:1", "sh", "-c", "cat /data/*/* | sha256sum"), name)
		require.Equal(t, good, print(t, image), "%s: the same image is made of the same packs", name)
	}
	require.True(t, inLog(r, "the image of a view is unusable"))
}

// Labels come from users and from images. Nonsense is an error that names the label, and leaves no snapshot behind.
func TestNonsenseLabels(t *testing.T) {
	t.Parallel()
	ctx := soon(t)
	r := newRig(t, rig.Options{})
	_, err := r.PushBusybox(ctx, "busybox:1")
	require.NoError(t, err)
	require.NoError(t, r.Pull(ctx, "busybox:1"))
	settled(t, r)
	before := print(t, filepath.Join(r.NVM, "s"), filepath.Join(r.HDD, "s"), filepath.Join(r.NVM, "d"), filepath.Join(r.HDD, "p"))
	top := topOf(t, r, "busybox:1")
	const upper, size = "containerd.io/snapshot/nhybrid.upper-tier", "containerd.io/snapshot/max-size"
	const uid, gid = "containerd.io/snapshot/uidmapping", "containerd.io/snapshot/gidmapping"
	for i, c := range []struct {
		labels map[string]string
		want   []string
	}{
		{map[string]string{upper: "ssd"}, []string{upper, "ssd", "nvm or hdd"}},
		{map[string]string{upper: ""}, []string{upper}},
		{map[string]string{size: "much"}, []string{size, "much"}},
		{map[string]string{size: "-1"}, []string{size, "-1"}},
		{map[string]string{size: "99999999999999999999"}, []string{size}},
		{map[string]string{uid: "0:100000:65536"}, []string{uid, gid}},
		{map[string]string{uid: "0:100000", gid: "0:100000:65536"}, []string{"0:100000", "container:host:size"}},
		{map[string]string{uid: "a:b:c", gid: "0:1:2"}, []string{"a:b:c"}},
		{map[string]string{uid: "5:100000:1", gid: "0:1:2"}, []string{"root"}},
		{map[string]string{uid: "0:100000:0", gid: "0:100000:0"}, []string{"root"}},
	} {
		labels := map[string]string{"containerd.io/gc.root": "test"}
		for k, v := range c.labels {
			labels[k] = v
		}
		key := fmt.Sprintf("nonsense-%d", i)
		_, err := service(t, r, "nhybrid").Prepare(r.Context(ctx), key, top, withLabels(labels))
		require.Error(t, err, "%v", c.labels)
		for _, w := range c.want {
			require.ErrorContains(t, err, w)
		}
		require.NotContains(t, err.Error(), "\n")
		_, err = service(t, r, "nhybrid").Stat(r.Context(ctx), key)
		require.ErrorContains(t, err, "not found")
	}
	require.NotEmpty(t, before)
	settled(t, r)
	require.Equal(t, before, print(t, filepath.Join(r.NVM, "s"), filepath.Join(r.HDD, "s"), filepath.Join(r.NVM, "d"), filepath.Join(r.HDD, "p")))
	require.Equal(t, "hello", run(t, r, "busybox:1", "echo", "hello"))
}
