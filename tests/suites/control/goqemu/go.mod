module baton/tests/suites/control/goqemu

go 1.26.0

require (
	github.com/digitalocean/go-qemu v0.0.0
	golang.org/x/sys v0.49.0
)

require (
	github.com/digitalocean/go-libvirt v0.0.0 // indirect
	golang.org/x/crypto v0.53.0 // indirect; only in Debian 13
)

// The packages golang-github-digitalocean-{go-qemu,go-libvirt}-dev.
replace (
	github.com/digitalocean/go-libvirt => /usr/share/gocode/src/github.com/digitalocean/go-libvirt
	github.com/digitalocean/go-qemu => /usr/share/gocode/src/github.com/digitalocean/go-qemu
)

// What their other packages and tests need, in Debian 12 and 13.
exclude (
	github.com/alecthomas/repr v0.1.1
	github.com/alecthomas/repr v0.4.0
	github.com/fatih/camelcase v1.0.0
	github.com/stretchr/testify v1.8.1
	github.com/stretchr/testify v1.10.0
	golang.org/x/tools v0.1.12
	golang.org/x/tools v0.31.0
)
