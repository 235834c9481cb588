//go:build integration

// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/integration/bench/result"
	"github.com/nhybrid/nhybrid/integration/hddsim"
	"github.com/nhybrid/nhybrid/integration/image"
	"github.com/nhybrid/nhybrid/integration/rig"
)

// faultImages have a layer in common and files of many sizes, hard links, whiteouts, devices and xattrs.
var faultImages = []string{"a:1", "b:1", "c:1"}

func pushFaultImage(t *testing.T, r *rig.Rig, name string) (digests []string) {
	t.Helper()
	var sizes []image.Entry
	random := rand.New(rand.NewPCG(1, uint64(name[0])))
	for i := range 100 {
		data := make([]byte, random.IntN(1<<(4+i%16)))
		for j := range data {
			data[j] = byte(random.Uint32())
		}
		sizes = append(sizes, plain(fmt.Sprintf("sizes/d%d/f%d", i%7, i), data))
	}
	base, err := image.Tiny(image.TinySpec{Seed: 1, Nasty: true, Layers: []int64{300_000}, Files: 30})
	require.NoError(t, err)
	above, err := image.Tiny(image.TinySpec{Seed: uint64(name[0]), Nasty: true, Layers: []int64{1000, 400_000, 100_000}, Files: 40})
	require.NoError(t, err)
	layers, err := base.Layers()
	require.NoError(t, err)
	more, err := above.Layers()
	require.NoError(t, err)
	layers = append(append(layers, ofFiles(t, sizes...)), more[1:]...)
	img, err := r.PushBusybox(t.Context(), name, layers...)
	require.NoError(t, err)
	return blobs(t, img)
}

// asBuilt are the trees of the images as containerd's own applier unpacks them on overlayfs.
func asBuilt(t *testing.T) map[string]map[string]file {
	t.Helper()
	trees := map[string]map[string]file{}
	t.Run("as built", func(t *testing.T) {
		r := rig.New(t, rig.Options{NoDaemon: true})
		for _, name := range faultImages {
			pushFaultImage(t, r, name)
			require.NoError(t, r.Pull(soon(t), name))
			trees[name] = look(t, mounted(t, r, "overlayfs", name))
		}
	})
	return trees
}

// faultVariants are what a campaign goes through in turn.
var faultVariants = []struct {
	policy   string
	unpacks  int
	noDiffer bool
}{{"drain", 1, false}, {"lass", 3, false}, {"nvm", 1, false}, {"boundary=3", 3, false}, {"lass", 1, true}}

// calm has starts not traced, behind which the daemon's work waits for seconds. Looking at an image counts as one.
var calm = []string{"--set", "hot.migrate=false", "--set", "hot.trace=false"}

// perRig is how many cycles a rig is used for.
const perRig = 10

// tally counts what a campaign has seen.
type tally struct {
	Cycles   int `json:"cycles"`
	Reported int `json:"reported"` // pulls that had been reported as done when the blow fell, or in spite of it
	Losses   int `json:"losses"`   // images that were reported and not whole, nor rebuilt
	Broken   int `json:"broken"`   // cycles that failed otherwise: pulls that failed again, things left behind
	// Moments tells by kind how the moments of the blows were found.
	Moments map[string]int `json:"moments"`
}

// campaign strikes one rig again and again.
type campaign struct {
	r      *rig.Rig
	disks  [2]*hddsim.Disk // HDD and NVM
	power  bool            // it is the power that fails, not the daemon
	trees  map[string]map[string]file
	blobs  map[string][]string // digests of the layers of each image
	random *rand.Rand
	tally  *tally
	pulled map[string]bool

	// How much an undisturbed pull has of what moments are counted in.
	lines    int
	requests [2]int64 // of each disk
}

// TestFaults kills the daemon and cuts the power of both disks at random moments of pulls. NHYBRID_KILL_CYCLES and
// NHYBRID_POWER_CUTS make it longer, NHYBRID_SEED repeats it, and NHYBRID_FAULTS_OUT is the directory that gets faults.json.
func TestFaults(t *testing.T) {
	t.Parallel()
	kills := setting(t, "NHYBRID_KILL_CYCLES", 5, strconv.Atoi)
	cuts := setting(t, "NHYBRID_POWER_CUTS", 4, strconv.Atoi)
	seed := setting(t, "NHYBRID_SEED", rand.Uint64(), func(s string) (uint64, error) { return strconv.ParseUint(s, 10, 64) })
	fmt.Printf("faults: NHYBRID_SEED=%d\n", seed)
	res := &result.Result{
		Name: "faults", Command: fmt.Sprintf("NHYBRID_SEED=%d make test-faults CYCLES=%d CUTS=%d", seed, kills, cuts),
		Machine: result.ThisMachine(), Settings: map[string]any{"seed": seed},
	}
	var err error
	res.Versions, err = result.Versions(t.Context(), filepath.Dir(program(t, "ctr")), "containerd", "containerd-nhybrid-grpc")
	require.NoError(t, err)
	trees := asBuilt(t)
	killed, cut := tally{Moments: map[string]int{}}, tally{Moments: map[string]int{}}
	for _, what := range []struct {
		name  string
		n     int
		tally *tally
		power bool
	}{{"kills", kills, &killed, false}, {"power cuts", cuts, &cut, true}} {
		t.Run(what.name, func(t *testing.T) {
			per := min(perRig, (what.n+1)/2) // at least two variants
			for first, turn := 0, 0; first < what.n; first, turn = first+per, turn+1 {
				t.Run(fmt.Sprintf("from %d", first), func(t *testing.T) {
					c := &campaign{
						trees: trees, random: rand.New(rand.NewPCG(seed, uint64(first))), tally: what.tally, power: what.power,
						blobs: map[string][]string{}, pulled: map[string]bool{},
					}
					c.start(t, turn)
					for n := first; n < min(first+per, what.n) && !t.Failed(); n++ {
						c.cycle(t, n)
					}
					if !t.Failed() {
						c.end(t)
					}
				})
			}
		})
		fmt.Printf("faults: %s: %+v\n", what.name, *what.tally)
	}
	if dir := os.Getenv("NHYBRID_FAULTS_OUT"); dir != "" {
		report(t, res, killed, cut, dir)
	}
}

func report(t *testing.T, res *result.Result, killed, cut tally, dir string) {
	t.Helper()
	res.Runs = map[string]tally{"kills": killed, "power_cuts": cut}
	for name, of := range map[string]tally{"kill": killed, "power": cut} {
		res.Set(name+"_losses", float64(of.Losses))
		res.Set(name+"_broken", float64(of.Broken))
		res.Set(name+"_reported", float64(of.Reported))
		res.Targets = append(res.Targets, result.Target{Figure: name + "_losses", What: "images that were reported as pulled and lost"},
			result.Target{Figure: name + "_broken", What: "cycles after which something was left behind or went wrong"})
	}
	res.Set("kill_cycles", float64(killed.Cycles))
	res.Set("power_cuts", float64(cut.Cycles))
	res.Machine.LoadAfter = result.Load()
	path, err := res.Write(dir)
	require.NoError(t, err)
	fmt.Printf("faults: wrote %s\n", path)
}

// start starts a rig and pulls one image undisturbed, to learn how much there is to choose a moment from.
func (c *campaign) start(t *testing.T, turn int) {
	t.Helper()
	v := faultVariants[turn%len(faultVariants)]
	o := rig.Options{
		ConcurrentUnpacks: v.unpacks, NoDiffer: v.noDiffer, Rate: 30e6,
		DaemonArgs: append([]string{"--set", "placement.policy=" + v.policy}, calm...),
	}
	for i, name := range []string{"hdd", "nvm"} {
		disk, err := hddsim.Start(soon(t), hddsim.Options{
			Dir: filepath.Join(t.TempDir(), name), Size: 192 << 20, Model: &hddsim.Model{}, Volatile: c.power,
		})
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, disk.Close()) })
		c.disks[i] = disk
	}
	o.HDD, o.NVM = filepath.Join(c.disks[0].Mountpoint(), "nhybrid"), filepath.Join(c.disks[1].Mountpoint(), "nhybrid")
	c.r = newRig(t, o)
	for _, name := range faultImages {
		c.blobs[name] = pushFaultImage(t, c.r, name)
	}
	before := c.counts(t)
	require.NoError(t, c.r.Pull(soon(t), faultImages[0]))
	c.pulled[faultImages[0]] = true
	inOrder(t, c.r)
	c.whole(t, faultImages[0])
	c.lines = c.logLines()
	for i, n := range c.counts(t) {
		c.requests[i] = n - before[i]
	}
}

// counts are how many writes and flushes each disk has had.
func (c *campaign) counts(t *testing.T) (all [2]int64) {
	t.Helper()
	for i, d := range c.disks {
		n, err := d.Counters()
		require.NoError(t, err)
		all[i] = n.Writes + n.Flushes
	}
	return all
}

func (c *campaign) logLines() int { return strings.Count(c.r.Daemon.Log(), "\n") }

// moment is when a blow falls.
type moment struct {
	kind    string
	reached func() bool
	disk    int // of which requests are held from then on, where it is a request
}

// choose picks a moment of a pull of the image that is about to begin: a line of the daemon's log, a byte of a blob, a request
// of a disk.
func (c *campaign) choose(t *testing.T, name string) (m moment, what string) {
	t.Helper()
	kind := c.random.IntN(10)
	if c.power || kind < 5 {
		m.disk = c.random.IntN(2)
		n := c.random.Int64N(1 + c.requests[m.disk]*6/10) // images share a layer, so that most pulls need less
		disk := c.disks[m.disk]
		before, err := disk.Counters()
		require.NoError(t, err)
		require.NoError(t, disk.SetFault(hddsim.Fault{Ops: hddsim.Writes + hddsim.Flushes, Skip: n, Hold: true}))
		m.kind = "request of " + []string{"the HDD", "NVM"}[m.disk]
		m.reached = func() bool {
			now, err := disk.Counters()
			return err != nil || now.Struck > before.Struck
		}
		return m, fmt.Sprintf("request %d of disk %d", n, m.disk)
	}
	if kind < 8 {
		layers := c.blobs[name]
		digest := layers[c.random.IntN(len(layers))]
		st, err := os.Stat(filepath.Join(c.r.Dir, "registry", strings.Replace(digest, ":", "/", 1)))
		require.NoError(t, err)
		size := c.random.Int64N(st.Size())
		first := len(c.r.Link.Requests())
		m.kind = "byte of a blob"
		m.reached = func() bool {
			for _, q := range c.r.Link.Requests()[first:] {
				if q.Digest == digest && q.Bytes >= size && q.Status != 0 {
					return true
				}
			}
			return false
		}
		return m, fmt.Sprintf("byte %d of blob %s", size, digest)
	}
	n := c.random.IntN(c.lines)
	from := c.logLines()
	m.kind = "line of the log"
	m.reached = func() bool { return c.logLines()-from > n }
	return m, fmt.Sprintf("line %d of the daemon's log", n)
}

// until returns when the moment has come, or when what it is a moment of has ended and nothing follows from it any more.
func (c *campaign) until(t *testing.T, m moment, ended <-chan struct{}) (struck bool) {
	t.Helper()
	for ctx := soon(t); ; {
		if m.reached() {
			return true
		}
		select {
		case <-ended:
			ask, cancel := context.WithTimeout(ctx, 2*time.Second) // the daemon may wait for a disk that waits
			err := busyWith(ask, c.r)
			cancel()
			if err == nil {
				return m.reached()
			}
		default:
		}
		require.NoError(t, ctx.Err())
		time.Sleep(time.Millisecond) // between two looks; what happens meanwhile makes the moment no less random
	}
}

// cycle pulls an image, strikes, and looks at what is left.
func (c *campaign) cycle(t *testing.T, n int) {
	losing := false
	ok := t.Run(fmt.Sprint(n), func(t *testing.T) {
		ctx := soon(t)
		c.tally.Cycles++
		name := faultImages[c.random.IntN(len(faultImages))]
		if c.pulled[name] {
			removeImage(t, c.r, name)
			delete(c.pulled, name)
			if c.random.IntN(2) == 0 { // else what is removed goes while the next pull runs
				inOrder(t, c.r)
			}
		}
		m, what := c.choose(t, name)
		ended := make(chan struct{})
		var err error
		go func() {
			defer close(ended)
			err = c.r.Pull(ctx, name)
		}()
		struck := c.until(t, m, ended)
		if c.power {
			c.cut(t, m.disk)
		} else {
			c.kill(t)
		}
		require.NoError(t, c.r.Daemon.Start(ctx))
		if !struck {
			m.kind = "after it was over"
		}
		c.tally.Moments[m.kind]++
		<-ended
		t.Logf("%s: %s (struck: %v): %v", name, what, struck, err)
		await(t, reachable(c.r))
		if err == nil {
			c.tally.Reported++
			c.pulled[name] = true
		}
		losing = true // what is not whole from here on is lost
		for _, other := range faultImages {
			if c.pulled[other] {
				c.whole(t, other)
			}
		}
		losing = false
		if err != nil {
			if c.random.IntN(2) == 0 {
				forgetLeases(t, c.r)
			}
			require.NoError(t, c.r.Pull(ctx, name))
			c.pulled[name] = true
			c.whole(t, name)
		}
		inOrder(t, c.r)
	})
	switch {
	case ok:
	case losing:
		c.tally.Losses++
	default:
		c.tally.Broken++
	}
}

// cut ends the power of both disks, with a random share of what they had not been asked to keep, and has the machine boot again.
// The disk whose requests wait is only a slow one to the other.
func (c *campaign) cut(t *testing.T, waits int) {
	t.Helper()
	order := []*hddsim.Disk{c.disks[1-waits], c.disks[waits]}
	for _, d := range order {
		share := []float64{0, 1, c.random.Float64(), c.random.Float64()}[c.random.IntN(4)]
		require.NoError(t, d.Persist(hddsim.Keep{Share: share, Seed: c.random.Uint64()}))
		require.NoError(t, unix.Kill(d.Pid(), unix.SIGUSR1))
	}
	require.NoError(t, c.r.Daemon.Kill())
	reboot(t, c.r)
	var err error
	for _, d := range order {
		err = errors.Join(err, d.PowerCut(), d.PowerOn(soon(t)))
	}
	require.NoError(t, err)
	newBoot(t, c.r)
}

// kill ends the daemon by SIGKILL. What it has asked of a disk whose requests wait is done, but it does not get to know.
func (c *campaign) kill(t *testing.T) {
	t.Helper()
	require.NoError(t, unix.Kill(c.r.Daemon.Pid(), unix.SIGKILL))
	for _, d := range c.disks {
		require.NoError(t, d.SetFault(hddsim.Fault{}))
	}
	require.NoError(t, c.r.Daemon.Kill()) // waits
}

// whole asserts that an image is what was built: every file, byte and attribute.
func (c *campaign) whole(t *testing.T, name string) {
	t.Helper()
	t.Run("tree of "+name, func(t *testing.T) { // unmounts when it ends
		same(t, c.trees[name], look(t, mounted(t, c.r, "nhybrid", name)))
	})
	if t.Failed() {
		t.FailNow()
	}
}

// forgetLeases gives up what pulls that failed have kept for the next try.
func forgetLeases(t *testing.T, r *rig.Rig) {
	t.Helper()
	client, err := r.Client()
	require.NoError(t, err)
	ctx := r.Context(soon(t))
	leases, err := client.LeasesService().List(ctx)
	require.NoError(t, err)
	for _, l := range leases {
		if err := client.LeasesService().Delete(ctx, l); !errdefs.IsNotFound(err) { // it may have ended by itself
			require.NoError(t, err)
		}
	}
}

// end removes everything, after which nothing may be left.
func (c *campaign) end(t *testing.T) {
	t.Helper()
	if !t.Run("nothing is left", func(t *testing.T) {
		for name := range c.pulled {
			removeImage(t, c.r, name)
		}
		collect(t, c.r, faultImages[0])
		inOrder(t, c.r)
	}) {
		c.tally.Broken++
	}
}
