"""Sign snapshot manifests with Ed25519, and check that a trusted key signed a snapshot from a shared store.

The manifest names every file by digest and lists what may restore it, so its signature covers the whole snapshot.
`manifest.sig` beside it holds one line for each signer: `ed25519 KEY-ID BASE64`. A key is a PEM file (PKCS #8, or
SubjectPublicKeyInfo for the public half), as written by `keygen` or `openssl genpkey -algorithm ed25519`. The signed
bytes are a fixed prefix and the manifest, so a signature cannot be reused for another kind of document.

With a trust key set, `check` raises Integrity (signature-missing) if there is no signature, and Integrity
(signature-wrong) if no signature over these bytes is by a trusted key. `cryptography` is imported only on use,
because the import takes 50 ms.
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

from checkpoint.errors import Failed, Integrity

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

FILE_NAME = "manifest.sig"
_PREFIX = b"quickthaw snapshot manifest 1\0"
_MAX_SIGNATURES = 1 << 16  # bytes of the file; a signature takes 130
_MAX_KEY = 1 << 16


def keygen(private: Path, public: Path | None = None) -> str:
    """Write a new key pair: `private` (0600) and `public` (default: `private` plus `.pub`).

    Return the key's id.

    Raises Failed when one of the files exists or cannot be written; then neither file is left.
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
    except Failed:
        private.unlink()
        raise
    return key_id(key.public_key())


def _write_new(path: Path, data: bytes, mode: int) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
    except FileExistsError as error:
        raise Failed("key-exists", f"{path} exists; a key is never overwritten, choose another name") from error
    except OSError as error:
        raise Failed("key-not-written", f"{path}: {error.strerror}") from error


def key_id(key: Ed25519PublicKey) -> str:
    """Return the 16 hex digits that name a public key in signatures and messages."""
    return blake3.blake3(key.public_bytes_raw()).hexdigest()[:16]


def signer(private: Path) -> Callable[[bytes], bytes]:
    """Return a function that maps a manifest's bytes to the content of its `manifest.sig`.

    Raises Failed at once, not at the signing, when the key cannot be used: key-unreadable, key-too-open,
    key-wrong-kind.
    """
    key = _private_key(private)

    def sign(manifest: bytes) -> bytes:
        signature = base64.b64encode(key.sign(_PREFIX + manifest)).decode()
        return f"ed25519 {key_id(key.public_key())} {signature}\n".encode()

    return sign


def check(manifest: bytes, signatures: bytes | None, trusted: Sequence[Path]) -> str:
    """Return the id of the trusted key that signed these bytes.

    `signatures` is the content of `manifest.sig`, or None.

    Raises Integrity (signature-missing, signature-wrong), or Failed when a trust key cannot be read.
    """
    from cryptography.exceptions import InvalidSignature

    keys = {key_id(key): key for path in trusted for key in _public_keys(path)}
    wanted = ", ".join(sorted(keys))
    if not signatures or not signatures.strip():
        raise Integrity(
            "signature-missing", f"the snapshot is not signed, and --trust-key requires a signature by {wanted}"
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
            keys[name].verify(base64.b64decode(words[2], validate=True), _PREFIX + manifest)
        except (InvalidSignature, binascii.Error, ValueError):
            continue
        return name
    if others:
        raise Integrity(
            "signature-wrong",
            f"the snapshot is signed by {', '.join(others[:3])}, and only {wanted} is trusted (--trust-key)",
        )
    raise Integrity(
        "signature-wrong",
        "the signature does not match this manifest: one of them was changed; pull the snapshot again",
    )


def check_folder(folder: Path, trusted: Sequence[Path]) -> bytes:
    """Return the bytes of a snapshot folder's manifest if a trusted key signed exactly these bytes.

    Raises the same errors as `check`.
    """
    from checkpoint.snapshot.manifest import FILE_NAME as MANIFEST

    try:
        manifest = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise Integrity(
            "manifest-unreadable",
            f"{folder / MANIFEST}: {error.strerror}; remove it: quickthaw snapshot rm {folder.name}",
        ) from error
    try:
        signatures = (folder / FILE_NAME).read_bytes()
    except FileNotFoundError:
        signatures = None
    except OSError as error:
        raise Integrity("signature-missing", f"{folder / FILE_NAME}: {error.strerror}") from error
    check(manifest, signatures, trusted)
    return manifest


def _private_key(path: Path) -> Ed25519PrivateKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        with path.open("rb") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise Failed("key-too-open", f"{path} can be read by others; chmod 600 {path}")
            data = file.read(_MAX_KEY)
    except OSError as error:
        raise Failed(
            "key-unreadable", f"{path}: {error.strerror}; make one with: quickthaw snapshot keygen {path}"
        ) from error
    try:
        key = load_pem_private_key(data, None)
    except (ValueError, TypeError) as error:
        # TypeError: the key has a passphrase, which an unattended start cannot prompt for.
        raise Failed("key-wrong-kind", f"{path} holds no unencrypted PEM private key") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise Failed(
            "key-wrong-kind", f"{path} holds a key that is not Ed25519; make one with: quickthaw snapshot keygen"
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
        raise Failed("key-unreadable", f"{path}: {error.strerror}") from error
    found = []
    end = b"-----END PUBLIC KEY-----"
    for block in data.split(end)[:-1]:
        try:
            key = load_pem_public_key(block[block.index(b"-----BEGIN PUBLIC KEY-----") :] + end + b"\n")
        except (ValueError, UnsupportedAlgorithm) as error:
            raise Failed("key-wrong-kind", f"{path} is damaged: it holds no PEM public key where one begins") from error
        if not isinstance(key, Ed25519PublicKey):
            raise Failed(
                "key-wrong-kind", f"{path} holds a key that is not Ed25519; make one with: quickthaw snapshot keygen"
            )
        found.append(key)
    if not found:
        raise Failed(
            "key-wrong-kind",
            f"{path} holds no PEM public key (the private half does not belong on a host that only restores)",
        )
    return found
