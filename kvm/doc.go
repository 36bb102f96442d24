// Package kvm is typed handles on /dev/kvm (Linux 5.14 or later, x86-64), and the only
// package that issues its ioctls.
//
//	Open ──> System   what this host can do: features, CPUID, MSRs
//	           │ CreateVM
//	           v
//	          VM      memory slots, dirty log and rings, MSI routes, irqfd, ioeventfd, clock
//	           │ CreateVCPU
//	           v
//	         VCPU     Run ──> ExitReason ──> IO, MMIO, EOIVector, ...; registers; State
//
// A vCPU belongs to one thread: its goroutine calls runtime.LockOSThread and is the only
// one to call the VCPU's methods, except Kick, which makes Run return from any thread.
// System and VM may be used from any goroutine.
//
// The names are those of the kernel's Documentation/virt/kvm/api.rst, which comments cite
// as "api.rst"; abi.go mirrors the structures, and a test compares each size and number
// with the kernel's headers. Structures whose mirror in gokvm is right are gokvm's.
package kvm
