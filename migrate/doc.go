// Package migrate moves a running guest to another process: the two state machines, the rounds over
// RAM, the policy that ends them, and the hand-over after which exactly one side runs the guest.
package migrate
