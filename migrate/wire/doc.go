// Package wire is the format of a migration's stream, and the transports that it goes over. The
// states behind the frames are package migrate's.
//
//	connection   preamble, frame, frame, ...
//	preamble     "batonmig", u16 oldest version, u16 newest version
//	frame        u8 type, 3 zero bytes, u32 length, u32 CRC32C of the payload, u32 CRC32C of these 12, payload
//	payload      a message in CBOR (messages.go), or pages:
//	pages        u16 runs, u8 compression, u8 check, u32 bytes of data
//	             runs: u64 guest-physical address, u32 pages, u32 kind (0 data, 1 zeros)
//	             data, of all runs one after the other, compressed as one
//	             check 1: in the frame's CRC the data's digest stands for them, 8 lanes of u64: word n of the
//	             data goes into lane n % 8, which then is ((lane ^ word) <<< 29) * 0x9e3779b97f4a7c15
//
// All numbers are little-endian. Both sides of a connection begin with the preamble; a file has
// the source's only. The first frame says what the connection is for: Hello (the main one), Join (a
// channel, which carries pages, rounds and signs of life only) or Ask.
//
// The receiver trusts nothing: lengths are checked against the type's cap, and buffers grow with
// what arrives; pages go to RAM or nowhere. A broken byte is noticed, but what it did to guest memory
// stays, so the guest must not be started after an error.
package wire
