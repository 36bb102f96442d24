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
//	             check 0: the frame's CRC covers all that
//	             check 3: u32 CRC32C of each page of the data, between the runs and these; the frame's CRC covers
//	             all but the data
//	             check 5: the same, with each page's digest, 8 sums of u64: word n of the page is added to sum n % 4,
//	             and that to sum 4 + n % 4; after each fourth word, sum (n/4 + 3) % 4 grows by sum n/4 % 4 shifted
//	             right by 29. Of those, one u32: for each, h = (h ^ sum) * 0x9e3779b97f4a7c15, h ^= h >> 32, from
//	             h = 0 on; its low half. Checks 1, 2 and 4 are no longer used
//
// All numbers are little-endian. Both sides of a connection begin with the preamble; a file has
// the source's only. The first frame says what the connection is for: Hello (the main one), Join (a
// channel, which carries pages, rounds and signs of life only) or Ask.
//
// The receiver trusts nothing: lengths are checked against the type's cap, and buffers grow with
// what arrives; pages go to RAM or nowhere. A broken byte is noticed, but what it did to guest memory
// stays, so the guest must not be started after an error. A page that is not what its sum says may be one that
// somebody has written to while it was sent: the target's Round asks for it again.
package wire
