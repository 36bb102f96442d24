// Package bench compares baton with QEMU: the same kernel, initrd, memory and virtio devices
// on the same host, each in turn, so that what else the host does hits both.
//
//	TestLinux   start and memory: a new guest each time; disk and network: two guests take turns
//	TestExits   a guest of a few instructions that only exits
//	TestGokvm   whether the other VMM in Go boots this kernel, and how fast
//
// A missed target is a line in the table, not a failed test: what fails is a measurement.
// `make bench` runs it, TestExits also on the machine's own KVM, and shows the tables. They
// are in the artifacts as table.txt and results.json.
package bench
