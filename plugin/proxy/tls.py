"""TLS at the proxy's port, with the user's own certificate and key, as the engine's server (uvicorn) would set it up.

With `refresh`, changed files are read again, and a pair that does not fit together leaves the old one in use.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from dataclasses import dataclass, field
from pathlib import Path

log = logging.getLogger("quickthaw")
LOOK_EVERY_S = 1.0


@dataclass
class Certificates:
    """A server's TLS context, `context`, made of PEM files; a reload replaces it. Raises ValueError, with one line, if they cannot be used.

    The fields are those of launchers.options.tls.Tls, which the proxy, usable without any engine, does not import.
    """

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
    """Whether changed files are read again."""

    def __post_init__(self) -> None:
        self._known = self._fingerprint()
        try:
            self.context = self._context()
        except (OSError, ValueError) as error:
            raise ValueError(f"{self._names()}: {_cause(error)}") from error

    async def watch(self) -> None:
        """Read changed files again, until cancelled. Connections that exist keep their certificate."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            self.reload()

    def reload(self) -> None:
        """Read the files again if they have changed; files that do not fit together are logged once and tried again when they change."""
        now = self._fingerprint()
        if now == self._known:
            return
        self._known = now
        try:
            # A context of its own: files that change while they are read cannot spoil the one in use.
            self.context = self._context()
        except (OSError, ValueError) as error:
            log.warning("tls-files: %s: %s; the certificate before stays in use", self._names(), _cause(error))
        else:
            log.info("TLS: read %s again", self._names())

    def _context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self.key or None, self._password)
        if self.authorities:
            context.load_verify_locations(self.authorities)
        context.verify_mode = ssl.VerifyMode(self.client_certificates)
        if self.ciphers:
            context.set_ciphers(self.ciphers)
        return context

    def _password(self) -> str:
        """Return the key's password, for which OpenSSL would ask at the terminal otherwise."""
        if not self.password:
            raise ValueError("the key is encrypted, and no --ssl-keyfile-password is given")
        return self.password

    def _names(self) -> str:
        return ", ".join(self._files()) or "(no certificate)"

    def _files(self) -> list[str]:
        return [name for name in (self.certificate, self.key, self.authorities) if name]

    def _fingerprint(self) -> list[tuple[int, ...] | None]:
        found: list[tuple[int, ...] | None] = []
        for name in self._files():
            try:
                stat = Path(name).stat()
                found.append((stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns))
            except (OSError, ValueError):
                found.append(None)
        return found


def _cause(error: Exception) -> str:
    return str(getattr(error, "reason", None) or getattr(error, "strerror", None) or error).replace("_", " ")
