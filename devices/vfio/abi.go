package vfio

// ioctl numbers of <linux/vfio.h>: _IO(';', 100 + n), without directions or sizes.
const (
	vfioBase = ';'<<8 | 100

	getAPIVersion   = vfioBase + 0
	checkExtension  = vfioBase + 1
	setIOMMU        = vfioBase + 2
	groupGetStatus  = vfioBase + 3 // groupStatus
	groupSet        = vfioBase + 4 // int32, the container
	groupUnset      = vfioBase + 5
	groupGetDevice  = vfioBase + 6 // the name
	deviceGetInfo   = vfioBase + 7 // deviceInfo
	deviceGetRegion = vfioBase + 8 // regionInfo
	deviceGetIRQ    = vfioBase + 9 // irqInfo
	deviceSetIRQs   = vfioBase + 10
	deviceReset     = vfioBase + 11
	hotResetInfo    = vfioBase + 12 // hotResetDevices
	hotReset        = vfioBase + 13 // hotResetGroups
	iommuMapDMA     = vfioBase + 13 // dmaMap, of a container
	iommuUnmapDMA   = vfioBase + 14 // dmaUnmap
)

const (
	apiVersion    = 0
	type1v2       = 3      // VFIO_TYPE1v2_IOMMU
	groupViable   = 1 << 0 // VFIO_GROUP_FLAGS_VIABLE
	canReset      = 1 << 0 // VFIO_DEVICE_FLAGS_RESET
	isPCI         = 1 << 1 // VFIO_DEVICE_FLAGS_PCI
	regionMmap    = 1 << 2 // VFIO_REGION_INFO_FLAG_MMAP
	capSparse     = 1      // VFIO_REGION_INFO_CAP_SPARSE_MMAP
	dmaReadWrite  = 1<<0 | 1<<1
	dmaUnmapAll   = 1 << 1 // VFIO_DMA_UNMAP_FLAG_ALL
	regionROM     = 6      // VFIO_PCI_ROM_REGION_INDEX; 0 to 5 are the BARs
	regionConfig  = 7      // VFIO_PCI_CONFIG_REGION_INDEX
	irqINTX       = 0      // VFIO_PCI_INTX_IRQ_INDEX
	irqMSI        = 1      // VFIO_PCI_MSI_IRQ_INDEX
	irqMSIX       = 2      // VFIO_PCI_MSIX_IRQ_INDEX
	irqNone       = 1 << 0
	irqEventFD    = 1 << 2
	irqUnmask     = 1 << 4
	irqTrigger    = 1 << 5
	maxIRQs       = 2048 // what MSI-X has
	maxResetPeers = 256  // functions of one bus
)

type groupStatus struct{ argsz, flags uint32 } // vfio_group_status

type deviceInfo struct{ argsz, flags, regions, _, capOffset uint32 } // vfio_device_info

type regionInfo struct { // vfio_region_info, with room for capabilities
	argsz, flags, index, capOffset uint32
	size, offset                   uint64
	caps                           [4096 - 32]byte
}

type irqInfo struct{ argsz, _, index, count uint32 } // vfio_irq_info

type irqSet struct { // vfio_irq_set with eventfds
	argsz, flags, index, _, count uint32
	fds                           [maxIRQs]int32
}

type dmaMap struct { // vfio_iommu_type1_dma_map
	argsz, flags      uint32
	vaddr, iova, size uint64
}

type dmaUnmap struct { // vfio_iommu_type1_dma_unmap
	argsz, flags uint32
	_, _         uint64 // iova, size: all
}

type resetPeer struct { // vfio_pci_dependent_device
	group      uint32
	segment    uint16
	bus, devfn uint8
}

type hotResetDevices struct { // vfio_pci_hot_reset_info
	argsz, _, count uint32
	devices         [maxResetPeers]resetPeer
}

type hotResetGroups struct { // vfio_pci_hot_reset
	argsz, _, count uint32
	fds             [maxResetPeers]int32
}
