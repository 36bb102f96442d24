package boot

import (
	"debug/elf"
	"io"
)

// IsLinux says whether the file at path is a Linux kernel, rather than some other program
// with a PVH note: a bzImage, or an ELF file with the section that only kernels have.
func IsLinux(path string) (bool, error) {
	f, _, err := openRegular(path)
	if err != nil {
		return false, err
	}
	defer f.Close()
	head := make([]byte, setupHeaderEnd)
	n, err := f.ReadAt(head, 0)
	if err != nil && err != io.EOF {
		return false, err
	}
	if head = head[:n]; !isELF(head) {
		return isBzImage(head), nil
	}
	e, err := elf.NewFile(f)
	if err != nil {
		return false, err
	}
	return e.Section(".init.text") != nil, nil
}
