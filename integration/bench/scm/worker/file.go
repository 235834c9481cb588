// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/nhybrid/nhybrid/integration/bench/scm/wire"
)

// file is the array as a program without any library keeps it: pread, pwrite, fdatasync. Its ten updates are not atomic.
type file struct {
	f *os.File
	z sizes
}

func openFile(path string, z sizes) (place, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	zeros := make([]byte, 1<<20)
	for left := 4 * z.array; left > 0; left -= len(zeros) {
		if _, err := f.Write(zeros[:min(left, len(zeros))]); err != nil {
			return nil, err
		}
	}
	return &file{f, z}, f.Sync()
}

func (p *file) close() error { return p.f.Close() }

func (p *file) hello() wire.Hello {
	return wire.Hello{Granularity: "page", Why: "pwrite and fdatasync; the ten updates are not atomic"}
}

func (p *file) workloads() map[string]*lazy {
	rnd := random(seed)
	var b [4]byte
	update := func() error {
		at := 4 * int64(rnd.below(p.z.array))
		if _, err := p.f.ReadAt(b[:], at); err != nil {
			return err
		}
		binary.LittleEndian.PutUint32(b[:], binary.LittleEndian.Uint32(b[:])+1)
		_, err := p.f.WriteAt(b[:], at)
		return err
	}
	run := func(updates int, sync bool) *lazy {
		return &lazy{run: func(n int) error {
			for range n {
				for range updates {
					if err := update(); err != nil {
						return err
					}
				}
				if sync {
					if err := unix.Fdatasync(int(p.f.Fd())); err != nil {
						return err
					}
				}
			}
			return nil
		}}
	}
	return map[string]*lazy{"update": run(1, false), "update-sync": run(1, true), "tx10": run(10, true)}
}

// database is bbolt: what a Go program would take instead.
type database struct {
	db *bolt.DB
	z  sizes
}

func openBolt(path string, z sizes) (place, error) {
	db, err := bolt.Open(path, 0o600, nil)
	if err != nil {
		return nil, fmt.Errorf("open database %q: %w", filepath.Base(path), err)
	}
	return &database{db, z}, nil
}

func (p *database) close() error { return p.db.Close() }

func (p *database) hello() wire.Hello {
	return wire.Hello{Granularity: "page", Why: "bbolt: pwrite and fdatasync, pages of a copy-on-write tree"}
}

var (
	arrayBucket = []byte("array")
	treeBucket  = []byte("tree")
)

func (p *database) put(bucket []byte, n int, key func(i int) uint64) error {
	return p.db.Update(func(tx *bolt.Tx) error {
		b, err := tx.CreateBucketIfNotExists(bucket)
		for i := 0; i < n && err == nil; i++ {
			var k, v [8]byte // bbolt keeps them until the transaction ends
			binary.BigEndian.PutUint64(k[:], key(i))
			v[0] = 1
			err = b.Put(k[:], v[:])
		}
		return err
	})
}

func (p *database) workloads() map[string]*lazy {
	return map[string]*lazy{
		"tx10": {make: func() (workload, error) {
			for from := 0; from < p.z.rows; from += 10_000 {
				if err := p.put(arrayBucket, min(10_000, p.z.rows-from), func(i int) uint64 { return uint64(from + i) }); err != nil {
					return nil, err
				}
			}
			rnd := random(seed)
			return func(n int) error {
				for range n {
					if err := p.update10(&rnd); err != nil {
						return err
					}
				}
				return nil
			}, nil
		}},
		"btree-tx": {make: func() (workload, error) {
			rnd := random(seed)
			next := func(int) uint64 { return rnd.next() }
			for from := 0; from < p.z.tree; from += 10_000 {
				if err := p.put(treeBucket, min(10_000, p.z.tree-from), next); err != nil {
					return nil, err
				}
			}
			return func(n int) error {
				for range n {
					if err := p.put(treeBucket, 1, next); err != nil {
						return err
					}
				}
				return nil
			}, nil
		}},
	}
}

// update10 adds one to ten rows.
func (p *database) update10(rnd *random) error {
	return p.db.Update(func(tx *bolt.Tx) error {
		b := tx.Bucket(arrayBucket)
		for range 10 {
			k, v := make([]byte, 8), make([]byte, 8)
			binary.BigEndian.PutUint64(k, uint64(rnd.below(p.z.rows)))
			if copy(v, b.Get(k)) != 8 {
				return errors.New("a row is missing")
			}
			binary.LittleEndian.PutUint64(v, binary.LittleEndian.Uint64(v)+1)
			if err := b.Put(k, v); err != nil {
				return err
			}
		}
		return nil
	})
}
