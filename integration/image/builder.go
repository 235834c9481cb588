// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package image

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/klauspost/compress/gzip"
	"golang.org/x/sys/unix"
)

// suite is the Debian release of the images.
const suite = "bookworm"

// Builder makes images from specs and keeps each layer in a directory, from which later builds take it. Several
// processes may use a directory at once. It needs root.
type Builder struct {
	cache string
	// Log, if set, is told of each layer that has to be made.
	Log func(format string, args ...any)
}

// NewBuilder keeps its layers in the directory. "": $NHYBRID_CACHE, else out/cache below the working directory or the
// nearest directory above it that has a go.mod.
func NewBuilder(cache string) (*Builder, error) {
	if cache == "" {
		cache = os.Getenv("NHYBRID_CACHE")
	}
	if cache == "" {
		root, err := moduleRoot()
		if err != nil {
			return nil, err
		}
		cache = filepath.Join(root, "out", "cache")
	}
	cache, err := filepath.Abs(cache)
	if err != nil {
		return nil, err
	}
	if strings.ContainsAny(cache, ":,\\") {
		return nil, fmt.Errorf("image cache %q: the path must be without ':', ',' and '\\', which mean something to overlayfs", cache)
	}
	return &Builder{cache: cache}, os.MkdirAll(cache, 0o755)
}

func moduleRoot() (string, error) {
	wd, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for dir := wd; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil || dir == "/" {
			if dir == "/" {
				return wd, nil
			}
			return dir, nil
		}
	}
}

// Build makes the image, or as much of it as the cache lacks.
func (b *Builder) Build(ctx context.Context, spec Spec) (v1.Image, error) {
	if err := spec.check(); err != nil {
		return nil, err
	}
	var layers []v1.Layer
	var history, below []string
	for i, step := range spec.Steps {
		l, key, err := b.layer(ctx, step, below)
		if err != nil {
			return nil, fmt.Errorf("image %q, step %d (%.60s): %w", spec.Name, i, step.history(), err)
		}
		layers, history, below = append(layers, l), append(history, step.history()), append(below, key)
	}
	return Assemble(spec.Config, layers, history)
}

func (b *Builder) layer(ctx context.Context, step Step, below []string) (v1.Layer, string, error) {
	key, err := step.key(below)
	if err != nil {
		return nil, "", err
	}
	dir := filepath.Join(b.cache, key)
	unlock, err := lock(dir + ".lock")
	if err != nil {
		return nil, "", err
	}
	defer unlock()
	l, err := load(dir)
	if errors.Is(err, os.ErrNotExist) {
		if b.Log != nil {
			b.Log("making layer: %s", step.history())
		}
		if err = b.make(ctx, step, below, dir); err == nil {
			l, err = load(dir)
		}
	}
	return l, key, err
}

// lock waits for other processes that make the same layer.
func lock(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %q: %w", path, err), f.Close())
	}
	return func() { _ = f.Close() }, nil
}

// load takes a finished layer from the cache.
func load(dir string) (v1.Layer, error) {
	j, err := os.ReadFile(filepath.Join(dir, "layer.json"))
	if err != nil {
		return nil, err
	}
	l := &layer{open: func() (io.ReadCloser, error) { return os.Open(filepath.Join(dir, "layer.tar.gz")) }}
	if err := json.Unmarshal(j, &l.Digests); err != nil {
		return nil, fmt.Errorf("read %s/layer.json: %w; remove the directory to make it anew", dir, err)
	}
	return l, nil
}

// make builds a layer beside its place and moves it there when it is whole.
func (b *Builder) make(ctx context.Context, step Step, below []string, dir string) error {
	tmp := dir + ".tmp"
	if err := errors.Join(os.RemoveAll(tmp), os.MkdirAll(filepath.Join(tmp, "tree"), 0o755)); err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	produce, err := b.content(ctx, step, below, tmp)
	if err != nil {
		return err
	}
	f, err := os.Create(filepath.Join(tmp, "layer.tar.gz"))
	if err != nil {
		return err
	}
	buffered := bufio.NewWriterSize(f, 1<<20)
	digests, err := compress(buffered, gzip.DefaultCompression, produce)
	if err = errors.Join(err, buffered.Flush(), f.Close()); err != nil {
		return fmt.Errorf("pack layer: %w", err)
	}
	j, err := json.Marshal(digests)
	if err != nil {
		return err
	}
	err = os.WriteFile(filepath.Join(tmp, "layer.json"), j, 0o644)
	for _, part := range []string{"work", "root", "debs"} {
		err = errors.Join(err, os.RemoveAll(filepath.Join(tmp, part)))
	}
	if err = errors.Join(err, os.RemoveAll(dir)); err != nil {
		return err
	}
	return os.Rename(tmp, dir)
}

// content fills tmp/tree with what later steps are to find of this one, and returns what writes the layer's tar.
func (b *Builder) content(ctx context.Context, step Step, below []string, tmp string) (func(io.Writer) error, error) {
	tree := filepath.Join(tmp, "tree")
	lowers := b.trees(below)
	packTree := func(w io.Writer) error { return writeTree(w, tree, lowers) }
	switch {
	case step.Base != nil:
		return packTree, makeBase(ctx, tree, step.Base)
	case step.Extract != nil:
		return packTree, extract(ctx, filepath.Join(tmp, "debs"), tree, step.Extract)
	case step.Packages != nil:
		debs := filepath.Join(tmp, "debs")
		if err := b.download(ctx, debs, lowers, tmp, step.Packages); err != nil {
			return nil, err
		}
		install := fmt.Sprintf("%s\napt-get -qq -y --no-install-recommends -o APT::Keep-Downloaded-Packages=true install /run/debs/*.deb\n%s\n%s", quiet, step.Then, tidy)
		return packTree, b.chroot(ctx, tmp, lowers, debs, install)
	case step.Run != "":
		return packTree, b.chroot(ctx, tmp, lowers, "", step.Run)
	case step.Synthetic != nil:
		return step.Synthetic.write, nil
	default:
		if err := unpack(ctx, tree, step.Files); err != nil {
			return nil, err
		}
		return func(w io.Writer) error { return writeTar(w, step.Files) }, nil
	}
}

// trees are the directories of the layers below, topmost first, as overlayfs wants them.
func (b *Builder) trees(below []string) []string {
	var dirs []string
	for i := len(below) - 1; i >= 0; i-- {
		dirs = append(dirs, filepath.Join(b.cache, below[i], "tree"))
	}
	return dirs
}

// write makes the tar of the one file. Noise does not compress; zeros compress to a thousandth.
func (s *Synthetic) write(w io.Writer) error {
	data := make([]byte, s.Uncompressed)
	var seed [32]byte
	copy(seed[:], fmt.Sprintf("%x %x %s", s.Compressed, s.Uncompressed, s.Path))
	// What gzip and tar add to a layer of one file is about 160 bytes.
	_, _ = rand.NewChaCha8(seed).Read(data[:min(max(0, s.Compressed-160), s.Uncompressed)]) // never fails
	return writeTar(w, []Entry{file(strings.TrimPrefix(s.Path, "/"), 0o644, data)})
}

func run(ctx context.Context, env []string, program string, args ...string) error {
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = append(append(os.Environ(), "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C"), env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		const tail = 2000
		return fmt.Errorf("%s: %w:\n%s", program, err, out[max(0, len(out)-tail):])
	}
	return nil
}
