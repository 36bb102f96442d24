// Package vmm is the machine: what the user asked for (Config), and the running whole of
// vCPUs, RAM, buses and devices that is made of it.
//
//	argv, JSON ──ParseArgs──> Config ──Validate──> New ──> Machine ──Run──> exit status
//	                            ▲   │
//	                 -config ───┘   └──> -print-config
//
// Options and device properties have QEMU's names and meanings. Each kind of object (an
// option's argument, a netdev, a device) is a row of a table of properties; that table
// drives the parser, the checks, the suggestions for what is misspelt and the help.
package vmm
