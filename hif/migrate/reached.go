// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package migrate

// Reached tells whether the tiers look like the plan that was applied last, but
// for what failed and will be tried again. A plan just applied is not reached
// before the engine has looked at it.
func (e *Engine) Reached() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.goal.reached
}
