// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

// EachInode calls fn for each name's inode, whiteouts left out; for an inode
// with several names once for each.
func (m *Meta) EachInode(fn func(*Inode)) {
	stack := []*Node{m.Root}
	for len(stack) > 0 {
		n := stack[len(stack)-1]
		stack = append(stack[:len(stack)-1], n.Children...)
		if n.Inode != nil {
			fn(n.Inode)
		}
	}
}

// EachFile calls fn for each name of a data file, with its path in the layer,
// without a "/" at its beginning, names in byte order within each directory.
func (m *Meta) EachFile(fn func(path string, i *Inode)) {
	type at struct {
		node *Node
		dir  string
	}
	stack := []at{{m.Root, ""}}
	for len(stack) > 0 {
		a := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		name := a.dir + a.node.Name
		if a.node.Inode != nil && a.node.Inode.HasData() {
			fn(name, a.node.Inode)
		}
		if a.node.Name != "" {
			name += "/"
		}
		for i := len(a.node.Children) - 1; i >= 0; i-- {
			stack = append(stack, at{a.node.Children[i], name})
		}
	}
}
