"""Options by which an engine listens, which quickthaw's port takes over: a UNIX socket, and TLS with the user's own files.

The engine in its sandbox listens on plain HTTP. So neither these options nor the key's file are part of a snapshot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

UDS = {"--uds": "uds"}
SSL = {
    "--ssl-keyfile": "ssl_keyfile",
    "--ssl-certfile": "ssl_certfile",
    "--ssl-ca-certs": "ssl_ca_certs",
    "--ssl-cert-reqs": "ssl_cert_reqs",
    "--ssl-ciphers": "ssl_ciphers",
    "--ssl-keyfile-password": "ssl_keyfile_password",
    "--enable-ssl-refresh": "ssl_refresh",
    "--no-enable-ssl-refresh": "ssl_refresh",
}
"""Option → the name of its value; an engine has some of them."""
TAKEN_OVER = frozenset(["host", "port", "uds", *SSL.values()])
"""Names of values whose options the engine does not get."""
BLANKED = frozenset(["uds", "ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_keyfile_password"])
"""Those that an empty option turns off, where the file of `--config` has them."""


@dataclass(frozen=True)
class Tls:
    """TLS as the engine would serve it: paths of PEM files, and uvicorn's settings."""

    certificate: str
    key: str = ""
    """"": in the certificate's file."""
    password: str = field(default="", repr=False)
    authorities: str = ""
    """Certificates that clients' certificates are checked with."""
    client_certificates: int = 0
    """ssl.CERT_NONE, CERT_OPTIONAL or CERT_REQUIRED."""
    ciphers: str = ""
    refresh: bool = False
    """Whether changed files are read again while the engine serves."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Tls | None:
        """Return the settings of a command line's values (by the names in `SSL`), or None without a certificate or key."""
        certificate, key = values.get("ssl_certfile") or "", values.get("ssl_keyfile") or ""
        if not certificate and not key:
            return None
        required = values.get("ssl_cert_reqs", "0")
        return cls(
            certificate,
            key,
            values.get("ssl_keyfile_password") or "",
            values.get("ssl_ca_certs") or "",
            int(required) if required in ("1", "2") else 0,
            values.get("ssl_ciphers") or "",
            bool(values.get("ssl_refresh")),
        )
