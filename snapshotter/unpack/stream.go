// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

const (
	chunkSize  = 256 << 10
	chunkCount = 8
	// Below this size of the uncompressed stream its ratio says nothing: a blob
	// of zeros is small and harmless.
	ratioFrom = 1 << 30
)

// stream is the uncompressed stream of a blob. One goroutine reads and decodes
// the blob, a second one hashes what comes out, and the reader of the stream is
// the third. Chunks go round between them.
type stream struct {
	ctx    context.Context
	cancel context.CancelFunc
	blob   io.Closer
	wg     sync.WaitGroup

	free   chan []byte // whole chunks
	hashed chan []byte // what came out, in order; closed at the end

	chunk, rest []byte // of the reader: the chunk it holds and what it has not read
	err         error  // of the reader: sticky, io.EOF at the end

	// Written before hashed is closed, valid after it.
	final    streamSums
	finalErr error
}

type streamSums struct {
	digest, diffID           digest.Digest
	compressed, uncompressed int64
}

// chunks are reused: many layers are small.
var chunks = sync.Pool{New: func() any { return new([chunkSize]byte) }}

func getChunk() []byte {
	c, ok := chunks.Get().(*[chunkSize]byte)
	if !ok {
		c = new([chunkSize]byte)
	}
	return c[:]
}

func putChunk(c []byte) { chunks.Put((*[chunkSize]byte)(c[:chunkSize])) }

// startStream begins to decode blob. The caller calls stop.
func startStream(ctx context.Context, blob io.ReadCloser, opts Options) *stream {
	s := &stream{blob: blob, free: make(chan []byte, chunkCount), hashed: make(chan []byte, chunkCount)}
	s.ctx, s.cancel = context.WithCancel(ctx)
	for range chunkCount {
		s.free <- getChunk()
	}
	decoded := make(chan []byte, chunkCount)
	var failed error // written before decoded is closed
	s.wg.Go(func() {
		defer close(decoded)
		failed = s.decode(blob, decoded, opts)
	})
	s.wg.Go(func() {
		defer close(s.hashed)
		h := sha256.New()
		for c := range decoded {
			h.Write(c)
			s.final.uncompressed += int64(len(c))
			s.hashed <- c // has room for all chunks
		}
		s.final.diffID = digest.NewDigest(digest.SHA256, h)
		s.finalErr = failed
	})
	return s
}

// decode sends the uncompressed bytes of blob to out. At its end the compressed
// count and digest are set.
func (s *stream) decode(blob io.Reader, out chan<- []byte, opts Options) error {
	src := &countingReader{r: blob, hash: sha256.New()}
	dec, err := newDecoder(src)
	if err != nil {
		return src.classify(err)
	}
	defer dec.Close()
	var total int64
	for {
		var chunk []byte
		select {
		case chunk = <-s.free:
		case <-s.ctx.Done():
			return s.ctx.Err()
		}
		n, err := readFull(dec, chunk)
		total += int64(n)
		if total > opts.MaxBytes {
			return fmt.Errorf("layer has more than %d bytes uncompressed: %w", opts.MaxBytes, errdefs.ErrInvalidArgument)
		}
		if total > ratioFrom && total/opts.MaxRatio > src.n {
			return fmt.Errorf("layer is compressed by more than %d:1: %w", opts.MaxRatio, errdefs.ErrInvalidArgument)
		}
		out <- chunk[:n] // has room for all chunks
		if opts.Progress != nil {
			opts.Progress(src.n, total)
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return src.classify(err)
		}
	}
	// A decoder stops at the end of its last frame.
	if _, err := io.Copy(io.Discard, src); err != nil {
		return src.classify(err)
	}
	s.final.compressed, s.final.digest = src.n, digest.NewDigest(digest.SHA256, src.hash)
	return nil
}

// Read implements io.Reader. Once it has returned an error other than io.EOF,
// s.err holds that error.
func (s *stream) Read(p []byte) (int, error) {
	if len(s.rest) == 0 && s.err == nil {
		s.next()
	}
	if len(s.rest) == 0 {
		return 0, s.err
	}
	n := copy(p, s.rest)
	s.rest = s.rest[n:]
	return n, nil
}

func (s *stream) next() {
	for len(s.rest) == 0 {
		if s.chunk != nil {
			s.free <- s.chunk[:chunkSize]
			s.chunk = nil
		}
		select {
		case c, ok := <-s.hashed:
			if !ok {
				s.err = s.finalErr
				if s.err == nil {
					s.err = io.EOF
				}
				return
			}
			s.chunk, s.rest = c, c
		case <-s.ctx.Done():
			s.err = s.ctx.Err()
			return
		}
	}
}

// sums is valid after Read has returned io.EOF.
func (s *stream) sums() streamSums { return s.final }

// stop closes the blob, which ends a read that waits, and waits for the
// goroutines. The stream is not read after it.
func (s *stream) stop() {
	s.cancel()
	s.blob.Close()
	s.wg.Wait()
	if s.chunk != nil {
		putChunk(s.chunk)
	}
	for c := range s.hashed { // closed by now
		putChunk(c)
	}
	for range len(s.free) {
		putChunk(<-s.free)
	}
}

// countingReader counts and hashes what is read, and keeps the error of its
// source apart from what a decoder makes of it.
type countingReader struct {
	r    io.Reader
	hash hash.Hash
	n    int64
	err  error
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.hash.Write(p[:n])
	c.n += int64(n)
	if err != nil && err != io.EOF {
		c.err = err
	}
	return n, err
}

// classify returns the error of the source if there was one, and err as that of
// a bad blob otherwise.
func (c *countingReader) classify(err error) error {
	if c.err != nil {
		return fmt.Errorf("read blob at byte %d: %w", c.n, c.err)
	}
	return fmt.Errorf("decompress blob: %w: %w", err, errdefs.ErrInvalidArgument)
}

// readFull is io.ReadFull with the errors of r as they are: io.EOF also after
// some bytes, and io.ErrUnexpectedEOF only from r itself.
func readFull(r io.Reader, p []byte) (n int, err error) {
	for n < len(p) && err == nil {
		var k int
		k, err = r.Read(p[n:])
		n += k
	}
	return n, err
}
