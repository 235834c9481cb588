// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// ErrRestarted says that containerd has begun to download a blob anew, so that
// what was read of it so far is void. The caller begins anew too.
var ErrRestarted = errors.New("download of the blob has begun anew")

const (
	// The file system says when something changes. The polls are for events that
	// got lost, and for hosts whose limit of inotify instances is reached.
	pollWithEvents = 500 * time.Millisecond
	pollAlone      = 20 * time.Millisecond
	pollBeyond     = 100 * time.Millisecond // of those beyond mostInstances
)

// OpenGrowing opens the blob of that digest and size below root, the directory
// of containerd's local content store, and reads it while it grows: first the
// file that containerd downloads into, in whichever namespace, then the blob.
// The blob need not be there yet.
//
// A read waits for bytes until they arrive, ctx ends or the reader is closed,
// which another goroutine may do. It returns io.EOF after size bytes, and an
// error that is [ErrRestarted] if the download shrinks, is replaced or grows
// beyond size. The bytes are not verified.
//
// While it waits for bytes it is within idle, if that is not nil: idle calls what it is given, once, and returns its error
// or one of its own, which ends the read. Its context ends with ctx or when the reader is closed.
//
// The error of OpenGrowing is errdefs.ErrUnavailable if root is not a content
// store that this process can read; [FromProvider] is the way then.
func OpenGrowing(ctx context.Context, root string, dgst digest.Digest, size int64, idle func(ctx context.Context, wait func() error) error) (io.ReadCloser, error) {
	if err := dgst.Validate(); err != nil {
		return nil, fmt.Errorf("open blob %q: %w: %w", dgst, err, errdefs.ErrInvalidArgument)
	}
	if size < 0 {
		return nil, fmt.Errorf("open blob %q: its size is %d: %w", dgst, size, errdefs.ErrInvalidArgument)
	}
	if idle == nil {
		idle = func(_ context.Context, wait func() error) error { return wait() }
	}
	g := &growing{
		dgst: dgst, size: size, idle: idle,
		ingests: filepath.Join(root, "ingest"),
		blob:    filepath.Join(root, "blobs", dgst.Algorithm().String(), dgst.Encoded()),
	}
	if root == "" {
		return nil, fmt.Errorf("open blob %q: content root is not known: %w", dgst, errdefs.ErrUnavailable)
	}
	// The root of a store that has had no download yet is empty.
	if _, err := os.ReadDir(root); err != nil {
		return nil, fmt.Errorf("open blob %q: %w: %w", dgst, err, errdefs.ErrUnavailable)
	}
	g.ctx, g.cancel = context.WithCancel(ctx)
	g.changes = watch(g.ctx)
	g.changes.add(root)
	return g, nil
}

type growing struct {
	ctx           context.Context
	cancel        context.CancelFunc
	dgst          digest.Digest
	size          int64
	idle          func(context.Context, func() error) error
	ingests, blob string
	changes       *changes

	mu     sync.Mutex // a Read, and Close
	file   *os.File
	ingest bool // file was opened as that of an ingest
	off    int64
	given  int64 // the disk has been given what is before
}

func (g *growing) Read(p []byte) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	n, err := g.read(p)
	if err != nil && err != io.EOF { //nolint:errorlint // read returns the value itself
		err = fmt.Errorf("blob %q: %w", g.dgst, err)
	}
	return n, err
}

func (g *growing) read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for {
		if err := g.ctx.Err(); err != nil {
			return 0, err
		}
		// The events before this look are covered by it.
		g.changes.clear()
		if g.file == nil {
			f, ingest, err := g.find()
			if err != nil {
				return 0, err
			}
			if f != nil {
				g.use(f, ingest)
			}
		}
		if g.file != nil {
			before := g.file
			n, err := g.readFile(p)
			if n > 0 || err != nil {
				return n, err
			}
			if g.file != before {
				continue
			}
		}
		if err := g.idle(g.ctx, g.changes.wait); err != nil {
			return 0, err
		}
	}
}

// readFile reads what is there. It returns no bytes and no error if there is
// nothing more yet, or another file is open now.
func (g *growing) readFile(p []byte) (int, error) {
	info, err := g.file.Stat()
	if err != nil {
		return 0, err
	}
	have := info.Size()
	switch {
	case !g.ingest && have != g.size:
		return 0, fmt.Errorf("%d bytes are in the content store and %d are wanted: %w", have, g.size, errdefs.ErrFailedPrecondition)
	case have < g.off:
		return 0, fmt.Errorf("%d bytes were read and %d are there: %w", g.off, have, ErrRestarted)
	case have > g.size:
		return 0, fmt.Errorf("%d bytes are there and %d are wanted: %w", have, g.size, ErrRestarted)
	case g.off == g.size:
		return 0, io.EOF
	case have == g.off:
		return 0, g.stalled(info)
	}
	n, err := g.file.ReadAt(p[:min(int64(len(p)), have-g.off)], g.off)
	g.off += int64(n)
	g.giveToDisk()
	if errors.Is(err, io.EOF) {
		err = nil // it shrank meanwhile: the next look finds that
	}
	return n, err
}

// giveBytes is how much of a download is given to the disk at a time.
const giveBytes = 4 << 20

// giveToDisk has the kernel begin to write what containerd has downloaded. containerd syncs each blob once all of it is
// there, and the pull's end waits for the last one. It is a hint, which takes no error away from containerd's descriptor.
func (g *growing) giveToDisk() {
	if g.ingest && g.off-g.given >= giveBytes {
		_ = unix.SyncFileRange(int(g.file.Fd()), g.given, g.off-g.given, unix.SYNC_FILE_RANGE_WRITE)
		g.given = g.off
	}
}

// stalled looks for another file that has more when the open one, an ingest, has
// nothing to read: the ingest may be gone or left over from a pull that broke
// off, and the blob or the ingest of another namespace may go on. Their bytes
// are the same if all are right, and the digest tells if not.
func (g *growing) stalled(info fs.FileInfo) error {
	f, ingest, err := g.find()
	if err != nil {
		return err
	}
	if f != nil {
		if more, err := f.Stat(); err == nil && (more.Size() > g.off || !ingest) {
			g.file.Close()
			g.use(f, ingest)
			return nil
		}
		f.Close()
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Nlink == 0 {
		return fmt.Errorf("its file was removed: %w", ErrRestarted)
	}
	return nil
}

func (g *growing) use(f *os.File, ingest bool) {
	g.file, g.ingest = f, ingest
	if ingest {
		g.changes.add(f.Name())
	}
}

// find opens the blob, or the ingest that has most of it. The file is nil if
// there is neither.
func (g *growing) find() (f *os.File, ingest bool, err error) {
	// The ingest first: an ingest that is committed meanwhile is found as a blob
	// then, the other way round it would be nowhere.
	if f, err = g.openIngest(); err != nil {
		return nil, false, err
	}
	blob, err := os.Open(g.blob)
	if errors.Is(err, fs.ErrNotExist) {
		return f, true, nil
	}
	if f != nil {
		f.Close()
	}
	return blob, false, err
}

func (g *growing) openIngest() (*os.File, error) {
	if _, err := os.Stat(g.ingests); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	g.changes.addOnce(g.ingests)
	dirs, err := os.ReadDir(g.ingests)
	if err != nil {
		return nil, err
	}
	var best *os.File
	most := int64(-1)
	for _, d := range dirs {
		dir := filepath.Join(g.ingests, d.Name())
		ref, err := os.ReadFile(filepath.Join(dir, "ref"))
		if err != nil {
			g.changes.addOnce(dir) // its ref may be about to be written
			continue
		}
		if !refersTo(string(ref), g.dgst) {
			continue
		}
		f, err := os.Open(filepath.Join(dir, "data"))
		if err != nil {
			g.changes.addOnce(dir)
			continue
		}
		if info, err := f.Stat(); err == nil && info.Size() > most {
			best, f, most = f, best, info.Size()
		}
		if f != nil {
			f.Close()
		}
	}
	return best, nil
}

// refersTo reports whether ref is that of a layer's download:
// "<namespace>/1/layer-<digest>", or "…/layer-<name>@<digest>" (MakeRefKey in
// containerd's core/remotes).
func refersTo(ref string, dgst digest.Digest) bool {
	rest, ok := strings.CutSuffix(strings.TrimSpace(ref), dgst.String())
	return ok && (strings.HasSuffix(rest, "-") || strings.HasSuffix(rest, "@"))
}

// Close ends a read that waits.
func (g *growing) Close() error {
	g.cancel()
	g.mu.Lock()
	defer g.mu.Unlock()
	g.changes.close()
	if g.file != nil {
		g.file.Close()
		g.file = nil
	}
	return nil
}

// FromProvider opens a blob that is whole in a content store that only
// containerd can read.
func FromProvider(ctx context.Context, p content.Provider, desc ocispec.Descriptor) (io.ReadCloser, error) {
	ra, err := p.ReaderAt(ctx, desc)
	if err != nil {
		return nil, fmt.Errorf("open blob %q: %w", desc.Digest, err)
	}
	return struct {
		io.Reader
		io.Closer
	}{content.NewReader(ra), ra}, nil
}
