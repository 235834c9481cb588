// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package profile

import (
	"bytes"
	"fmt"
	"io"
	"runtime"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

func example() Profile {
	s := start(1, "usr/bin/redis-server", "etc/a \"b\"\n<&>", "bad\xff\xfe/name", "größe")
	s.Files[0].Kind = Exec
	s.Files[0].Digest = dig("x")
	s.Files[1].Touched, s.Files[1].Ranges = -1, nil
	p := Merge(New(image, day), s, DefaultAgeing)
	p.Rules = []Rule{{"etc/**", Pin}}
	return p
}

func encoded(t testing.TB, p Profile) string {
	t.Helper()
	var b bytes.Buffer
	require.NoError(t, Encode(&b, p))
	return b.String()
}

func TestCodec(t *testing.T) {
	for _, p := range []Profile{example(), New(image, day), Inherit(example(), image, listing{{"größe", 0, 100, ""}})} {
		data := encoded(t, p)
		got, err := Decode(strings.NewReader(data))
		require.NoError(t, err, data)
		require.Equal(t, data, encoded(t, got))
		if len(p.Files) > 0 {
			require.Equal(t, p, got)
		}
	}
	require.Contains(t, encoded(t, example()), `{"base64":"YmFk//4vbmFtZQ=="}`)
}

// Every field is held against its bounds, and the message says what is wrong.
func TestDecodeRefuses(t *testing.T) {
	good := encoded(t, example())
	replace := func(old, new string) string {
		require.Contains(t, good, old)
		return strings.Replace(good, old, new, 1)
	}
	server := `"usr/bin/redis-server"`
	var many strings.Builder
	for i := range MaxRanges + 1 {
		fmt.Fprintf(&many, `{"offset":%d,"length":1},`, i*2)
	}
	cases := map[string][2]string{
		"empty":            {"", "EOF"},
		"no files":         {`{"schema":1,"image":"` + string(image.Digest) + `","layers":[],"starts":0,"created":"2026-01-01T00:00:00Z","updated":"2026-01-01T00:00:00Z"}`, `"files" is missing`},
		"not JSON":         {"profile", "invalid character"},
		"array":            {"[]", "want {"},
		"no schema first":  {`{"image":"x","schema":1}`, "not a profile"},
		"schema 0":         {replace(`"schema":1`, `"schema":0`), "schema 0"},
		"truncated":        {good[:len(good)/2], "EOF"},
		"more behind":      {good + "{}", "more data"},
		"twice":            {replace(`"starts":1,`, `"starts":1,"starts":1,`), "comes twice"},
		"other case":       {replace(`"files"`, `"Files"`), "unknown field"},
		"unknown":          {replace(`"starts":1,`, `"starts":1,"x":1,`), "unknown field"},
		"unknown in file":  {replace(`"kind":"exec"`, `"kind":"exec","owner":0`), "unknown field"},
		"dot dot":          {replace(server, `"usr/../../etc/shadow"`), `leads out by ".."`},
		"only dot dot":     {replace(server, `".."`), `leads out`},
		"absolute":         {replace(server, `"/usr/bin/redis-server"`), "absolute"},
		"dot":              {replace(server, `"./usr"`), "not clean"},
		"double slash":     {replace(server, `"usr//bin"`), "not clean"},
		"trailing slash":   {replace(server, `"usr/"`), "not clean"},
		"empty path":       {replace(server, `""`), "empty path"},
		"zero byte":        {replace(server, `"usr\u0000"`), "zero byte"},
		"long path":        {replace(server, `"`+strings.Repeat("a/", 2048)+`b"`), "more than 4095"},
		"long name":        {replace(server, `"`+strings.Repeat("a", 256)+`"`), "more than 255"},
		"hidden dot dot":   {replace(server, `{"base64":"Li4v/w=="}`), `leads out`},
		"needless base64":  {replace(server, `{"base64":"YQ=="}`), "needs no base64"},
		"bad base64":       {replace(server, `{"base64":"*"}`), "illegal base64"},
		"path a number":    {replace(server, `1`), "cannot unmarshal"},
		"same path":        {replace(server, `"größe"`), "twice"},
		"image":            {replace(string(image.Digest), "sha256:abc"), "image: digest"},
		"image no digest":  {replace(string(image.Digest), "../../etc/passwd"), "image: digest"},
		"layer digest":     {replace(string(image.Layers[1]), "md5:abc"), "layer 1"},
		"file digest":      {replace(string(dig("x")), "sha256:0"), "digest"},
		"layer":            {replace(`"layer":0`, `"layer":2`), "layer 2 of 2"},
		"negative layer":   {replace(`"layer":0`, `"layer":-1`), "layer -1"},
		"size 0":           {replace(`"size":100`, `"size":0`), "size 0"},
		"huge size":        {replace(`"size":100`, `"size":9223372036854775807`), "size"},
		"size overflow":    {replace(`"size":100`, `"size":1e300`), "cannot unmarshal"},
		"kind":             {replace(`"exec"`, `"run"`), "kind"},
		"touched":          {replace(`"touched":10`, `"touched":101`), "touched"},
		"touched -2":       {replace(`"touched":10`, `"touched":-2`), "touched"},
		"weight":           {replace(`"weight":1`, `"weight":1.5`), "weight"},
		"file starts":      {replace(`"starts":1,"lastStart":1`, `"starts":5,"lastStart":1`), "5 starts"},
		"last start":       {replace(`"starts":1,"lastStart":1`, `"starts":1,"lastStart":2`), "2th"},
		"starts":           {replace(`"starts":1,"created"`, `"starts":-1,"created"`), "-1 and 0 starts"},
		"range":            {replace(`{"offset":0,"length":10}`, `{"offset":95,"length":10}`), "range 1"},
		"range overflow":   {replace(`{"offset":0,"length":10}`, `{"offset":9223372036854775807,"length":10}`), "range 1"},
		"range negative":   {replace(`{"offset":0,"length":10}`, `{"offset":-1,"length":10}`), "range 1"},
		"range order":      {replace(`{"offset":0,"length":10}`, `{"offset":20,"length":10},{"offset":0,"length":10}`), "range 2"},
		"many ranges":      {replace(`{"offset":0,"length":10}`, strings.TrimSuffix(many.String(), ",")), "ranges"},
		"rule":             {replace(`"etc/**"`, `"etc/["`), "malformed"},
		"rule action":      {replace(`"pin"`, `"burn"`), "no such action"},
		"repository":       {replace(image.Repository, `a b`), "repository"},
		"repository large": {replace(image.Repository, strings.Repeat("a", 2<<20)), "has 2097154 bytes"},
		"files an object":  {`{"schema":1,"files":{}}`, "files"},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			_, err := Decode(strings.NewReader(tc[0]))
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			require.ErrorContains(t, err, tc[1])
			require.Less(t, len(err.Error()), 1000)
		})
	}
	_, err := Decode(strings.NewReader(`{"schema":2,"image":{"new":"form"},"x":[`))
	require.ErrorIs(t, err, errdefs.ErrNotImplemented)
	require.ErrorContains(t, err, "upgrade")
	bad := example()
	bad.Files[0].Size = -1
	require.ErrorIs(t, Encode(io.Discard, bad), errdefs.ErrInvalidArgument)
}

// flood is a profile that does not end.
type flood struct {
	head, item string
	n          int64 // bytes given
	buf        string
}

func (f *flood) Read(p []byte) (int, error) {
	if f.buf == "" {
		f.buf, f.head = f.head, f.item
	}
	n := copy(p, f.buf)
	f.buf = f.buf[n:]
	f.n += int64(n)
	return n, nil
}

// What is too large is refused early and costs bounded memory.
func TestDecodeIsBounded(t *testing.T) {
	file := `{"path":"a","layer":0,"size":1,"kind":"read","starts":0,"lastStart":0,"weight":0,"touched":-1},`
	for name, tc := range map[string]struct {
		flood flood
		want  string
	}{
		"ten million files": {flood{head: `{"schema":1,"files":[`, item: file}, "more than 200000 files"},
		"huge path":         {flood{head: `{"schema":1,"files":[{"path":"`, item: strings.Repeat("a", 1000)}, "more than 32 MiB"},
		"huge repository":   {flood{head: `{"schema":1,"repository":"`, item: strings.Repeat("a", 1000)}, "more than 32 MiB"},
		"huge key":          {flood{head: `{"`, item: strings.Repeat("a", 1000)}, "more than 32 MiB"},
		"endless ranges":    {flood{head: `{"schema":1,"files":[{"ranges":[`, item: `{"offset":0,"length":1},`}, "more than 32 MiB"},
		"deep":              {flood{head: `{"schema":1,"image":`, item: strings.Repeat("[", 1000)}, "depth"},
		"endless space":     {flood{head: `{"schema":1,`, item: strings.Repeat(" ", 1000)}, "white space"},
	} {
		t.Run(name, func(t *testing.T) {
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			_, err := Decode(&tc.flood)
			runtime.ReadMemStats(&after)
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			require.ErrorContains(t, err, tc.want)
			require.LessOrEqual(t, tc.flood.n, int64(MaxBytes+1))
			require.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(8*MaxBytes), "all allocations together")
		})
	}
}

func TestFit(t *testing.T) {
	p := Merge(New(image, day), start(1, "ok", "link", "missing", "resized", "moved", "other"), DefaultAgeing)
	p.Files[5].Digest = dig("mine")
	files := listing{{"ok", 0, 100, dig("any")}, {"resized", 0, 99, ""}, {"moved", 1, 100, ""}, {"other", 0, 100, dig("theirs")}}
	got, problems, err := Fit(p, image, files)
	require.NoError(t, err)
	require.Equal(t, []string{"ok"}, names(got))
	var why []string
	for _, pr := range problems {
		why = append(why, string(pr.Path)+": "+pr.Why)
	}
	require.Equal(t, []string{
		"link: the image has no such regular file", "missing: the image has no such regular file",
		"resized: it has 99 bytes, not 100", "moved: it is in layer 1, not 0",
		fmt.Sprintf("other: its content is %s, not %s", dig("theirs"), dig("mine"))}, why)

	other := image
	other.Digest = dig("other")
	_, _, err = Fit(p, other, files)
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	other = image
	other.Layers = other.Layers[:1]
	_, _, err = Fit(p, other, files)
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	other.Layers = append(other.Layers, dig("changed"))
	_, _, err = Fit(p, other, files)
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
}

// Whatever comes in: no panic, and what is taken is valid and comes out again.
func FuzzDecode(f *testing.F) {
	f.Add([]byte(encoded(f, example())))
	f.Add([]byte(`{"schema":1,"image":"sha256:0","files":[{"path":{"base64":"/w=="},"ranges":[{"offset":1}]}]}`))
	f.Add([]byte(`{"schema":99}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := Decode(bytes.NewReader(data))
		if err != nil {
			require.True(t, errdefs.IsInvalidArgument(err) || errdefs.IsNotImplemented(err), "%v", err)
			return
		}
		require.NoError(t, p.Validate())
		for _, file := range p.Files {
			require.False(t, strings.HasPrefix(string(file.Path), "/") || strings.Contains("/"+string(file.Path)+"/", "/../"))
			_ = p.Action(file.Path)
		}
		again, err := Decode(strings.NewReader(encoded(t, p)))
		require.NoError(t, err)
		require.Equal(t, encoded(t, p), encoded(t, again))
		m := Merge(p, Start{At: day, Complete: true, Files: []Use{{Entry: Entry{Path: "x", Size: 1}, Kind: Read, Touched: -1}}}, DefaultAgeing)
		if len(m.Layers) > 0 && m.Starts < MaxStarts {
			require.NoError(t, m.Validate())
		}
	})
}
