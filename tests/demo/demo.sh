#!/usr/bin/env bash
# The demo, in the nested host: a stock Debian kernel on baton, with a disk and a NIC behind
# PCIe root ports; the guest shows its PCIe tree and disk and pings the host over vhost-net.
# With a terminal it ends at a shell in the guest; without one the guest is powered off.
set -eu
cd "$(dirname "$0")/../.."

ip link add br0 type bridge
ip addr add 10.0.0.1/24 dev br0
ip tuntap add dev tap0 mode tap vnet_hdr
ip link set tap0 master br0
ip link set br0 up
ip link set tap0 up
work=$(mktemp -d)
truncate -s 64M "$work/disk.img"

run=(./baton -enable-kvm -name demo -m 512 -smp 2 -nodefaults -nographic -serial stdio
	-kernel .cache/images/vmlinuz -initrd .cache/images/demo.cpio
	-append "console=ttyS0 quiet baton.ip=10.0.0.2/24 baton.ping=10.0.0.1"
	-device pcie-root-port,id=rp0,chassis=1 -device pcie-root-port,id=rp1,chassis=2
	-netdev tap,id=net0,ifname=tap0,script=no,downscript=no,vhost=on
	-device virtio-net-pci,netdev=net0,bus=rp0,mac=52:54:00:12:34:56
	-drive "file=$work/disk.img,format=raw,if=none,id=disk0"
	-device virtio-blk-pci,drive=disk0,bus=rp1)

# What is run, as somebody would type it.
echo "\$ $(printf '%s\n' "${run[@]}" | sed "/ /s/.*/'&'/" | paste -sd' ')"
if [ -t 0 ]; then
	exec "${run[@]}"
fi
mkfifo "$work/in"
"${run[@]}" <>"$work/in" 2>&1 | while IFS= read -r line; do
	printf '%s\n' "$line"
	case $line in *"Commands are in /bin"*) echo poweroff >"$work/in" ;; esac
done
exit "${PIPESTATUS[0]}"
