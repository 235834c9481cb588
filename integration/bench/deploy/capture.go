// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/nhybrid/nhybrid/integration/bench/lab"
	"github.com/nhybrid/nhybrid/integration/image"
	"github.com/nhybrid/nhybrid/integration/rig"
	"github.com/nhybrid/nhybrid/snapshotter/control"
)

// capture is what an image of one layer of many small files costs: stored, and removed again.
type capture struct {
	Files int `json:"files"`
	// CaptureS is from the last byte of the blob until the layer is durable and its view is made.
	CaptureS float64 `json:"capture_s"`
	// RemoveS is from the command that removes the image, with cold caches, until the bytes are free.
	RemoveS      float64 `json:"remove_s"`
	PackBytes    int64   `json:"pack_bytes"`
	ViewBytes    int64   `json:"view_bytes"`
	PeakRSSBytes int64   `json:"peak_rss_bytes"` // of the daemon
	CPUS         float64 `json:"cpu_s"`          // of the daemon, for the pull
}

// captureLink is the bandwidth over which the layers come.
const captureLink = "1Gbit"

// measureCaptures pulls a layer of each size onto an armed disk, with the default policy, and removes it.
func (b *bench) measureCaptures(ctx context.Context) (all []capture, err error) {
	for _, files := range b.options.captureFiles {
		c, err := b.captureOne(ctx, files)
		if err != nil {
			return nil, fmt.Errorf("a layer of %d files: %w", files, err)
		}
		b.say("%d files: durable %.2f s after the last byte, removed in %.2f s, %.0f bytes of view a file, peak %.0f MB, %.2f s of CPU", c.Files, c.CaptureS, c.RemoveS,
			float64(c.ViewBytes)/float64(c.Files), float64(c.PeakRSSBytes)/1e6, c.CPUS)
		all = append(all, c)
	}
	return all, nil
}

func (b *bench) captureOne(ctx context.Context, files int) (c capture, err error) {
	c.Files = files
	layer, err := image.Layer(manyFiles(files))
	if err != nil {
		return c, err
	}
	img, err := image.Assemble(v1.Config{Cmd: []string{"/none"}}, []v1.Layer{layer}, []string{"many files"})
	if err != nil {
		return c, err
	}
	digest, err := layer.Digest()
	if err != nil {
		return c, err
	}
	s, err := newStand(ctx, filepath.Join(b.dir, "c"), b.sizes)
	if err != nil {
		return c, err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	v, _ := variantByName(hybrid)
	o := b.rigOptions(s, v, must(linkRate(captureLink)))
	o.RegistryDir = "" // goes with the rig
	g, err := rig.Start(ctx, o)
	if err != nil {
		return c, err
	}
	defer func() {
		b.keepLogs(g, key{Round: 1, Image: "files", Link: captureLink, Variant: strconv.Itoa(files)})
		if err != nil && ctx.Err() == nil {
			err = fmt.Errorf("%w\nthe end of the daemon's log:\n%s", err, g.Daemon.LogTail(3000))
		}
		err = errors.Join(err, g.Close())
	}()
	if err := g.Push(ctx, imageName, img); err != nil {
		return c, err
	}
	if err := errors.Join(s.arm(), lab.DropCaches(b.options.dropCaches)); err != nil {
		return c, err
	}
	w, err := newWatcher(g)
	if err != nil {
		return c, err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	before, err := lab.CPUOf(g.Daemon.Pid())
	if err != nil {
		return c, err
	}
	if _, err := g.Ctr(ctx, "images", "pull", "--plain-http", g.Ref(imageName)); err != nil {
		return c, err
	}
	stored, err := w.awaitView(ctx, g)
	if err != nil {
		return c, err
	}
	done := time.Now()
	for _, q := range g.Link.Requests() {
		if q.Digest == digest.String() && !q.End.IsZero() {
			c.CaptureS = done.Sub(q.End).Seconds()
		}
	}
	after, err := lab.CPUOf(g.Daemon.Pid())
	if err != nil {
		return c, err
	}
	c.CPUS = (after - before).Seconds()
	m, err := lab.MemoryOf(g.Daemon.Pid())
	if err != nil {
		return c, err
	}
	c.PackBytes, c.ViewBytes, c.PeakRSSBytes = stored.GetLayers()[0].GetHddBytes(), stored.GetSnapshot().GetViewBytes(), m.Peak
	c.RemoveS, err = b.removal(ctx, g, w, s, stored.GetLayers()[0].GetLayer())
	return c, err
}

// awaitView waits until all layers of the image are durable and its view is there.
func (w *watcher) awaitView(ctx context.Context, g *rig.Rig) (answer *control.InspectResponse, err error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return answer, rig.Await(ctx, func(ctx context.Context) (err error) {
		answer, err = w.client.Inspect(ctx, &control.InspectRequest{Ref: g.Ref(imageName), Namespace: g.Namespace})
		if err != nil {
			return fmt.Errorf("inspect image: %w", err)
		}
		for _, l := range answer.GetLayers() {
			if !l.GetDurable() {
				return fmt.Errorf("layer %d is %s", l.GetIndex(), l.GetState())
			}
		}
		if answer.GetSnapshot().GetViewBytes() == 0 {
			return errors.New("the image has no view")
		}
		return nil
	})
}

// manyFiles has names and a shape like those of a distribution: some 20 files in a directory, four levels deep, one file in
// 40 a symlink. Each has one byte.
func manyFiles(files int) (entries []image.Entry) {
	moment := time.Unix(1_700_000_000, 0)
	add := func(kind byte, name, link string, data []byte) {
		entries = append(entries, image.Entry{Header: tar.Header{Typeflag: kind, Name: name, Linkname: link, Mode: 0o755, ModTime: moment}, Data: data})
	}
	data := []byte("x")
	for i, made := 0, 0; made < files; i++ {
		dir := fmt.Sprintf("usr/share-%02d/package-%d/module-%d", i%37, i%1009, i)
		add(tar.TypeDir, dir+"/", "", nil)
		for j := 0; j < 20 && made < files; j++ {
			name := fmt.Sprintf("%s/file-%02d-%x.conf", dir, j, (i*20+j)*2654435761%0xfffff)
			if j == 19 && i%2 == 0 {
				add(tar.TypeSymlink, name, "../file", nil)
			} else {
				add(tar.TypeReg, name, "", data)
			}
			made++
		}
	}
	return entries
}

func must(rate float64, _ error) float64 { return rate } // of a constant

func captureFigures(all []capture, set func(string, float64)) {
	for _, c := range all {
		at := strconv.Itoa(c.Files)
		switch {
		case c.Files%1_000_000 == 0:
			at = strconv.Itoa(c.Files/1_000_000) + "m"
		case c.Files%1000 == 0:
			at = strconv.Itoa(c.Files/1000) + "k"
		}
		set("capture_"+at+"_s", c.CaptureS)
		set("capture_"+at+"_peak_mb", float64(c.PeakRSSBytes)/1e6)
		set("remove_"+at+"_s", c.RemoveS)
		set("view_bytes_per_file_"+at, float64(c.ViewBytes)/float64(c.Files))
	}
}
