// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package static

// pyFrozen are the modules that are part of the interpreter since 3.11 (Python/frozen.c): their files are not opened.
var pyFrozen = []string{
	"abc", "codecs", "io", "_collections_abc", "_sitebuiltins", "genericpath", "ntpath", "posixpath", "os", "os.path", "site", "stat",
	"importlib.util", "importlib.machinery", "importlib._bootstrap", "importlib._bootstrap_external", "zipimport", "runpy",
}

// pyBuiltin are modules that every interpreter has built in.
var pyBuiltin = []string{
	"sys", "builtins", "_abc", "_ast", "_codecs", "_collections", "_functools", "_imp", "_io", "_locale", "_operator", "_signal", "_sre",
	"_stat", "_string", "_symtable", "_thread", "_tokenize", "_tracemalloc", "_warnings", "_weakref", "atexit", "errno",
	"faulthandler", "gc", "itertools", "marshal", "posix", "pwd", "time", "__main__",
}

// pyFromC are modules that extension modules import, which no text shows.
var pyFromC = map[string][]string{
	"_decimal": {"numbers", "collections"}, "_pickle": {"copyreg", "_compat_pickle"}, "_elementtree": {"copy", "xml.etree.ElementPath", "pyexpat"},
	"_ctypes": {"struct"}, "_zoneinfo": {"zoneinfo._common"}, "_socket": {}, "_curses_panel": {"_curses"},
}

// pyWith are modules that others import when they are used, nearly always.
var pyWith = map[string][]string{
	"socketserver": {"encodings.idna"}, "asyncio": {"encodings.idna"},
	"gunicorn.app.wsgiapp": {"encodings.idna", "gunicorn.workers.sync", "gunicorn.glogging"},
	"uvicorn.main":         {"uvicorn.loops.auto", "uvicorn.protocols.http.auto", "uvicorn.lifespan.on", "uvicorn.logging"},
}

// pyStart is imported before anything else.
var pyStart = []string{"encodings", "encodings.aliases", "encodings.utf_8", "codecs", "io", "abc", "site", "os", "stat", "_collections_abc", "posixpath", "genericpath", "_sitebuiltins"}
