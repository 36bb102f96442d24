//go:build !race

package wire

func releasing() {}
func acquired()  {}
