package vfio

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"
)

// TestABI lets a C compiler compute numbers, sizes and offsets from the kernel's header.
func TestABI(t *testing.T) {
	cc, err := exec.LookPath("gcc")
	if err != nil {
		t.Skip("needs gcc: ", err)
	}
	values := []struct {
		c    string
		here uintptr
	}{
		{"VFIO_GET_API_VERSION", getAPIVersion}, {"VFIO_CHECK_EXTENSION", checkExtension}, {"VFIO_SET_IOMMU", setIOMMU},
		{"VFIO_GROUP_GET_STATUS", groupGetStatus}, {"VFIO_GROUP_SET_CONTAINER", groupSet},
		{"VFIO_GROUP_UNSET_CONTAINER", groupUnset}, {"VFIO_GROUP_GET_DEVICE_FD", groupGetDevice},
		{"VFIO_DEVICE_GET_INFO", deviceGetInfo}, {"VFIO_DEVICE_GET_REGION_INFO", deviceGetRegion},
		{"VFIO_DEVICE_GET_IRQ_INFO", deviceGetIRQ}, {"VFIO_DEVICE_SET_IRQS", deviceSetIRQs}, {"VFIO_DEVICE_RESET", deviceReset},
		{"VFIO_DEVICE_GET_PCI_HOT_RESET_INFO", hotResetInfo}, {"VFIO_DEVICE_PCI_HOT_RESET", hotReset},
		{"VFIO_IOMMU_MAP_DMA", iommuMapDMA}, {"VFIO_IOMMU_UNMAP_DMA", iommuUnmapDMA}, {"VFIO_DMA_UNMAP_FLAG_ALL", dmaUnmapAll},
		{"VFIO_API_VERSION", apiVersion}, {"VFIO_TYPE1v2_IOMMU", type1v2}, {"VFIO_GROUP_FLAGS_VIABLE", groupViable},
		{"VFIO_DEVICE_FLAGS_RESET", canReset}, {"VFIO_DEVICE_FLAGS_PCI", isPCI}, {"VFIO_REGION_INFO_FLAG_MMAP", regionMmap},
		{"VFIO_REGION_INFO_CAP_SPARSE_MMAP", capSparse}, {"VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE", dmaReadWrite},
		{"VFIO_PCI_ROM_REGION_INDEX", regionROM}, {"VFIO_PCI_CONFIG_REGION_INDEX", regionConfig}, {"VFIO_PCI_INTX_IRQ_INDEX", irqINTX}, {"VFIO_PCI_MSI_IRQ_INDEX", irqMSI}, {"VFIO_PCI_MSIX_IRQ_INDEX", irqMSIX},
		{"VFIO_IRQ_SET_DATA_NONE", irqNone}, {"VFIO_IRQ_SET_DATA_EVENTFD", irqEventFD}, {"VFIO_IRQ_SET_ACTION_TRIGGER", irqTrigger}, {"VFIO_IRQ_SET_ACTION_UNMASK", irqUnmask},
		{"sizeof(struct vfio_group_status)", unsafe.Sizeof(groupStatus{})},
		{"offsetof(struct vfio_device_info, cap_offset)", unsafe.Offsetof(deviceInfo{}.capOffset)},
		{"sizeof(struct vfio_region_info)", unsafe.Offsetof(regionInfo{}.caps)},
		{"offsetof(struct vfio_region_info, cap_offset)", unsafe.Offsetof(regionInfo{}.capOffset)},
		{"offsetof(struct vfio_region_info, offset)", unsafe.Offsetof(regionInfo{}.offset)},
		{"sizeof(struct vfio_irq_info)", unsafe.Sizeof(irqInfo{})}, {"offsetof(struct vfio_irq_info, count)", unsafe.Offsetof(irqInfo{}.count)},
		{"sizeof(struct vfio_irq_set)", unsafe.Offsetof(irqSet{}.fds)},
		{"sizeof(struct vfio_iommu_type1_dma_map)", unsafe.Sizeof(dmaMap{})},
		{"offsetof(struct vfio_iommu_type1_dma_map, iova)", unsafe.Offsetof(dmaMap{}.iova)},
		{"sizeof(struct vfio_iommu_type1_dma_unmap)", unsafe.Sizeof(dmaUnmap{})},
		{"offsetof(struct vfio_pci_hot_reset_info, devices)", unsafe.Offsetof(hotResetDevices{}.devices)},
		{"sizeof(struct vfio_pci_dependent_device)", unsafe.Sizeof(resetPeer{})},
		{"offsetof(struct vfio_pci_dependent_device, devfn)", unsafe.Offsetof(resetPeer{}.devfn)},
		{"offsetof(struct vfio_pci_hot_reset, group_fds)", unsafe.Offsetof(hotResetGroups{}.fds)},
	}
	src := "#include <stddef.h>\n#include <stdio.h>\n#include <linux/vfio.h>\nint main(void) {\n"
	for _, v := range values {
		src += fmt.Sprintf("printf(\"%%lu\\n\", (unsigned long)(%s));\n", v.c)
	}
	file := filepath.Join(t.TempDir(), "abi.c")
	must(t, os.WriteFile(file, []byte(src+"}\n"), 0o644))
	if out, err := exec.Command(cc, "-o", file+".out", file).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	out, err := exec.Command(file + ".out").Output()
	must(t, err)
	lines := strings.Fields(string(out))
	if len(lines) != len(values) {
		t.Fatalf("%d values of %d", len(lines), len(values))
	}
	for i, v := range values {
		if lines[i] != fmt.Sprint(v.here) {
			t.Errorf("%s is %s, here %d", v.c, lines[i], v.here)
		}
	}
}
