// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package c holds libscm, which gives C and C++ programs the regions of package scmlib in the same format on the medium, and libscm_preload, a heap in a
// region for unmodified programs. There is no Go in either: this package is their tests. See Makefile, include/scm.h, man/ and docs/scm.md.
package c
