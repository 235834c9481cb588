// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package placement

// Progress is how far one blob of a pull is with download and unpacking. Blobs that several layers share, and blobs whose layer
// the store has already, are listed once and not at all.
type Progress struct {
	Compressed int64 // bytes of the blob, from the manifest
	Arrived    int64 // bytes that have been downloaded
	Read       int64 // compressed bytes that the unpacker has read
	Unpacked   int64 // uncompressed bytes that it has made of them
}

// leastSample is the compressed bytes that must have been read before their ratio says something of the rest of a blob.
const leastSample = 1 << 20

// Rest returns what a pull has still to do: compressed bytes to arrive (FileInput.Left), and uncompressed bytes to unpack
// (FileInput.ToUnpack). Of a blob whose ratio is not known yet, the compressed bytes count: nobody ships a layer that compression
// made larger by more than a few bytes. Then the lower of its ratio so far and 9/2 counts for the rest, see EstimateUncompressed.
func Rest(blobs []Progress) (left, toUnpack int64) {
	for _, b := range blobs {
		size := min(max(b.Compressed, 0), hugeBytes/1024)
		left += max(size-max(b.Arrived, 0), 0)
		ratio := 1.0
		if b.Read >= leastSample && b.Unpacked > b.Read {
			ratio = min(float64(b.Unpacked)/float64(b.Read), 4.5)
		}
		toUnpack += int64(ratio * float64(max(size-max(b.Read, 0), 0)))
	}
	return min(left, hugeBytes), min(toUnpack, hugeBytes)
}
