// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package region

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"sort"

	"github.com/containerd/errdefs"

	"github.com/nhybrid/nhybrid/scmlib"
)

// The operations of the operator's tool, by the names under which they are called.
const (
	OpList     = "list"
	OpBooks    = "books"
	OpInspect  = "inspect"
	OpCreate   = "create"
	OpRemove   = "rm"
	OpKeep     = "keep"
	OpResize   = "resize"
	OpSnapshot = "snapshot"
	OpClone    = "clone"
	OpCheck    = "check"
	OpUse      = "use" // of a volume by the process Pid of the host; with the reply comes its mount
	OpNode     = "guarantee"
	OpExport   = "export" // with a pipe, to which the stream is written
	OpImport   = "import" // with a pipe, from which it is read
)

// Args of the operations. Each uses what it needs: Region is what ParseRef reads, To the name of what is made.
type Args struct {
	Namespace string        `json:"namespace"`
	Region    string        `json:"region,omitempty"`
	To        string        `json:"to,omitempty"`
	Create    CreateOptions `json:"create"`
	Keep      bool          `json:"keep,omitempty"`
	Repair    bool          `json:"repair,omitempty"`
	Pid       int           `json:"pid,omitempty"`
}

// Account is what a namespace has, and may have.
type Account struct {
	Usage
	Quota Quota `json:"quota"`
}

// Listing is the answer to OpList. Namespaces are those for which the regions count.
type Listing struct {
	Regions    []Record           `json:"regions"`
	Namespaces map[string]Account `json:"namespaces"`
	Broken     map[string]string  `json:"broken,omitempty"`
}

// Inspection is the answer to OpInspect: a region and the account of the namespace that it counts for.
type Inspection struct {
	Record
	Owner   string  `json:"counts_for"`
	Account Account `json:"account"`
}

// PoolState is part of the answer to OpBooks.
type PoolState struct {
	Size  int64 `json:"size"`
	Ready int   `json:"ready"`
	Want  int   `json:"want"`
}

// Space is the answer to OpBooks.
type Space struct {
	Books
	Accounts map[string]Account `json:"accounts"` // of namespaces that have regions, or a quota of their own
	Regions  []PoolState        `json:"pool_regions"`
}

func (s *Store) serveOperator(srv *Server) {
	srv.Handle(OpList, Plain(func(_ context.Context, a Args) (Listing, error) {
		l := Listing{Regions: s.List(a.Namespace), Namespaces: map[string]Account{}, Broken: map[string]string{}}
		accounts := s.Accounts()
		for _, r := range l.Regions {
			l.Namespaces[r.Owner()] = accounts[r.Owner()]
		}
		for key, err := range s.Problems() {
			l.Broken[key] = err.Error()
		}
		return l, nil
	}))
	srv.Handle(OpBooks, Plain(func(context.Context, Args) (Space, error) {
		b, err := s.Books()
		sp := Space{Books: b, Accounts: s.Accounts()}
		for size, want := range s.o.Pool {
			sp.Regions = append(sp.Regions, PoolState{size, s.Pooled(size), want})
		}
		sort.Slice(sp.Regions, func(i, j int) bool { return sp.Regions[i].Size < sp.Regions[j].Size })
		return sp, err
	}))
	srv.Handle(OpCreate, Plain(func(ctx context.Context, a Args) (Record, error) {
		return s.Create(ctx, a.Namespace, a.Region, a.Create)
	}))
	srv.Handle(OpNode, Plain(func(context.Context, Args) (scmlib.Info, error) { return s.Guarantee() }))
	named(srv, OpInspect, func(_ context.Context, ref Ref, _ Args) (Inspection, error) {
		r, err := s.Inspect(ref)
		return Inspection{r, r.Owner(), s.Accounts()[r.Owner()]}, err
	})
	named(srv, OpRemove, func(ctx context.Context, r Ref, _ Args) (struct{}, error) { return struct{}{}, s.Remove(ctx, r) })
	named(srv, OpKeep, func(ctx context.Context, r Ref, a Args) (struct{}, error) {
		return struct{}{}, s.SetKeep(ctx, r, a.Keep)
	})
	named(srv, OpResize, func(ctx context.Context, r Ref, a Args) (Record, error) { return s.Resize(ctx, r, a.Create.Size) })
	named(srv, OpSnapshot, func(ctx context.Context, r Ref, a Args) (Record, error) { return s.Snapshot(ctx, r, a.To) })
	named(srv, OpClone, func(ctx context.Context, r Ref, a Args) (Record, error) { return s.Clone(ctx, r, a.To, a.Create) })
	named(srv, OpCheck, func(ctx context.Context, r Ref, a Args) (Report, error) { return s.Check(ctx, r, a.Repair) })
	srv.Handle(OpUse, func(ctx context.Context, raw json.RawMessage, _ []*os.File) (any, []*os.File, error) {
		var a Args
		if err := json.Unmarshal(raw, &a); err != nil {
			return nil, nil, fmt.Errorf("arguments: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		mount, r, err := s.Use(ctx, a.Namespace, a.Region, a.Pid)
		if err != nil {
			return nil, nil, err
		}
		return r, []*os.File{mount}, nil
	})
	srv.Handle(OpExport, withPipe(func(ctx context.Context, a Args, pipe *os.File) (any, error) {
		ref, err := ParseRef(a.Namespace, a.Region)
		if err != nil {
			return nil, err
		}
		return s.Export(ctx, ref, pipe)
	}))
	srv.Handle(OpImport, withPipe(func(ctx context.Context, a Args, pipe *os.File) (any, error) {
		return s.Import(ctx, a.Namespace, a.Region, pipe)
	}))
}

func named[R any](srv *Server, op string, fn func(context.Context, Ref, Args) (R, error)) {
	srv.Handle(op, Plain(func(ctx context.Context, a Args) (R, error) {
		ref, err := ParseRef(a.Namespace, a.Region)
		if err != nil {
			var none R
			return none, err
		}
		return fn(ctx, ref, a)
	}))
}

// withPipe is for streams. The tool makes a pipe of its own for each, so that its death ends the stream, whatever its input and output are.
func withPipe(fn func(context.Context, Args, *os.File) (any, error)) Handler {
	return func(ctx context.Context, raw json.RawMessage, files []*os.File) (any, []*os.File, error) {
		var a Args
		if err := json.Unmarshal(raw, &a); err != nil {
			return nil, nil, fmt.Errorf("arguments: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		if len(files) != 1 {
			return nil, nil, fmt.Errorf("%d files, one is needed: %w", len(files), errdefs.ErrInvalidArgument)
		}
		r, err := fn(ctx, a, files[0])
		files[0].Close() // the other side sees the end of the stream before the answer
		return r, nil, err
	}
}
