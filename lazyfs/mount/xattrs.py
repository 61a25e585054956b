"""Extended attributes: a file's digest, its number of chunks, and the share of it that is cached."""

from __future__ import annotations

import errno

from lazyfs.mount.service import Service
from lazyfs.mount.tree import ROOT, Node

_FILE = (b"user.quickthaw.digest", b"user.quickthaw.chunks", b"user.quickthaw.cached")
_TOP = (b"user.quickthaw.manifest",)


def list_xattrs(node: Node) -> bytes:
    """Return the attribute names, each terminated by NUL."""
    names = _FILE if node.file is not None else _TOP if node.ino == ROOT else ()
    return b"".join(n + b"\0" for n in names)


def get_xattr(service: Service, node: Node, name: bytes) -> bytes:
    """Return the attribute's value. Raises OSError (ENODATA) for an unknown name."""
    if node.file is not None:
        if name == _FILE[0]:
            return node.file.digest.encode()
        if name == _FILE[1]:
            return str(len(node.file.chunks)).encode()
        if name == _FILE[2]:
            return f"{service.files.cached_fraction(node):.4f}".encode()
    if node.ino == ROOT and name == _TOP[0]:
        return service.config.manifest.encode()
    raise OSError(errno.ENODATA, "no such attribute")
