package guest

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// findIface takes a name or a MAC. With failover three interfaces have one MAC: the one
// that carries the address is the one without a master.
func findIface(name string) (string, error) {
	mac, err := net.ParseMAC(name)
	if err != nil {
		return name, nil
	}
	ifs, err := net.Interfaces()
	if err != nil {
		return "", err
	}
	for _, i := range ifs {
		_, err := os.Lstat(filepath.Join("/sys/class/net", i.Name, "master"))
		if i.HardwareAddr.String() == mac.String() && errors.Is(err, os.ErrNotExist) {
			return i.Name, nil
		}
	}
	return "", fmt.Errorf("no interface has the MAC %s", mac)
}

// SetAddr takes an interface, given by name or MAC, up with an IPv4 address such as
// 10.0.0.2/24, and returns its name.
func SetAddr(name, cidr string) (string, error) {
	ip, ipnet, err := net.ParseCIDR(cidr)
	if err != nil {
		return "", err
	}
	if ip.To4() == nil {
		return "", fmt.Errorf("%s is not an IPv4 address", ip)
	}
	if name, err = findIface(name); err != nil {
		return "", err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return "", err
	}
	for _, step := range []struct {
		req uint
		set func()
	}{
		{unix.SIOCSIFADDR, func() { _ = ifr.SetInet4Addr(ip.To4()) }},
		{unix.SIOCSIFNETMASK, func() { _ = ifr.SetInet4Addr(ipnet.Mask) }},
		{unix.SIOCGIFFLAGS, func() { ifr.SetUint32(0) }},
		{unix.SIOCSIFFLAGS, func() { ifr.SetUint16(ifr.Uint16() | unix.IFF_UP) }},
	} {
		step.set()
		if err := unix.IoctlIfreq(fd, step.req, ifr); err != nil {
			return "", fmt.Errorf("%s: %w", name, err)
		}
	}
	return name, nil
}

// WaitCarrier waits until there is an interface of that name or MAC, which it sets up, and it
// has carrier, and returns its name. The kernel tells of each change (rtnetlink(7)); it gives up
// when there was none for a minute.
func WaitCarrier(name string) (string, error) {
	events, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return "", err
	}
	defer unix.Close(events)
	if err := errors.Join(
		unix.Bind(events, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: unix.RTMGRP_LINK}),
		unix.SetsockoptTimeval(events, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 60}),
	); err != nil {
		return "", err
	}
	buf := make([]byte, 64<<10)
	for {
		if link, err := findIface(name); err == nil {
			if i, err := net.InterfaceByName(link); err == nil && i.Flags&net.FlagRunning != 0 {
				return link, nil
			} else if err == nil && i.Flags&net.FlagUp == 0 {
				if err := setUp(link); err != nil {
					return "", err
				}
			}
		}
		if _, err := unix.Read(events, buf); err != nil && err != unix.EINTR && err != unix.ENOBUFS {
			return "", fmt.Errorf("wait for the carrier of %s: %w", name, err)
		}
	}
}

func setUp(link string) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq(link)
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, ifr); err != nil {
		return err
	}
	ifr.SetUint16(ifr.Uint16() | unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr)
}
