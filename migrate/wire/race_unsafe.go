//go:build race

package wire

import (
	"runtime"
	"unsafe"
)

// ioSync is what package syscall has for its own calls: the race detector takes whatever was done
// before a write to happen before what follows a read.
var ioSync int64

func releasing() { runtime.RaceReleaseMerge(unsafe.Pointer(&ioSync)) }
func acquired()  { runtime.RaceAcquire(unsafe.Pointer(&ioSync)) }
