// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package hif

import (
	"context"
	"slices"
	"sync"

	"github.com/nhybrid/nhybrid/hif/profile"
	"github.com/nhybrid/nhybrid/snapshotter/pack"
)

// listingMemory is about how many bytes of listings are kept: those of some 400 000 files.
const listingMemory = 32 << 20

// fileKey is how a profile knows a file.
type fileKey struct {
	layer int // place in the chain
	path  profile.Path
}

// named is a data file as profiles know it, and where containers see it.
type named struct {
	profile.Entry
	shown string // "/" first
}

// library knows which data files are meant by the names in profiles, and the
// other way round.
//
// To list an image takes tens of milliseconds, and the listings of all images
// would take too much memory. So it keeps two things by view: the listings used
// last, up to a bound, and of every image the names that profiles and starts have
// asked for. A round and a start find there what they need and list nothing.
type library struct {
	store  Store
	memory int64 // bound of the listings, in bytes

	mu       sync.Mutex
	listings []*Listing // used last at the end
	names    map[string]*names
}

// names are what was asked for of one view.
type names struct {
	refs  map[fileKey]pack.Ref // the zero Ref: there is no such file
	files map[pack.Ref]named   // one without a path: there is none
}

func newLibrary(s Store) *library {
	return &library{store: s, memory: listingMemory, names: map[string]*names{}}
}

// listing returns the files of an image.
func (l *library) listing(ctx context.Context, image Image) (*Listing, error) {
	if found := l.cached(image); found != nil {
		return found, nil
	}
	read, err := list(ctx, l.store, image)
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.listings = slices.DeleteFunc(l.listings, func(o *Listing) bool { return o.image.View == image.View })
	l.listings = append(l.listings, read)
	var sum int64
	for i, o := range slices.Backward(l.listings) {
		if sum += o.memory; sum > l.memory {
			l.listings = slices.Delete(l.listings, 0, i+1)
			break
		}
	}
	return read, nil
}

// cached is the listing of an image if it is kept, else nil.
func (l *library) cached(image Image) *Listing {
	l.mu.Lock()
	defer l.mu.Unlock()
	i := slices.IndexFunc(l.listings, func(o *Listing) bool {
		return o.image.View == image.View && slices.Equal(o.image.Chain, image.Chain)
	})
	if i < 0 {
		return nil
	}
	found := l.listings[i]
	l.listings = append(slices.Delete(l.listings, i, i+1), found)
	return found
}

// asked is what was asked for of a view before, to be read only. Called with mu held.
func (l *library) asked(view string) *names {
	if n := l.names[view]; n != nil {
		return n
	}
	return &names{}
}

// refs are the data files that a profile of the image means, in the order of the
// keys; the zero Ref for one that the image does not have.
func (l *library) refs(ctx context.Context, image Image, keys []fileKey) ([]pack.Ref, error) {
	out := make([]pack.Ref, len(keys))
	l.mu.Lock()
	n, whole := l.asked(image.View), true
	for i, k := range keys {
		ref, known := n.refs[k]
		out[i], whole = ref, whole && known
	}
	l.mu.Unlock()
	if whole || len(keys) == 0 {
		return out, nil
	}
	files, err := l.listing(ctx, image)
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	n = l.of(image.View)
	for i, k := range keys {
		out[i], _ = files.ref(k)
		n.refs[k] = out[i]
		if out[i] != (pack.Ref{}) {
			n.files[out[i]], _ = files.find(out[i])
		}
	}
	return out, nil
}

// find returns the files of an image among data files.
func (l *library) find(ctx context.Context, image Image, refs []pack.Ref) (map[pack.Ref]named, error) {
	out := make(map[pack.Ref]named, len(refs))
	l.mu.Lock()
	n, whole := l.asked(image.View), true
	for _, ref := range refs {
		file, known := n.files[ref]
		whole = whole && known
		if file.Path != "" {
			out[ref] = file
		}
	}
	l.mu.Unlock()
	if whole || len(refs) == 0 {
		return out, nil
	}
	files, err := l.listing(ctx, image)
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	n = l.of(image.View)
	for _, ref := range refs {
		file, ok := files.find(ref)
		if n.files[ref] = file; ok {
			out[ref] = file
			n.refs[fileKey{file.Layer, file.Path}] = ref
		}
	}
	return out, nil
}

// shown is where containers of a view see a data file, if that was asked for
// before; else "". It answers at once.
func (l *library) shown(view string, ref pack.Ref) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if n := l.names[view]; n != nil {
		return n.files[ref].shown
	}
	return ""
}

// of are the names of a view. Called with mu held.
func (l *library) of(view string) *names {
	n := l.names[view]
	if n == nil {
		n = &names{map[fileKey]pack.Ref{}, map[pack.Ref]named{}}
		l.names[view] = n
	}
	return n
}

// keep forgets what is known of views that are not among those of the images.
func (l *library) keep(images []Image) {
	here := make(map[string]bool, len(images))
	for _, i := range images {
		here[i.View] = true
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for view := range l.names {
		if !here[view] {
			delete(l.names, view)
		}
	}
	l.listings = slices.DeleteFunc(l.listings, func(o *Listing) bool { return !here[o.image.View] })
}

// lazyListing lists an image when its files are first asked for: most profiles
// have no rules that need it.
type lazyListing struct {
	*Listing
	read func() (*Listing, error)
	err  error
}

func (l *lazyListing) get() *Listing {
	if l.Listing == nil && l.err == nil {
		l.Listing, l.err = l.read()
	}
	if l.Listing == nil {
		return &Listing{}
	}
	return l.Listing
}

func (l *lazyListing) Lookup(p profile.Path) (profile.Entry, bool) { return l.get().Lookup(p) }

func (l *lazyListing) All(yield func(profile.Entry) bool) { l.get().All(yield) }

func (l *library) lazy(ctx context.Context, image Image) *lazyListing {
	return &lazyListing{read: func() (*Listing, error) { return l.listing(ctx, image) }}
}

// hotFile is a hot file of an image on this node.
type hotFile struct {
	profile.Hot
	Redirect string
}

// hot are the files of an image that its profile wants on NVM; those that the
// image does not have are left out.
func (l *library) hot(ctx context.Context, image Image, p *profile.Profile) ([]hotFile, error) {
	files := l.lazy(ctx, image)
	hot := p.Hot(files)
	if files.err != nil {
		return nil, files.err
	}
	keys := make([]fileKey, len(hot))
	for i, h := range hot {
		keys[i] = fileKey{h.Layer, h.Path}
	}
	out := make([]hotFile, 0, len(hot))
	if files.Listing != nil { // what is pinned may be many files: they are not kept among the names
		for i, h := range hot {
			if ref, ok := files.Listing.ref(keys[i]); ok {
				out = append(out, hotFile{h, ref.Redirect()})
			}
		}
		return out, nil
	}
	refs, err := l.refs(ctx, image, keys)
	if err != nil {
		return nil, err
	}
	for i, h := range hot {
		if refs[i] != (pack.Ref{}) {
			out = append(out, hotFile{h, refs[i].Redirect()})
		}
	}
	return out, nil
}
