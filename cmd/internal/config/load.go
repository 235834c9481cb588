// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package config

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/pflag"
)

// Load gives the configuration made of the file, the environment (as os.Environ gives it) and flags (dotted key to
// value), the later going before the earlier. An empty file name means DefaultFile where that exists. Every error is
// one line that names the source, the key and the cure, is an errdefs.ErrInvalidArgument where the content is at
// fault, and keeps fs.ErrNotExist where a named file is missing.
func Load(file string, env []string, flags map[string]string) (Config, error) {
	c := Default()
	named := file != ""
	if !named {
		file = DefaultFile
	}
	data, err := os.ReadFile(file)
	switch {
	case err == nil:
		if err := c.decode(file, data); err != nil {
			return Config{}, err
		}
	case named || !errors.Is(err, fs.ErrNotExist):
		return Config{}, fmt.Errorf("read configuration: %w", err)
	}
	all := c.keys()
	for _, e := range env {
		name, value, _ := strings.Cut(e, "=")
		for _, k := range all {
			if k.env() == name {
				if err := k.set(value); err != nil {
					return Config{}, invalid("environment: %s: %v", name, err)
				}
			}
		}
	}
	for name, value := range flags {
		k, ok := find(all, name)
		if !ok {
			return Config{}, invalid("command line: unknown key %q%s", name, suggest(name, all))
		}
		if err := k.set(value); err != nil {
			return Config{}, invalid("command line: %s: %v", name, err)
		}
	}
	if err := c.Check(); err != nil {
		return Config{}, err
	}
	return c, nil
}

// Parse reads a configuration file's content over the defaults and checks it. name is for messages only.
func Parse(name string, data []byte) (Config, error) {
	c := Default()
	if err := c.decode(name, data); err != nil {
		return Config{}, err
	}
	return c, c.Check()
}

func (c *Config) decode(name string, data []byte) error {
	err := toml.NewDecoder(bytes.NewReader(data)).DisallowUnknownFields().Decode(c)
	var missing *toml.StrictMissingError
	var wrong *toml.DecodeError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &missing) && len(missing.Errors) > 0:
		first := missing.Errors[0]
		line, _ := first.Position()
		key := strings.Join(first.Key(), ".")
		return invalid("%s:%d: unknown key %q%s", name, line, key, suggest(key, c.keys()))
	case errors.As(err, &wrong):
		line, _ := wrong.Position()
		what := plain(wrong.Error())
		if key := strings.Join(wrong.Key(), "."); key != "" {
			what = key + ": " + what
		}
		return invalid("%s:%d: %s", name, line, what)
	default:
		return invalid("%s: %s", name, plain(err.Error()))
	}
}

// UnknownEnv gives the variables that look like ours and are no key, for a warning. They are no error: in a pod,
// Kubernetes adds NHYBRID_SERVICE_HOST and its like for any service of that name.
func UnknownEnv(env []string) []string {
	c := Default()
	all := c.keys()
	var unknown []string
next:
	for _, e := range env {
		name, _, _ := strings.Cut(e, "=")
		if !strings.HasPrefix(name, envPrefix) || name == envPrefix+"CONFIG" {
			continue
		}
		for _, k := range all {
			if k.env() == name {
				continue next
			}
		}
		unknown = append(unknown, name)
	}
	return unknown
}

// Flags adds the daemon's options to fs and returns a function that gives, once fs was parsed, the file to load and
// the values to load it with.
func Flags(fs *pflag.FlagSet) func() (file string, values map[string]string, err error) {
	file := fs.String("config", os.Getenv(envPrefix+"CONFIG"), "configuration file (default "+DefaultFile+" where it exists)")
	short := map[string]string{"address": "address", "root": "root", "nvm-root": "nvm_root", "log-level": "log_level"}
	fs.String("address", "", "unix socket for containerd")
	fs.String("root", "", "directory of the HDD tier")
	fs.String("nvm-root", "", "directory of the NVM tier")
	fs.String("log-level", "", "trace, debug, info, warn, error, fatal or panic")
	set := fs.StringArray("set", nil, "set any key of the configuration, as key=value; may be repeated")
	return func() (string, map[string]string, error) {
		values := map[string]string{}
		for _, s := range *set {
			key, value, ok := strings.Cut(s, "=")
			if !ok {
				return "", nil, invalid("command line: --set %q is not key=value", s)
			}
			values[key] = value
		}
		for flag, key := range short {
			if f := fs.Lookup(flag); f.Changed {
				values[key] = f.Value.String()
			}
		}
		return *file, values, nil
	}
}

// fault is one line about bad content. It is an errdefs.ErrInvalidArgument without that error's words, which say
// nothing to who has read the line.
type fault string

func (f fault) Error() string        { return string(f) }
func (f fault) Is(target error) bool { return target == errdefs.ErrInvalidArgument }

func invalid(format string, args ...any) error { return fault(fmt.Sprintf(format, args...)) }

// typeFault finds the types in go-toml's "cannot decode TOML integer into struct field config.Config.Root of type string".
var typeFault = regexp.MustCompile(`cannot decode TOML (\S+) into struct field \S+ of type (\S+)`)

func plain(message string) string {
	message = strings.Join(strings.Fields(strings.TrimPrefix(message, "toml: ")), " ")
	m := typeFault.FindStringSubmatch(message)
	switch {
	case m == nil:
		return message
	case strings.HasPrefix(m[2], "config."):
		return "this is a table, not a value of type " + m[1]
	default:
		return "the value is of type " + m[1] + " and should be of type " + m[2]
	}
}
