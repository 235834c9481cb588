// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/integration/link"
	"github.com/nhybrid/nhybrid/integration/rig"
	"github.com/nhybrid/nhybrid/snapshotter/control"
)

// story is when a pull had come how far, in seconds since it began.
type story struct {
	DownloadedS float64 `json:"downloaded_s"` // the link let through the last byte
	StoredS     float64 `json:"stored_s"`     // the pull returned: all layers are verified and committed
	DurableS    float64 `json:"durable_s"`    // the daemon said that every byte is on a device
}

// pull pulls the image, waits until it is durable, and learns what happened when.
func (rep *report) pull(ctx context.Context, client control.Client, r *rig.Rig, img v1.Image) error {
	m, err := img.Manifest()
	if err != nil {
		return fmt.Errorf("read manifest of the image: %w", err)
	}
	began := time.Now()
	since := func(t time.Time) float64 { return t.Sub(began).Seconds() }
	looks := watchPacks(ctx, r, m.Layers)
	pullErr := watchPull(ctx, r)
	rep.Pull.StoredS = since(time.Now())
	packs, err := looks(pullErr != nil)
	if err = errors.Join(pullErr, err); err != nil {
		return err
	}
	if err := rep.inspect(ctx, client, r); err != nil {
		return err
	}
	rep.Pull.DurableS = since(time.Now())
	for _, q := range r.Link.Requests() {
		if _, ours := packs[q.Digest]; ours && !q.End.IsZero() {
			rep.Pull.DownloadedS = max(rep.Pull.DownloadedS, since(q.End))
		}
	}
	answer, err := client.Inspect(ctx, &control.InspectRequest{Ref: r.Ref(imageName), Namespace: r.Namespace})
	if err != nil {
		return fmt.Errorf("inspect the image: %w", err)
	}
	for i, l := range answer.GetLayers() {
		rep.Layers[i].Early = packs[l.GetDigest()][l.GetLayer()]
	}
	// The view is made after the last layer was committed.
	err = rig.Await(ctx, func(ctx context.Context) (err error) {
		if rep.AfterPull, err = onNVM(ctx, client, r); err == nil && rep.AfterPull.Views == 0 {
			err = errors.New("the image has no view on NVM yet")
		}
		return err
	})
	return err
}

// watchPacks looks at all packs each time the link has let through the last byte of a layer. The function that it returns
// waits for all of these looks, or gives them up, and returns them by digest of the layer.
func watchPacks(ctx context.Context, r *rig.Rig, layers []v1.Descriptor) func(giveUp bool) (map[string]map[string]int64, error) {
	ctx, cancel := context.WithCancel(ctx)
	var mu sync.Mutex
	var wg sync.WaitGroup
	looks, errs := map[string]map[string]int64{}, []error(nil)
	for _, l := range layers {
		digest := l.Digest.String()
		wg.Go(func() {
			err := r.Link.Await(ctx, link.Done(digest))
			var packs map[string]int64
			if err == nil {
				packs, err = packBytes(filepath.Join(r.HDD, "p"))
			}
			mu.Lock()
			defer mu.Unlock()
			looks[digest], errs = packs, append(errs, err)
		})
	}
	return func(giveUp bool) (map[string]map[string]int64, error) {
		defer cancel()
		if giveUp {
			cancel()
		}
		wg.Wait()
		if giveUp {
			return nil, nil
		}
		return looks, errors.Join(errs...)
	}
}

// packBytes are the bytes that each pack in dir holds, without its holes, by the number of its layer. A pack that is still
// being written has a name of its own.
func packBytes(dir string) (map[string]int64, error) {
	all, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("list packs: %w", err)
	}
	packs := map[string]int64{}
	for _, e := range all {
		number, _, _ := strings.Cut(strings.TrimPrefix(e.Name(), "."), ".")
		var st unix.Stat_t
		err := unix.Lstat(filepath.Join(dir, e.Name()), &st)
		if errors.Is(err, fs.ErrNotExist) { // finished meanwhile
			err = unix.Lstat(filepath.Join(dir, number+".erofs"), &st)
		}
		if err != nil {
			return nil, fmt.Errorf("look at pack %q: %w", e.Name(), err)
		}
		packs[number] = max(packs[number], 512*st.Blocks)
	}
	return packs, nil
}
