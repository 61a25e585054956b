"""Sign documents with Ed25519, and check that a trusted key signed one: manifests of weights and of snapshots.

A signature file holds one line for each signer: `ed25519 KEY-ID BASE64`. A key is a PEM file (PKCS #8, or
SubjectPublicKeyInfo for the public half), as written by `keygen` or `openssl genpkey -algorithm ed25519`. The signed bytes are
a prefix of the kind of document and the document, so a signature cannot be reused for another kind.

`cryptography` is imported only on use, because the import takes 50 ms.
"""

from __future__ import annotations

import base64
import binascii
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import blake3

from lazyfs.errors import Integrity, LazyfsError, Permanent

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

WEIGHTS = b"quickthaw weights manifest 1\0"
"""Prefix of what is signed for a manifest of weights."""
_MAX_SIGNATURES = 1 << 16  # bytes of the file; a signature takes 130
_MAX_KEY = 1 << 16


def keygen(private: Path, public: Path | None = None) -> str:
    """Write a new key pair: `private` (0600) and `public` (default: `private` plus `.pub`).

    Return the key's id.

    Raises Permanent when one of the files exists or cannot be written; then neither file is left.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    public = public or private.with_name(private.name + ".pub")
    key = Ed25519PrivateKey.generate()
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    shown = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    _write_new(private, secret, 0o600)
    try:
        _write_new(public, shown, 0o644)
    except LazyfsError:
        private.unlink()
        raise
    return key_id(key.public_key())


def _write_new(path: Path, data: bytes, mode: int) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
    except FileExistsError as error:
        raise Permanent(f"{path} exists; a key is never overwritten, choose another name", code="key-exists") from error
    except OSError as error:
        raise Permanent(f"{path}: {error.strerror}", code="key-not-written") from error


def key_id(key: Ed25519PublicKey) -> str:
    """Return the 16 hex digits that name a public key in signatures and messages."""
    return blake3.blake3(key.public_bytes_raw()).hexdigest()[:16]


def signer(private: Path, prefix: bytes = WEIGHTS) -> Callable[[bytes], bytes]:
    """Return a function that maps a document's bytes to its line of signatures.

    Raises Permanent at once, not at the signing, when the key cannot be used: key-unreadable, key-too-open,
    key-wrong-kind.
    """
    key = _private_key(private)

    def sign(document: bytes) -> bytes:
        signature = base64.b64encode(key.sign(prefix + document)).decode()
        return f"ed25519 {key_id(key.public_key())} {signature}\n".encode()

    return sign


def check(
    document: bytes,
    signatures: bytes | None,
    trusted: Sequence[Path],
    *,
    prefix: bytes = WEIGHTS,
    what: str = "the manifest",
    again: str = "import it again",
) -> str:
    """Return the id of the trusted key that signed these bytes.

    `signatures`: their lines, or None. `what` the document is, and what to do `again` if it was changed: for messages.

    Raises Integrity (signature-missing, signature-wrong), or Permanent when a trust key cannot be read.
    """
    from cryptography.exceptions import InvalidSignature

    keys = {key_id(key): key for path in trusted for key in _public_keys(path)}
    wanted = ", ".join(sorted(keys))
    if not signatures or not signatures.strip():
        raise Integrity(
            f"{what} is not signed, and --trust-key requires a signature by {wanted}", code="signature-missing"
        )
    others = []
    for line in signatures[:_MAX_SIGNATURES].splitlines():
        words = line.split()
        if len(words) != 3 or words[0] != b"ed25519":
            continue
        name = words[1].decode("ascii", "replace")
        if name not in keys:
            others.append(name if name.isalnum() and len(name) == 16 else "an invalid key id")
            continue
        try:
            keys[name].verify(base64.b64decode(words[2], validate=True), prefix + document)
        except (InvalidSignature, binascii.Error, ValueError):
            continue
        return name
    if others:
        raise Integrity(
            f"{what} is signed by {', '.join(others[:3])}, and only {wanted} is trusted (--trust-key)",
            code="signature-wrong",
        )
    raise Integrity(
        f"the signature does not match this manifest: one of them was changed; {again}", code="signature-wrong"
    )


def _private_key(path: Path) -> Ed25519PrivateKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        with path.open("rb") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise Permanent(f"{path} can be read by others; chmod 600 {path}", code="key-too-open")
            data = file.read(_MAX_KEY)
    except OSError as error:
        raise Permanent(
            f"{path}: {error.strerror}; make one with: quickthaw snapshot keygen {path}", code="key-unreadable"
        ) from error
    try:
        key = load_pem_private_key(data, None)
    except (ValueError, TypeError) as error:
        # TypeError: the key has a passphrase, which an unattended start cannot prompt for.
        raise Permanent(f"{path} holds no unencrypted PEM private key", code="key-wrong-kind") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise Permanent(
            f"{path} holds a key that is not Ed25519; make one with: quickthaw snapshot keygen", code="key-wrong-kind"
        )
    return key


def _public_keys(path: Path) -> list[Ed25519PublicKey]:
    """Read every public key of a PEM file (a trust file may list several)."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        with path.open("rb") as file:
            data = file.read(_MAX_KEY)
    except OSError as error:
        raise Permanent(f"{path}: {error.strerror}", code="key-unreadable") from error
    found = []
    end = b"-----END PUBLIC KEY-----"
    for block in data.split(end)[:-1]:
        try:
            key = load_pem_public_key(block[block.index(b"-----BEGIN PUBLIC KEY-----") :] + end + b"\n")
        except (ValueError, UnsupportedAlgorithm) as error:
            raise Permanent(
                f"{path} is damaged: it holds no PEM public key where one begins", code="key-wrong-kind"
            ) from error
        if not isinstance(key, Ed25519PublicKey):
            raise Permanent(
                f"{path} holds a key that is not Ed25519; make one with: quickthaw snapshot keygen",
                code="key-wrong-kind",
            )
        found.append(key)
    if not found:
        raise Permanent(
            f"{path} holds no PEM public key (the private half does not belong on a host that only restores)",
            code="key-wrong-kind",
        )
    return found
