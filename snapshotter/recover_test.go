// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"archive/tar"
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	bolt "go.etcd.io/bbolt"

	"github.com/nhybrid/nhybrid/placement"
)

// oneFile is a layer's tar with one file.
func oneFile(t *testing.T, name, content string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	require.NoError(t, w.WriteHeader(&tar.Header{Name: name, Size: int64(len(content)), Mode: 0o644, Typeflag: tar.TypeReg}))
	_, err := w.Write([]byte(content))
	require.NoError(t, err)
	require.NoError(t, w.Close())
	return b.Bytes()
}

// storeLayer commits a layer with one file, as containerd would after a pull.
func storeLayer(t *testing.T, s *Snapshotter, d *downloads, content string) (name, id string) {
	t.Helper()
	d.arrive(0)
	key, upper := prepareLayer(t, s, d, 0, "")
	require.NoError(t, os.WriteFile(filepath.Join(upper, "file"), []byte(content), 0o644))
	name = commitLayer(t, s, d, 0, key)
	require.NoError(t, s.captured(t.Context(), name))
	ids, err := s.db.chain(t.Context(), name)
	require.NoError(t, err)
	return name, ids[0]
}

// read mounts a view of a layer and reads a file in it.
func read(t *testing.T, s *Snapshotter, name, file string) (string, error) {
	t.Helper()
	ctx := inNamespace(t)
	key := "test/99/view" + strconv.FormatInt(time.Now().UnixNano(), 36)
	mounts, err := s.View(ctx, key, name)
	if err != nil {
		return "", err
	}
	dir := t.TempDir()
	require.NoError(t, mount.All(mounts, dir))
	defer func() {
		require.NoError(t, mount.UnmountAll(dir, 0))
		require.NoError(t, s.Remove(ctx, key))
	}()
	b, err := os.ReadFile(filepath.Join(dir, file))
	return string(b), err
}

func awaitRecord(t *testing.T, s *Snapshotter, id string, ok func(record) bool) {
	t.Helper()
	require.Eventually(t, func() bool {
		r, err := s.db.record(context.Background(), id)
		return err == nil && ok(r)
	}, 10*time.Second, 2*time.Millisecond)
}

func TestRestartKeepsLayers(t *testing.T) {
	dir, d := t.TempDir(), newDownloads(1000)
	s := start(t, dir, func(c *Config) { c.Downloads = d })
	name, id := storeLayer(t, s, d, "hello")
	awaitRecord(t, s, id, func(r record) bool { return r.Durable })
	require.NoError(t, s.Close())
	s = start(t, dir, func(c *Config) { c.Downloads, c.BootID = d, "another boot" })
	got, err := read(t, s, name, "file")
	require.NoError(t, err)
	require.Equal(t, "hello", got)
}

// crashed makes a store whose machine went down before its layer was durable.
func crashed(t *testing.T, d *downloads) (dir, name, id string) {
	t.Helper()
	dir = t.TempDir()
	s := start(t, dir, func(c *Config) { c.Downloads = d })
	name, id = storeLayer(t, s, d, "hello")
	awaitRecord(t, s, id, func(r record) bool { return r.Durable })
	require.NoError(t, s.Close())
	// A daemon that ends in order syncs what is left; this one did not.
	db, err := openDatabase(t.Context(), s.tiers.Root(placement.NVM))
	require.NoError(t, err)
	require.NoError(t, db.updateRecord(t.Context(), id, func(r *record) { r.Durable = false }))
	require.NoError(t, db.ms.Close())
	// What a power cut leaves of a file that was never synced.
	require.NoError(t, os.Truncate(filepath.Join(s.tiers.Data(placement.NVM, id), "file"), 0))
	return dir, name, id
}

func TestCrashRebuildsFromContentStore(t *testing.T) {
	d := newDownloads(1000)
	dir, name, id := crashed(t, d)
	d.blobs[d.chainID(0)] = oneFile(t, "file", "hello")
	s := start(t, dir, func(c *Config) { c.Downloads, c.BootID = d, "after the crash" })
	got, err := read(t, s, name, "file")
	require.NoError(t, err)
	require.Equal(t, "hello", got)
	awaitRecord(t, s, id, func(r record) bool { return r.Durable && r.Damaged == "" && r.Tier == placement.HDD })
}

func TestCrashWithoutBlobIsRefused(t *testing.T) {
	d := newDownloads(1000)
	dir, name, _ := crashed(t, d)
	s := start(t, dir, func(c *Config) { c.Downloads, c.BootID = d, "after the crash" })
	_, err := read(t, s, name, "file")
	require.True(t, errdefs.IsDataLoss(err), err)
	require.ErrorContains(t, err, "pull it again")
	// The damage stays known; the blob may come back.
	require.NoError(t, s.Close())
	d.blobs[d.chainID(0)] = oneFile(t, "file", "hello")
	s = start(t, dir, func(c *Config) { c.Downloads, c.BootID = d, "after the crash" })
	got, err := read(t, s, name, "file")
	require.NoError(t, err)
	require.Equal(t, "hello", got)
}

func TestRebuildRefusesAForeignBlob(t *testing.T) {
	d := newDownloads(1000)
	dir, name, _ := crashed(t, d)
	d.blobs[d.chainID(0)] = []byte("this is no tar")
	s := start(t, dir, func(c *Config) { c.Downloads, c.BootID = d, "after the crash" })
	_, err := read(t, s, name, "file")
	require.True(t, errdefs.IsDataLoss(err), err)
}

func TestLossOfNVM(t *testing.T) {
	for _, home := range []bool{true, false} {
		t.Run(map[bool]string{true: "written back", false: "not written back"}[home], func(t *testing.T) {
			dir, d := t.TempDir(), newDownloads(1000)
			s := start(t, dir, func(c *Config) { c.Downloads, c.WriteBack = d, home })
			name, id := storeLayer(t, s, d, "hello")
			awaitRecord(t, s, id, func(r record) bool { return r.Durable && r.Home == home })
			require.NoError(t, s.Close())
			require.NoError(t, unmountAll(s))
			require.NoError(t, os.RemoveAll(filepath.Join(dir, "nvm")))
			require.NoError(t, mkdirs(filepath.Join(dir, "nvm")))
			require.NoError(t, os.WriteFile(filepath.Join(dir, "nvm", "adopt"), nil, 0o600))
			if !home {
				d.blobs[d.chainID(0)] = oneFile(t, "file", "hello")
			}
			s = start(t, dir, func(c *Config) { c.Downloads = d })
			got, err := read(t, s, name, "file")
			require.NoError(t, err)
			require.Equal(t, "hello", got)
			awaitRecord(t, s, id, func(r record) bool { return r.Tier == placement.HDD })
		})
	}
}

// A container must not go on with nothing in place of what it wrote.
func TestLossOfAContainersDirectory(t *testing.T) {
	dir, d := t.TempDir(), newDownloads(1000)
	s := start(t, dir, func(c *Config) { c.Downloads = d })
	name, _ := storeLayer(t, s, d, "hello")
	ctx, key := inNamespace(t), "test/98/container"
	mounts, err := s.Prepare(ctx, key, name)
	require.NoError(t, err)
	var upper string
	for _, o := range mounts[0].Options {
		if dir, ok := strings.CutPrefix(o, "upperdir="); ok {
			upper = dir
		}
	}
	require.DirExists(t, upper)
	require.NoError(t, s.Close())
	require.NoError(t, unmountAll(s))
	require.NoError(t, os.RemoveAll(filepath.Dir(upper)))
	s = start(t, dir, func(c *Config) { c.Downloads = d })
	_, err = s.Mounts(ctx, key)
	require.True(t, errdefs.IsDataLoss(err), err)
	require.ErrorContains(t, err, "remove the container and make it anew")
	require.NoError(t, s.Remove(ctx, key))
	_, err = s.Prepare(ctx, key, name)
	require.NoError(t, err)
}

func TestNewerDatabaseIsRefusedUntouched(t *testing.T) {
	dir := t.TempDir()
	s := start(t, dir, nil)
	require.NoError(t, s.Close())
	db, err := bolt.Open(s.db.path, 0o600, nil)
	require.NoError(t, err)
	require.NoError(t, db.Update(func(tx *bolt.Tx) error { return tx.Bucket(bucketOwn).Put(keySchema, []byte("99")) }))
	require.NoError(t, db.Close())
	before, err := os.ReadFile(s.db.path)
	require.NoError(t, err)
	_, err = New(t.Context(), s.config)
	require.True(t, errdefs.IsFailedPrecondition(err), err)
	require.ErrorContains(t, err, "schema version 99")
	after, err := os.ReadFile(s.db.path)
	require.NoError(t, err)
	require.True(t, bytes.Equal(before, after), "the database was touched")
}

func TestSecondDaemonIsRefused(t *testing.T) {
	s := start(t, t.TempDir(), nil)
	_, err := New(t.Context(), s.config)
	require.True(t, errdefs.IsFailedPrecondition(err), err)
	require.ErrorContains(t, err, "second daemon")
}

func TestInterruptedCommitIsTakenBack(t *testing.T) {
	dir := t.TempDir()
	s := start(t, dir, nil)
	ctx := inNamespace(t)
	mounts, err := s.Prepare(ctx, "test/1/c", "")
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(mounts[0].Source, "f"), []byte("x"), 0o644))
	_, err = s.tiers.Commit("1") // the rename happened, the transaction did not
	require.NoError(t, err)
	require.NoError(t, s.Close())
	s = start(t, dir, nil)
	mounts, err = s.Mounts(ctx, "test/1/c")
	require.NoError(t, err)
	require.FileExists(t, filepath.Join(mounts[0].Source, "f"))
}

func TestSweepTakesOnlyWhatIsOurs(t *testing.T) {
	dir := t.TempDir()
	s := start(t, dir, nil)
	require.NoError(t, s.Close())
	orphan := filepath.Join(s.tiers.DataRoot(placement.HDD), "12345")
	foreign := filepath.Join(s.tiers.DataRoot(placement.HDD), "lost+found")
	planted := filepath.Join(s.tiers.DataRoot(placement.NVM), "777")
	outside := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(outside, "precious"), nil, 0o644))
	require.NoError(t, mkdirs(filepath.Join(orphan, "x"), foreign))
	require.NoError(t, os.Symlink(outside, planted))
	start(t, dir, nil)
	require.Eventually(t, func() bool {
		_, e1 := os.Lstat(orphan)
		_, e2 := os.Lstat(planted)
		return os.IsNotExist(e1) && os.IsNotExist(e2)
	}, 10*time.Second, time.Millisecond)
	require.DirExists(t, foreign)
	require.FileExists(t, filepath.Join(outside, "precious"))
}

func TestTruncatedTreeIsBuiltAgain(t *testing.T) {
	dir, d := t.TempDir(), newDownloads(1000)
	s := start(t, dir, func(c *Config) { c.Downloads = d })
	name, id := storeLayer(t, s, d, "hello")
	_, err := read(t, s, name, "file")
	require.NoError(t, err)
	require.NoError(t, s.Close())
	require.NoError(t, unmountAll(s))
	image := s.treeImages(id)[0]
	require.NoError(t, os.Truncate(image, 100))
	s = start(t, dir, func(c *Config) { c.Downloads = d })
	got, err := read(t, s, name, "file")
	require.NoError(t, err)
	require.Equal(t, "hello", got)
}

// The filesystem of a data root must not follow a symlink that somebody put
// in the place of a file (fs/overlayfs/namei.c, LOOKUP_NO_SYMLINKS).
func TestPlantedSymlinkIsNotFollowed(t *testing.T) {
	dir, d := t.TempDir(), newDownloads(1000)
	s := start(t, dir, func(c *Config) { c.Downloads = d })
	name, id := storeLayer(t, s, d, "hello")
	secret := filepath.Join(t.TempDir(), "secret")
	require.NoError(t, os.WriteFile(secret, []byte("other"), 0o600))
	file := filepath.Join(s.tiers.Data(placement.NVM, id), "file")
	require.NoError(t, os.Remove(file))
	require.NoError(t, os.Symlink(secret, file))
	got, err := read(t, s, name, "file")
	require.Error(t, err, "read %q", got)
}

func TestNonsenseLabels(t *testing.T) {
	s := start(t, t.TempDir(), nil)
	for label, value := range map[string]string{
		LabelUpperTier: "floppy", labelMaxSize: "-3",
		"containerd.io/snapshot/uidmapping": "0:100000:65536",
	} {
		_, err := s.Prepare(inNamespace(t), "test/1/c", "", withLabel(label, value))
		require.True(t, errdefs.IsInvalidArgument(err), err)
		require.ErrorContains(t, err, label)
	}
	_, err := s.Prepare(inNamespace(t), "test/1/c", "", withLabel(LabelUpperTier, "hdd"))
	require.NoError(t, err)
	on, err := s.tiers.StagedOn("1")
	require.NoError(t, err)
	require.Equal(t, placement.HDD, on)
}

func TestStoreWithoutDatabaseIsRefused(t *testing.T) {
	dir, d := t.TempDir(), newDownloads(1000)
	s := start(t, dir, func(c *Config) { c.Downloads = d })
	_, id := storeLayer(t, s, d, "hello")
	require.NoError(t, s.Close())
	require.NoError(t, os.Remove(s.db.path))
	require.NoError(t, os.Remove(s.path(databaseFile)))
	_, err := New(t.Context(), s.config)
	require.True(t, errdefs.IsFailedPrecondition(err), err)
	require.ErrorContains(t, err, "no database")
	require.FileExists(t, filepath.Join(s.tiers.Data(placement.NVM, id), "file"), "a layer was taken for garbage")
}

// Who needs a layer that cannot be repaired must hear so, also when the repair
// was begun in the background.
func TestJoinedRepairTellsItsError(t *testing.T) {
	d := newDownloads(1000)
	dir, name, id := crashed(t, d)
	s := start(t, dir, func(c *Config) { c.Downloads, c.BootID = d, "after the crash" })
	for range 50 {
		s.repairLater(id, name)
		_, err := read(t, s, name, "file")
		require.True(t, errdefs.IsDataLoss(err), err)
	}
	r, err := s.db.record(t.Context(), id)
	require.NoError(t, err)
	require.False(t, r.Captured)
	require.False(t, r.Durable)
}

// What a device could not write is never served: it is rebuilt, or refused.
func TestErrorOfADeviceCondemns(t *testing.T) {
	d := newDownloads(1000)
	s := start(t, t.TempDir(), func(c *Config) { c.Downloads = d })
	name, id := storeLayer(t, s, d, "hello")
	awaitRecord(t, s, id, func(r record) bool { return r.Durable })
	s.condemn(t.Context(), placement.HDD, "no")
	r, err := s.db.record(t.Context(), id)
	require.NoError(t, err)
	require.Empty(t, r.Damaged, "a durable layer has nothing to lose")

	require.NoError(t, s.db.updateRecord(t.Context(), id, func(r *record) { r.Durable = false }))
	d.blobs[d.chainID(0)] = oneFile(t, "file", "hello")
	require.NoError(t, os.Truncate(filepath.Join(s.tiers.Data(placement.NVM, id), "file"), 0))
	s.condemn(t.Context(), placement.HDD, "the disk is bad")
	got, err := read(t, s, name, "file")
	require.NoError(t, err)
	require.Equal(t, "hello", got)
	awaitRecord(t, s, id, func(r record) bool { return r.Durable && r.Damaged == "" && r.Repairs == 1 })
}

// A machine that goes down in order loses nothing, however young.
func TestCloseMakesDurable(t *testing.T) {
	dir, d := t.TempDir(), newDownloads(1000)
	s := start(t, dir, func(c *Config) { c.Downloads = d })
	d.arrive(0)
	key, upper := prepareLayer(t, s, d, 0, "")
	require.NoError(t, os.WriteFile(filepath.Join(upper, "file"), []byte("hello"), 0o644))
	name := commitLayer(t, s, d, 0, key)
	require.NoError(t, s.Close())
	s = start(t, dir, func(c *Config) { c.Downloads, c.BootID = d, "another boot" })
	got, err := read(t, s, name, "file")
	require.NoError(t, err)
	require.Equal(t, "hello", got)
}

// The copy of the database may be older than the store: what it does not know
// is no garbage, at no later start either.
func TestRestoredDatabaseSparesTheUnknown(t *testing.T) {
	dir, d := t.TempDir(), newDownloads(1000)
	s := start(t, dir, func(c *Config) { c.Downloads = d })
	storeLayer(t, s, d, "hello")
	require.NoError(t, s.Close())
	require.NoError(t, os.Remove(s.db.path))
	newer := filepath.Join(s.tiers.DataRoot(placement.HDD), "4242")
	require.NoError(t, mkdirs(newer))
	for range 2 {
		s = start(t, dir, func(c *Config) { c.Downloads = d })
		require.NoError(t, s.Close())
		require.DirExists(t, newer)
	}
	require.NoError(t, os.Remove(s.restoredMark()))
	start(t, dir, func(c *Config) { c.Downloads = d })
	require.Eventually(t, func() bool {
		_, err := os.Lstat(newer)
		return os.IsNotExist(err)
	}, awaitFor, awaitEvery)
}

// An image that was being looked at when the daemon was killed stays mounted; the
// next one takes it down.
func TestKilledWhileLookingAtAnImage(t *testing.T) {
	requireRoot(t)
	dir, d := t.TempDir(), newDownloads(1000)
	s := start(t, dir, func(c *Config) { c.Downloads = d })
	name, id := storeLayer(t, s, d, "hello")
	awaitRecord(t, s, id, func(r record) bool { return r.Durable })
	lower, err := s.tree(t.Context(), name, id)
	require.NoError(t, err)
	look := s.state(lookPrefix + "1")
	require.NoError(t, os.Mkdir(look, 0o700))
	require.NoError(t, (&mount.Mount{Type: "overlay", Source: "overlay", Options: append([]string{"ro"}, s.lowerOptions(lower, "")...)}).Mount(look))
	t.Cleanup(func() { _ = mount.UnmountAll(look, 0) })
	require.NoError(t, s.Close())
	start(t, dir, func(c *Config) { c.Downloads = d })
	require.NoDirExists(t, look)
}
