package l0

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"baton/tests/harness"
	"baton/tests/tiny"
)

// credentials makes a directory as QEMU's tls-creds-x509 has it: a CA of its own, a server
// named localhost, and a client.
func credentials(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	var authority *x509.Certificate
	var authorityKey *ecdsa.PrivateKey
	for i, name := range []string{"ca", "server", "client"} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		cert := &x509.Certificate{
			SerialNumber: big.NewInt(int64(i + 1)), Subject: pkix.Name{CommonName: name}, DNSNames: []string{"localhost"},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		}
		if authority == nil {
			cert.IsCA, cert.BasicConstraintsValid, cert.KeyUsage, cert.ExtKeyUsage = true, true, x509.KeyUsageCertSign, nil
			authority, authorityKey = cert, key
		}
		der, err := x509.CreateCertificate(rand.Reader, cert, authority, key.Public(), authorityKey)
		if err != nil {
			t.Fatal(err)
		}
		private, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		for suffix, block := range map[string]*pem.Block{"-cert.pem": {Type: "CERTIFICATE", Bytes: der}, "-key.pem": {Type: "PRIVATE KEY", Bytes: private}} {
			if err := os.WriteFile(filepath.Join(dir, name+suffix), pem.EncodeToMemory(block), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	return dir
}

// With tls-creds the guest moves in secrecy, and to nobody whom another CA vouches for.
func TestMigrateTLS(t *testing.T) {
	ours, theirs := credentials(t), credentials(t)
	source, from := startQMP(t, tiny.Kernel(t, tiny.Say("up\n"), tiny.Echo))
	source.WaitSerial(harness.Context(t, limit), "up")
	target, to := startIncoming(t, "defer")
	for _, q := range []*harness.QMP{from, to} {
		capability(t, q, "events", "")
		q.Do("migrate-set-parameters", map[string]any{"tls-creds": ours, "tls-hostname": "localhost"})
	}
	to.Do("migrate-incoming", uri("tcp:127.0.0.1:0"))
	var info struct {
		Sockets []struct{ Port string } `json:"socket-address"`
	}
	decode(t, to.Do("query-migrate", nil), &info)
	if len(info.Sockets) != 1 {
		t.Fatalf("%+v", info)
	}
	there := uri("tcp:127.0.0.1:" + info.Sockets[0].Port)
	for _, bad := range []map[string]any{{"tls-creds": theirs}, {"tls-creds": ""}, {"tls-creds": ours, "tls-hostname": "other"}} {
		from.Do("migrate-set-parameters", bad)
		from.Do("migrate", there)
		wait(t, from, "failed")
		runsOn(t, source, from)
	}
	from.Do("migrate-set-parameters", map[string]any{"tls-creds": "/nowhere"})
	if _, err := from.Execute("migrate", there); err == nil || !strings.Contains(err.Error(), "/nowhere") {
		t.Error(err)
	}
	from.Do("migrate-set-parameters", map[string]any{"tls-creds": ours, "tls-hostname": "localhost"})
	from.Do("migrate", there)
	wait(t, from, "completed")
	wait(t, to, "completed")
	runsOn(t, target, to)
}
