package wire

import (
	"errors"
	"strings"
	"sync"

	"github.com/fxamacker/cbor/v2"
)

// Session names one attempt to migrate, so that a connection that asks, or comes late, is
// known to belong to it.
type Session [16]byte

// Hello opens the main connection.
type Hello struct {
	Session     Session       `cbor:"1,keyasint"`
	OneWay      bool          `cbor:"2,keyasint,omitempty"` // a file or a pipe: no answers
	Channels    int           `cbor:"3,keyasint,omitempty"` // connections for RAM, 0: it comes on this one
	Compression string        `cbor:"4,keyasint,omitempty"`
	Stall       int64         `cbor:"5,keyasint,omitempty"` // ms of silence after which the source gives up
	Regions     []Region      `cbor:"6,keyasint"`
	Facts       []Fact        `cbor:"7,keyasint"`
	Sections    []SectionInfo `cbor:"8,keyasint"`
	// Features are what the target has to know to understand the stream; it refuses one that it
	// does not know.
	Features []string `cbor:"9,keyasint,omitempty"`
}

// FeatureSums says that there may be batches with a sum of each page.
const FeatureSums = "page-sums-2"

// Region is one of RAM, in bytes.
type Region struct {
	GPA  uint64 `cbor:"1,keyasint"`
	Size uint64 `cbor:"2,keyasint"`
}

// Fact is one thing that both sides must agree on.
type Fact struct {
	Name  string `cbor:"1,keyasint"`
	Value string `cbor:"2,keyasint"`
}

// SectionInfo announces a section.
type SectionInfo struct {
	ID      string `cbor:"1,keyasint"`
	Type    string `cbor:"2,keyasint"`
	Version uint16 `cbor:"3,keyasint"`
}

// Section is one piece of state.
type Section struct {
	SectionInfo
	Data []byte `cbor:"4,keyasint"`
}

// Accept answers Hello.
type Accept struct {
	Stall int64 `cbor:"1,keyasint"` // ms of silence after which the target gives up
}

// Join opens a channel.
type Join struct {
	Session Session `cbor:"1,keyasint"`
	Index   int     `cbor:"2,keyasint"` // 0 to Hello.Channels-1
}

// Round ends a round on one connection.
type Round struct {
	Number int `cbor:"1,keyasint"` // 1 for the first
	// Changed is what the target has found to be other than its sums say, or part of it: see Sink.Changed.
	Changed []Region `cbor:"2,keyasint,omitempty"`
}

// MaxChanged is how many regions a Round has at most.
const MaxChanged = 1024

// End says what was sent.
type End struct {
	Running  bool `cbor:"1,keyasint"` // the vCPUs are to be started
	Rounds   int  `cbor:"2,keyasint"`
	Sections int  `cbor:"3,keyasint"`
	// Stopped is for how long the guest has stood still, in µs.
	Stopped int64 `cbor:"4,keyasint,omitempty"`
}

// Done has what came for the guest after it had left.
type Done struct {
	Late []Late `cbor:"1,keyasint,omitempty"`
}

// Late is what came for one network card.
type Late struct {
	Name    string   `cbor:"1,keyasint"` // the device's id, or what stands for it
	Frames  [][]byte `cbor:"2,keyasint"` // each with the header that a TAP gives it
	Dropped int      `cbor:"3,keyasint,omitempty"`
}

// MaxLate is the most bytes of frames that a Done carries.
const MaxLate = MaxSection / 2

// Ask is the source's question after it has lost the connection.
type Ask struct {
	Session Session `cbor:"1,keyasint"`
}

// Answer to Ask is final: a guest that does not run here will not, either.
type Answer struct {
	Runs bool `cbor:"1,keyasint"`
}

// Reason of a Refuse or an Abort.
type Reason struct {
	Lines []string `cbor:"1,keyasint"`
}

// NewReason says in lines what an error says. It fits into a frame.
func NewReason(err error) Reason {
	text := err.Error()
	return Reason{strings.Split(text[:min(len(text), maxSmall/2)], "\n")}
}

// Err is the reason as an error, safe for a terminal.
func (r Reason) Err() error {
	clean := func(c rune) rune {
		if c < ' ' || c == 0x7f {
			return '?'
		}
		return c
	}
	var lines []string
	for _, l := range r.Lines {
		lines = append(lines, strings.Map(clean, strings.ToValidUTF8(l, "?")))
	}
	return errors.New(strings.Join(lines, "\n"))
}

// Prepare has the codec look at the messages, as it does when it first sees one, and finds out how CRCs are made here:
// each takes longer than to send a message.
var Prepare = sync.OnceFunc(func() {
	updateCRC(0, nil)
	region := []Region{{}}
	for _, v := range []any{
		&Hello{Regions: region, Facts: []Fact{{}}, Sections: []SectionInfo{{}}, Features: []string{""}},
		&Accept{}, &Round{Changed: region}, &Section{Data: []byte{0}}, &End{Stopped: 1}, &Done{Late: []Late{{Frames: [][]byte{{0}}}}},
	} {
		b, err := encoding.Marshal(v)
		must(b, errors.Join(err, decoding.Unmarshal(b, v)))
	}
})

// Limits of a message. Strings are as long as the frame at most.
const (
	maxElements = 16384
	maxPairs    = 64
	maxLevels   = 8
)

var (
	encoding = must(cbor.CoreDetEncOptions().EncMode())
	decoding = must(cbor.DecOptions{
		DupMapKey:        cbor.DupMapKeyEnforcedAPF,
		IndefLength:      cbor.IndefLengthForbidden,
		TagsMd:           cbor.TagsForbidden,
		MaxNestedLevels:  maxLevels,
		MaxArrayElements: maxElements,
		MaxMapPairs:      maxPairs,
	}.DecMode())
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err) // the options are constant
	}
	return v
}
