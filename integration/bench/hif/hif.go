// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/nhybrid/nhybrid/integration/bench/lab"
	"github.com/nhybrid/nhybrid/integration/bench/result"
	"github.com/nhybrid/nhybrid/integration/hddsim"
	"github.com/nhybrid/nhybrid/integration/hddsim/block"
	"github.com/nhybrid/nhybrid/integration/image"
	"github.com/nhybrid/nhybrid/integration/image/catalog"
	"github.com/nhybrid/nhybrid/integration/rig"
)

// row is one measurement; which of the last fields is set follows from the part.
type row struct {
	Part string `json:"part"`
	Name string `json:"name"`
	// Setting tells rows apart that cannot be compared: other programs, images, devices or repetitions.
	Setting string    `json:"setting"`
	Begun   time.Time `json:"begun"`
	Image   *imageRow `json:"image,omitempty"`
	Saved   *savedRow `json:"saved,omitempty"`
	First   *firstRow `json:"first,omitempty"`
	Crowd   *crowdRow `json:"crowd,omitempty"`
	Costs   *costRow  `json:"costs,omitempty"`
	Curve   *curveRow `json:"curve,omitempty"`
}

func (r row) key() string { return r.Part + " " + r.Name }

// job is what makes a row.
type job struct {
	part, name string
	of         []string // images
	do         func(context.Context, *row) error
}

func (o *options) run(ctx context.Context, progress io.Writer) (err error) {
	b := &bench{options: o, progress: progress, begun: time.Now(), deviceSize: 8 << 30}
	if o.quick {
		b.deviceSize = 1 << 30
	}
	if b.dir, err = lab.Scratch(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, rig.Remove(b.dir)) }()
	b.registryDir = filepath.Join(b.dir, "registry")
	found, err := lab.FindPrograms(o.bin)
	if err != nil {
		return err
	}
	// In memory: a start with empty caches must not wait for the machine's own disk.
	b.bin = filepath.Join(b.dir, "bin")
	if err := block.Mount("bench", b.bin, "tmpfs", 0, "mode=0755"); err != nil {
		return err
	}
	if err := lab.CopyPrograms(found, b.bin); err != nil {
		return err
	}
	if err := b.readCatalog(); err != nil {
		return err
	}
	jobs, err := b.jobs()
	if err != nil {
		return err
	}
	if err := b.build(ctx, jobs); err != nil {
		return err
	}
	if o.check {
		return b.check(ctx, jobs)
	}
	if b.setting, err = b.fingerprint(); err != nil {
		return err
	}
	r := &result.Result{
		Name: "hif", Command: lab.ShellCommand(), Machine: result.ThisMachine(), Targets: targets,
		Settings: map[string]any{
			"hdd": hddsim.HDD(), "device_bytes": b.deviceSize, "second_starts": o.starts, "link_of_first_starts": o.link,
			"setting": b.setting, "quick": o.quick,
		},
	}
	if r.Versions, err = result.Versions(ctx, found, "containerd", "ctr", "containerd-nhybrid-grpc"); err != nil {
		return err
	}
	all, failed := b.work(ctx, jobs)
	if failed != nil {
		r.Notes = append(r.Notes, fmt.Sprintf("%d of %d measurements are in this; the others failed or were not reached", len(all), len(jobs)))
	}
	r.Machine.LoadAfter = result.Load()
	fill(r, all)
	path, err := r.Write(o.out)
	if err = errors.Join(failed, err, b.draw(all)); err != nil {
		return err
	}
	b.say("wrote %s", path)
	return nil
}

func (b *bench) readCatalog() error {
	all, err := catalog.All()
	if err != nil {
		return err
	}
	b.known, b.images = map[string]catalog.Image{}, map[string]v1.Image{}
	for _, img := range all {
		b.known[img.Name] = img
		b.order = append(b.order, img.Name)
	}
	return nil
}

// jobs are the rows that are wanted, in their order.
func (b *bench) jobs() (jobs []job, err error) {
	o := b.options
	choose := func(flag string, wanted []string) []string {
		names, chooseErr := lab.Choose("image for --"+flag, wanted, b.order)
		err = errors.Join(err, chooseErr)
		return names
	}
	if o.does(partImages) || o.check {
		for _, name := range choose("images", o.images) {
			jobs = append(jobs, job{partImages, name, []string{name}, func(ctx context.Context, r *row) (err error) {
				r.Image, err = b.image(ctx, b.known[name])
				return err
			}})
		}
	}
	if o.check {
		return jobs, err
	}
	if o.does(partSaved) {
		for _, name := range choose("images", o.images) {
			jobs = append(jobs, job{partSaved, name, []string{name}, func(ctx context.Context, r *row) (err error) {
				r.Saved, err = b.saved(ctx, b.known[name])
				return err
			}})
		}
	}
	if o.does(partCurve) {
		jobs = append(jobs, job{partCurve, o.curve, choose("curve", []string{o.curve}), func(ctx context.Context, r *row) (err error) {
			r.Curve, err = b.curve(ctx, b.known[o.curve])
			return err
		}})
	}
	if o.does(partCosts) {
		jobs = append(jobs, job{partCosts, "costs", nil, func(ctx context.Context, r *row) (err error) {
			r.Costs, err = b.costs(ctx)
			return err
		}})
	}
	if o.does(partFirst) {
		for _, name := range choose("first", o.first) {
			jobs = append(jobs, job{partFirst, name, []string{name}, func(ctx context.Context, r *row) (err error) {
				r.First, err = b.first(ctx, b.known[name])
				return err
			}})
		}
	}
	if o.does(partCrowds) {
		one := choose("twenty", []string{o.twenty})
		jobs = append(jobs, job{partCrowds, fmt.Sprintf("%d of %s", o.containers, o.twenty), one, func(ctx context.Context, r *row) (err error) {
			r.Crowd, err = b.crowd(ctx, slices.Repeat(one, o.containers))
			return err
		}})
		many := choose("many", o.many)
		jobs = append(jobs, job{partCrowds, fmt.Sprintf("%d different ones", len(many)), many, func(ctx context.Context, r *row) (err error) {
			r.Crowd, err = b.crowd(ctx, many)
			return err
		}})
	}
	return jobs, err
}

// build makes the images of the jobs, or takes them from the cache.
func (b *bench) build(ctx context.Context, jobs []job) error {
	builder, err := image.NewBuilder(b.options.cache)
	if err != nil {
		return err
	}
	builder.Log = b.say
	for _, j := range jobs {
		for _, name := range j.of {
			if b.images[name] != nil {
				continue
			}
			if b.images[name], err = builder.Build(ctx, b.known[name].Spec); err != nil {
				return err
			}
		}
	}
	return nil
}

// fingerprint is equal for rows that may be compared, but for their images.
func (b *bench) fingerprint() (string, error) {
	h := sha256.New()
	for _, p := range []string{"containerd", "containerd-nhybrid-grpc"} {
		f, err := os.Open(filepath.Join(b.bin, p))
		if err != nil {
			return "", err
		}
		_, err = io.Copy(h, f)
		if err = errors.Join(err, f.Close()); err != nil {
			return "", err
		}
	}
	o := b.options
	err := json.NewEncoder(h).Encode([]any{b.deviceSize, hddsim.HDD(), o.starts, o.hddStarts, o.link, o.idle})
	return hex.EncodeToString(h.Sum(nil))[:16], err
}

// settingOf adds the images of a job.
func (b *bench) settingOf(j job) (string, error) {
	parts := []string{b.setting}
	for _, name := range j.of {
		d, err := b.images[name].Digest()
		if err != nil {
			return "", err
		}
		parts = append(parts, d.Hex[:12])
	}
	return strings.Join(parts, "-"), nil
}

// work does what is left of the jobs and returns the rows of all. One that fails does not keep the others from being done.
func (b *bench) work(ctx context.Context, jobs []job) (done []row, err error) {
	log, earlier, err := result.OpenLog[row](filepath.Join(b.options.out, "hif-raw.jsonl"))
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, log.Close()) }()
	have := map[string]row{}
	for _, r := range earlier {
		if !b.options.fresh {
			have[r.key()+" "+r.Setting] = r
		}
	}
	for i, j := range jobs {
		r := row{Part: j.part, Name: j.name, Begun: time.Now().UTC()}
		setting, settingErr := b.settingOf(j)
		if settingErr != nil {
			return done, errors.Join(err, settingErr)
		}
		r.Setting = setting
		if known, ok := have[r.key()+" "+r.Setting]; ok {
			done = append(done, known)
			continue
		}
		if doErr := j.do(ctx, &r); doErr != nil {
			if ctx.Err() != nil {
				return done, errors.Join(err, ctx.Err(), doErr)
			}
			b.say("%d/%d %s FAILED: %v", i+1, len(jobs), r.key(), doErr)
			err = errors.Join(err, fmt.Errorf("%s failed, see above", r.key()))
			continue
		}
		if err := log.Append(r); err != nil {
			return done, err
		}
		b.say("%d/%d %s: %s", i+1, len(jobs), r.key(), r.summary())
		done = append(done, r)
	}
	return done, err
}

// check starts every image with overlayfs on NVM.
func (b *bench) check(ctx context.Context, jobs []job) error {
	failed := 0
	for _, j := range jobs {
		img := b.known[j.name]
		s, err := b.checkOne(ctx, img)
		if ctx.Err() != nil {
			return errors.Join(ctx.Err(), err)
		}
		if err != nil {
			failed++
			b.say("%s: NOT READY: %v", j.name, err)
			continue
		}
		b.say("%s: %s after %.2f s", j.name, img.Sign, s.ReadyS)
	}
	if failed > 0 {
		return fmt.Errorf("%w: %d of %d did not", errNotReady, failed, len(jobs))
	}
	return nil
}

func (b *bench) checkOne(ctx context.Context, img catalog.Image) (_ *start, err error) {
	s, err := b.newStand(ctx, setup{size: b.deviceSize, overlay: true})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	if err := s.push(ctx, ref(img.Name), b.images[img.Name]); err != nil {
		return nil, err
	}
	p := s.places[overlayNVM]
	if err := p.pull(ctx, ref(img.Name)); err != nil {
		return nil, err
	}
	c, err := p.start(ctx, img, "check-"+img.Name, nil)
	if err != nil {
		return nil, err
	}
	return &c.start, c.remove(ctx)
}

// keepLogs stores the daemon's log where the caller wants it.
func (b *bench) keepLogs(s *stand, name string) {
	if b.options.logs == "" || s.places[hybrid].rig == nil {
		return
	}
	path := filepath.Join(b.options.logs, name+".log")
	if err := errors.Join(os.MkdirAll(b.options.logs, 0o755), os.WriteFile(path, []byte(s.places[hybrid].rig.Daemon.Log()), 0o644)); err != nil {
		b.say("cannot keep log: %v", err)
	}
}
