// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

// Package scmlib gives a program persistent memory: a region of byte-addressable storage class memory, mapped into its address space, with an
// allocator, transactions and a root object, consistent after a crash at any instruction. docs/scm.md holds the guarantee and the format.
//
// Data in a region is Go data without Go pointers. The garbage collector does not look into a region, so a pointer there would dangle; types that
// hold pointers, slices, strings, maps, channels, functions or interfaces are refused. [Ptr] and [Off] take their place.
//
//	type counter struct{ N uint64 }
//	r, err := scmlib.Open("/dev/scm/region", scmlib.Options{})
//	root, err := scmlib.Root[counter](r)
//	err = r.Update(func(tx *scmlib.Tx) error {
//		c := root.In(r)
//		if err := tx.Add(c); err != nil {
//			return err
//		}
//		c.N++
//		return nil
//	})
//
// A Region may be used by many goroutines. Transactions are atomic against crashes, not against each other: goroutines that change the same data
// need locks of their own, held until Update returns. Do not nest Update. The race detector does not see races in mapped memory.
//
// Pointers into a region die with [Region.Close].
package scmlib
