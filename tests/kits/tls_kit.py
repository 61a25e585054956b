"""Certificates for tests: an authority of their own, and what it signs."""

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_NO = serialization.NoEncryption()


@dataclass
class Pair:
    """A certificate and its key, in files."""

    certificate: Path
    key: Path

    def arguments(self, *more):
        return ["--ssl-certfile", str(self.certificate), "--ssl-keyfile", str(self.key), *map(str, more)]

    def replace_by(self, other):
        for mine, new in ((self.key, other.key), (self.certificate, other.certificate)):
            fresh = mine.with_suffix(".new")
            fresh.write_bytes(new.read_bytes())
            fresh.rename(mine)


class Authority:
    """Signs certificates; its own is `file`."""

    def __init__(self, folder):
        folder.mkdir()
        self.folder, self.key = folder, ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority of a test")])
        self.file = folder / "authority.pem"
        own = self._sign(self.name, self.key, authority=True)
        self.file.write_bytes(own.public_bytes(serialization.Encoding.PEM))

    def pair(self, name, password=None):
        """A certificate for this host's loopback names, with its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        found = Pair(self.folder / f"{name}.pem", self.folder / f"{name}-key.pem")
        found.certificate.write_bytes(self._sign(subject, key).public_bytes(serialization.Encoding.PEM))
        how = serialization.BestAvailableEncryption(password.encode()) if password else _NO
        pkcs8 = serialization.PrivateFormat.PKCS8
        found.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, pkcs8, how))
        return found

    def _sign(self, subject, key, authority=False):
        now = datetime.datetime.now(datetime.UTC)
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        made = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
        )
        return made.sign(self.key, hashes.SHA256())
