// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package stream

import (
	"bytes"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

type extent struct {
	off  int64
	data []byte
}

func encode(t testing.TB, size int64, extents ...extent) []byte {
	t.Helper()
	var b bytes.Buffer
	e, err := NewEncoder(&b, Header{Size: size, Name: "a", Created: time.Unix(1, 0).UTC()})
	require.NoError(t, err)
	for _, x := range extents {
		require.NoError(t, e.Write(x.off, x.data))
	}
	stats, err := e.Close()
	require.NoError(t, err)
	require.EqualValues(t, b.Len(), stats.Stream)
	return b.Bytes()
}

func decode(b []byte) (h Header, extents []extent, err error) {
	d, err := NewDecoder(bytes.NewReader(b))
	if err != nil {
		return h, nil, err
	}
	for {
		off, data, err := d.Next()
		if errors.Is(err, io.EOF) {
			return d.Header(), extents, nil
		} else if err != nil {
			return d.Header(), nil, err
		}
		extents = append(extents, extent{off, bytes.Clone(data)})
	}
}

func TestRoundTrip(t *testing.T) {
	big := bytes.Repeat([]byte("0123456789abcdef"), (2*MaxExtent+4096)/16)
	b := encode(t, 8<<20, extent{0, []byte("first")}, extent{4096, big}, extent{8<<20 - 1, []byte{1}})
	h, got, err := decode(b)
	require.NoError(t, err)
	require.Equal(t, Header{Size: 8 << 20, Name: "a", Created: time.Unix(1, 0).UTC()}, h)
	require.Equal(t, []extent{
		{0, []byte("first")}, {4096, big[:MaxExtent]}, {4096 + MaxExtent, big[MaxExtent : 2*MaxExtent]}, {4096 + 2*MaxExtent, big[2*MaxExtent:]}, {8<<20 - 1, []byte{1}},
	}, got)
	_, got, err = decode(encode(t, MinSize))
	require.NoError(t, err)
	require.Empty(t, got)
}

// Whatever single byte is changed, cut off or added: it is noticed.
func TestDamage(t *testing.T) {
	b := encode(t, 1<<20, extent{0, []byte("some data")}, extent{8192, []byte("other data")})
	for i := range b {
		for _, bit := range []byte{1, 0x80} {
			c := bytes.Clone(b)
			c[i] ^= bit
			_, _, err := decode(c)
			require.Error(t, err, "byte %d", i)
			require.True(t, errdefs.IsDataLoss(err) || errdefs.IsNotImplemented(err), "byte %d: %v", i, err)
		}
		_, _, err := decode(b[:i])
		require.ErrorIs(t, err, ErrDamaged, "cut to %d bytes", i)
	}
	_, _, err := decode(append(bytes.Clone(b), 0))
	require.ErrorContains(t, err, "more behind its end")
	next := bytes.Clone(b)
	next[6] = '2'
	_, _, err = decode(next)
	require.ErrorIs(t, err, ErrVersion)
}

func TestEncoderRefuses(t *testing.T) {
	_, err := NewEncoder(io.Discard, Header{Size: 4097})
	require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
	e, err := NewEncoder(io.Discard, Header{Size: MinSize})
	require.NoError(t, err)
	require.True(t, errdefs.IsOutOfRange(e.Write(MinSize-1, []byte("ab"))))
	require.NoError(t, e.Write(10, []byte("ab")))
	require.True(t, errdefs.IsOutOfRange(e.Write(11, []byte("ab"))))
	e, err = NewEncoder(&limited{n: 100}, Header{Size: MinSize})
	require.NoError(t, err)
	require.ErrorIs(t, e.Write(0, make([]byte, 100)), io.ErrShortWrite)
	_, err = e.Close()
	require.ErrorIs(t, err, io.ErrShortWrite)
}

type limited struct{ n int }

func (l *limited) Write(b []byte) (int, error) {
	if l.n -= len(b); l.n < 0 {
		return 0, io.ErrShortWrite
	}
	return len(b), nil
}

// Whatever comes, decoding ends, and what decodes has extents in order and within the region.
func FuzzDecode(f *testing.F) {
	f.Add(encode(f, MinSize))
	f.Add(encode(f, 1<<20, extent{0, []byte("some data")}, extent{8192, bytes.Repeat([]byte{7}, 5000)}))
	f.Add([]byte(magic))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, extents, err := decode(b)
		if err != nil {
			if !errdefs.IsDataLoss(err) && !errdefs.IsNotImplemented(err) {
				t.Fatalf("not classed: %v", err)
			}
			return
		}
		next := int64(0)
		for _, x := range extents {
			if x.off < next || len(x.data) == 0 || len(x.data) > MaxExtent || x.off+int64(len(x.data)) > h.Size {
				t.Fatalf("extent of %d bytes at %d", len(x.data), x.off)
			}
			next = x.off + int64(len(x.data))
		}
	})
}
