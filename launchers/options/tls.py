"""TLS with the user's own files, which quickthaw's port takes over from an engine (launchers/options/front.py)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from launchers.errors import Usage


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
        """Return the settings of a command line's values (by the names in front.SSL), or None without a certificate or key.

        Raises Usage (ssl-cert-reqs): a value that was taken for another would let clients in that the user keeps out.
        """
        certificate, key = values.get("ssl_certfile") or "", values.get("ssl_keyfile") or ""
        if not certificate and not key:
            return None
        given = values.get("ssl_cert_reqs") or "0"
        required = int(given) if re.fullmatch(r"\s*\+?[0-9]{1,9}\s*", given) else -1  # as argparse reads it
        if required not in (0, 1, 2):
            raise Usage("ssl-cert-reqs", f"--ssl-cert-reqs {given} is none of 0, 1 and 2; give one of them")
        return cls(
            certificate,
            key,
            values.get("ssl_keyfile_password") or "",
            values.get("ssl_ca_certs") or "",
            required,
            values.get("ssl_ciphers") or "",
            bool(values.get("ssl_refresh")),
        )
