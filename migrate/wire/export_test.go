package wire

import (
	"hash/crc32"
	"os"
)

var errTimeout = os.ErrDeadlineExceeded

func crcOf(p []byte) uint32 { return crc32.Checksum(p, castagnoli) }
