// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package placement

// Model is the cost model of the N-Docker paper (section 2.3, equations 1 to 8): an image whose layers are stored one after
// the other, bottom first, while the network brings the rest. What is stored before the last-downloading layer (LDL) has
// arrived costs no time. The boundary layer (BL) and all above it are stored on NVM, those below on disk.
//
// The paper counts layers from 1; here index 0 is the bottom. Sizes are those of the stored, uncompressed layers.
type Model struct {
	Sizes    []int64 // bytes of each layer, bottom first
	LDL      int     // K: index of the last-downloading layer
	Download float64 // T_D: seconds from the start until the LDL has arrived
	Alpha    float64 // α: seconds to write a byte to the disk
	Beta     float64 // β: seconds to write a byte to NVM
}

// from returns the bytes of layer i and all above it: S_LDL + S_LAL for i = K, S_bl + S_n for i = M.
func (m Model) from(i int) float64 {
	var s int64
	for _, n := range m.Sizes[min(max(i, 0), len(m.Sizes)):] {
		s += n
	}
	return float64(s)
}

// TDisk is equation 2: the seconds of writing to disk after the download, for the boundary at index bl.
func (m Model) TDisk(bl int) float64 {
	if bl <= m.LDL {
		return 0
	}
	return m.Alpha * (m.from(m.LDL) - m.from(bl))
}

// TNVM is equation 3: the seconds of writing to NVM after the download, for the boundary at index bl.
func (m Model) TNVM(bl int) float64 {
	if bl <= m.LDL {
		return m.Beta * m.from(m.LDL)
	}
	return m.Beta * m.from(bl)
}

// TTotal is equations 1 and 4: the seconds of the whole deployment, for the boundary at index bl.
func (m Model) TTotal(bl int) float64 { return m.Download + m.TDisk(bl) + m.TNVM(bl) }

// UTotal is equation 5: the bytes on NVM, for the boundary at index bl.
func (m Model) UTotal(bl int) int64 { return int64(m.from(bl)) }

// Strategy returns the boundary of the paper's strategy 1, 2 or 3. The paper says of strategies 1 and 2 only on which side of the LDL it is;
// here strategy 1 (equation 6) has it at the bottom, all on NVM, and strategy 2 (equation 7) right above the LDL, where it
// costs the least time. An LDL at the bottom leaves nothing below it, so that strategy 1 is strategy 3 (equation 8: at the LDL).
// Any other number is taken for 3.
func (m Model) Strategy(n int) (bl int) {
	switch n {
	case 1:
		return 0
	case 2:
		return m.LDL + 1
	default:
		return m.LDL
	}
}
