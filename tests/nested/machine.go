package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"baton/tests/nested/proto"
)

// bootLimit is when a nested host that says nothing is given up.
const bootLimit = 3 * time.Minute

// A machine is a running nested host.
type machine struct {
	cmd  *exec.Cmd
	conn *os.File
	enc  *json.Encoder
	// messages is closed when QEMU is gone.
	messages chan proto.Message
	out      string
	other    *machine // the second one of two; closed with this one
}

// A machineConfig says how to start one.
type machineConfig struct {
	qemu      string
	kernel    kernel
	initramfs string
	accel     string // tcg or kvm
	out       string // the folder that L1 may write to
	tty       bool   // give the serial console our terminal
	more      int    // MiB of RAM above 4 GiB
	host      int    // 1: the second one of two
	shared    string // the folder of what two have in common; "": there is one
	wire      [2]int // the UDP ports of this machine by which two have one wire
}

// memory is L1's RAM in MiB. With more than 2.75 GiB the firmware puts the VF BARs above 4 GiB, where QEMU 10.0.2
// maps them wrongly. It does not count a DIMM, of which Linux is told by ACPI: moreMemory, which L1 has where so much
// is left to this machine.
const (
	memory     = 2688
	moreMemory = 2048
)

// moreRAM is how many MiB of a DIMM there are for each of some L1s.
func moreRAM(hosts int) int {
	text, _ := os.ReadFile("/proc/meminfo")
	for line := range strings.Lines(string(text)) {
		var kib int
		if n, _ := fmt.Sscanf(line, "MemAvailable: %d kB", &kib); n == 1 && kib>>10 > 2*hosts*(memory+moreMemory) {
			return moreMemory
		}
	}
	return 0
}

// qemuArgs are the options of L1: an IOMMU, two SR-IOV NICs, each standing for one
// physical host's, and an e1000e for the rest of the world, all on one wire.
func qemuArgs(c machineConfig) []string {
	// A CPU that boasts of fast string instructions has the kernel copy and clear by rep movsb and
	// rep stosb, which an emulator does byte by byte: without, it clears pages 10 times as fast.
	const slow = ",erms=off,fsrm=off,fsrs=off,fzrm=off,fsrc=off"
	machineType, cpu, accel := "q35,kernel-irqchip=split", "max,la57=off"+slow, "tcg,thread=multi,tb-size=1024"
	if c.accel == "kvm" {
		cpu, accel = "host", "kvm"
	}
	// Commas in a path are doubled: QEMU's option syntax.
	path := func(name string) string { return strings.ReplaceAll(name, ",", ",,") }
	// no_timer_check: on a busy machine the timer of an emulated one may miss the 10 ticks
	// that Linux gives it.
	cmdline := "console=ttyS0 panic=-1 mitigations=off no_timer_check intel_iommu=on iommu=pt"
	console := "file,id=console,path=" + path(filepath.Join(c.out, "serial.log"))
	if c.tty {
		cmdline += " quiet"
		console = "stdio,id=console,signal=off"
	}
	args := []string{
		"-name", "baton-nested-host",
		"-accel", accel, "-machine", machineType, "-cpu", cpu,
		"-smp", "2", "-m", fmt.Sprintf("%d,slots=1,maxmem=8G", memory),
		"-display", "none", "-nodefaults", "-no-reboot", "-no-user-config",
		"-d", "cpu_reset", "-D", filepath.Join(c.out, "cpu.%d.log"), // the registers at a triple fault; QEMU puts its pid there
		"-kernel", c.kernel.image, "-initrd", c.initramfs, "-append", cmdline,
		"-chardev", console, "-serial", "chardev:console",
		"-device", "intel-iommu,intremap=on,caching-mode=off,device-iotlb=on",
	}
	for i, nic := range []string{"igb", "igb", "e1000e"} {
		args = append(args,
			"-device", fmt.Sprintf("pcie-root-port,id=rp%d,chassis=%d", i, i+1),
			"-netdev", fmt.Sprintf("hubport,id=h%d,hubid=0", i),
			"-device", fmt.Sprintf("%s,netdev=h%d,bus=rp%d,mac=52:54:00:00:%02x:%02x", nic, i, i, c.host, i+1))
	}
	if c.more > 0 {
		args = append(args, "-object", fmt.Sprintf("memory-backend-ram,id=more,size=%dM", c.more), "-device", "pc-dimm,memdev=more")
	}
	if c.shared != "" { // what joins their wires, and a disk
		const wire = "dgram,id=wire,local.type=inet,local.host=127.0.0.1,local.port=%d,remote.type=inet,remote.host=127.0.0.1,remote.port=%d"
		args = append(args,
			"-netdev", fmt.Sprintf(wire, c.wire[c.host], c.wire[1-c.host]), // by a stream, one that does not read has the other one stop
			"-netdev", "hubport,id=h3,hubid=0,netdev=wire",
			"-drive", "if=none,id=disk,format=raw,file.locking=off,file="+path(filepath.Join(c.shared, "disk")),
			"-device", "virtio-blk-pci,drive=disk,share-rw=on")
	}
	return append(args,
		"-virtfs", "local,path=/,mount_tag="+proto.RootTag+",security_model=none,readonly=on,multidevs=remap",
		"-virtfs", "local,path="+path(c.out)+",mount_tag="+proto.OutTag+",security_model=none,multidevs=remap",
		"-chardev", "socket,id=commands,fd=3",
		"-device", "virtio-serial-pci", "-device", "virtserialport,chardev=commands,name="+proto.Port)
}

// boot starts QEMU and returns when L1 takes commands. It must be called on the main
// thread: the kernel kills QEMU when the thread that started it ends.
func boot(ctx context.Context, c machineConfig) (*machine, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "commands"), os.NewFile(uintptr(fds[1]), "commands")
	log, err := os.Create(filepath.Join(c.out, "qemu.log"))
	if err != nil {
		ours.Close()
		return nil, err
	}
	defer log.Close()

	m := &machine{conn: ours, enc: json.NewEncoder(ours), messages: make(chan proto.Message), out: c.out}
	m.cmd = exec.Command(c.qemu, qemuArgs(c)...)
	m.cmd.ExtraFiles = []*os.File{theirs}
	m.cmd.Stderr = log
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if c.tty {
		m.cmd.Stdin, m.cmd.Stdout = os.Stdin, os.Stdout
	} else {
		// Out of the terminal's foreground group: an interrupt is ours to handle.
		m.cmd.SysProcAttr.Setpgid = true
	}
	err = m.cmd.Start()
	theirs.Close() // the end of QEMU is the end of the messages
	if err != nil {
		ours.Close()
		return nil, fmt.Errorf("start QEMU: %w", err)
	}
	go m.receive()

	p := startProgress("nested host: booting")
	defer p.end()
	ctx, cancel := context.WithTimeoutCause(ctx, bootLimit, fmt.Errorf("no answer in %v", bootLimit))
	defer cancel()
	msg, err := m.next(ctx)
	if err == nil && msg.Ready == nil {
		err = errors.New("protocol: first message is not Ready")
	}
	if err != nil {
		m.close()
		return nil, fmt.Errorf("boot nested host: %w%s", err, m.lastWords())
	}
	for _, note := range msg.Ready.Notes {
		say("nested host: note: %s", note)
	}
	say("nested host: up after %.1f s (%s, Linux %s)", p.end().Seconds(), c.accel, c.kernel.release)
	return m, nil
}

func (m *machine) receive() {
	defer close(m.messages)
	for dec := json.NewDecoder(bufio.NewReader(m.conn)); ; {
		var msg proto.Message
		if dec.Decode(&msg) != nil {
			return
		}
		m.messages <- msg
	}
}

var errGone = errors.New("QEMU ended by itself")

func (m *machine) next(ctx context.Context) (proto.Message, error) {
	select {
	case msg, ok := <-m.messages:
		if !ok {
			return msg, errGone
		}
		return msg, nil
	case <-ctx.Done():
		return proto.Message{}, context.Cause(ctx)
	}
}

// run runs one command in L1, with its output to the writers while it comes.
func (m *machine) run(ctx context.Context, c proto.Command, stdout, stderr io.Writer) (proto.Exit, error) {
	if err := m.enc.Encode(c); err != nil {
		return proto.Exit{}, fmt.Errorf("nested host: send command: %w", err)
	}
	for {
		msg, err := m.next(ctx)
		switch {
		case err == errGone:
			return proto.Exit{}, fmt.Errorf("nested host: %w while %s ran%s", err, c.Argv[0], m.lastWords())
		case err != nil:
			return proto.Exit{}, err
		case msg.Exit != nil:
			return *msg.Exit, nil
		case msg.Output != nil && msg.Output.Stderr:
			stderr.Write(msg.Output.Data)
		case msg.Output != nil:
			stdout.Write(msg.Output.Data)
		}
	}
}

// close ends L1: by a kill, since nothing in it outlives it.
func (m *machine) close() {
	if m.other != nil {
		m.other.close()
	}
	m.cmd.Process.Kill()
	m.cmd.Wait()
	m.conn.Close()
	for range m.messages {
	}
}

// lastWords is the end of what QEMU and L1's console said, for an error's text.
func (m *machine) lastWords() string {
	var b strings.Builder
	for _, name := range []string{"qemu.log", "serial.log"} {
		text, _ := os.ReadFile(filepath.Join(m.out, name))
		lines := strings.Split(strings.TrimSpace(string(text)), "\n")
		for _, l := range lines[max(0, len(lines)-15):] {
			if l != "" {
				fmt.Fprintf(&b, "\n    %s", strings.TrimSpace(l))
			}
		}
	}
	return b.String()
}

// chooseAccel says what can carry L1 on this machine: KVM where it runs stock kernels and
// nests, emulation elsewhere.
func chooseAccel() string {
	if f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0); err != nil {
		return "tcg"
	} else {
		f.Close()
	}
	for _, module := range []string{"kvm_amd", "kvm_intel"} {
		b, _ := os.ReadFile("/sys/module/" + module + "/parameters/nested")
		if s := strings.TrimSpace(string(b)); s == "1" || s == "Y" {
			return "kvm"
		}
	}
	return "tcg"
}

// kvmModule is the module that gives L1 its /dev/kvm. QEMU's emulation has SVM only.
func kvmModule(accel string) string {
	if _, err := os.Stat("/sys/module/kvm_intel"); err == nil && accel == "kvm" {
		return "kvm-intel"
	}
	return "kvm-amd"
}
