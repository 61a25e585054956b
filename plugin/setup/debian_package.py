"""Unpack what a self-contained CRIU takes from Debian packages (.deb): the binary, libraries, licences.

A .deb is an `ar` archive of two tar files. Reading it here needs no dpkg, so a package that was carried to a host without
network works on any distribution. Only base names of members are used: no package can write outside the target.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

import zstandard

from checkpoint.errors import Integrity

_MAGIC = b"!<arch>\n"
_HEADER = 60
_LIBRARY = re.compile(r"(?:usr/)?lib(?:64)?/(?:[a-z0-9_]+-linux-gnu[a-z0-9]*/)?([^/]+\.so(?:\.[^/]+)?)")
"""Directly in a library folder: glibc-hwcaps, gconv and engines are alternatives or plug-ins that CRIU does not use."""
_BINARY = re.compile(r"(?:usr/)?s?bin/criu")
_COPYRIGHT = re.compile(r"usr/share/doc/([^/]+)/copyright")
_DOC_LINK = re.compile(r"usr/share/doc/([^/]+)")
_COMMON_LICENSE = re.compile(r"usr/share/common-licenses/([^/]+)")


@dataclass
class Unpacked:
    """The useful files of some packages, flat in two folders, and which package each library is of."""

    folder: Path
    packages: dict[str, str] = field(default_factory=dict)
    """Name: `version (source package, its version where that differs)`."""
    owner: dict[str, str] = field(default_factory=dict)
    """Base name of a library, or `criu`: name of its package."""
    _doc_links: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for folder in (self.libraries, self._copyrights, self.common_licenses):
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def binary(self) -> Path:
        """CRIU's binary, if a package held one."""
        return self.folder / "criu"

    @property
    def libraries(self) -> Path:
        """Libraries and links between them."""
        return self.folder / "lib"

    @property
    def common_licenses(self) -> Path:
        """The licences that copyright files refer to by name (package base-files)."""
        return self.folder / "common-licenses"

    @property
    def _copyrights(self) -> Path:
        return self.folder / "copyrights"

    def copyright_of(self, package: str) -> Path | None:
        """Return a package's copyright file, which may be that of another package, or None."""
        for _ in range(4):
            file = self._copyrights / package
            if file.exists():
                return file
            if package not in self._doc_links:
                return None
            package = self._doc_links[package]
        return None

    def add(self, package: Path) -> None:
        """Unpack one more .deb. Raises Integrity (criu-package-damaged), OSError for the disk."""
        try:
            self._add(package)
        except (tarfile.TarError, lzma.LZMAError, zlib.error, zstandard.ZstdError, EOFError, ValueError) as error:
            raise Integrity(
                "criu-package-damaged", f"{package} is no sound Debian package ({error}); fetch it again"
            ) from error

    def _add(self, package: Path) -> None:
        sums: dict[str, str] = {}
        name = package.name
        with package.open("rb") as file:
            for member, size in _members(file):
                content = _Part(file, size)
                if member.startswith("control.tar"):
                    with _tar(member, content) as archive:
                        name = self._read_control(archive, sums) or name
                elif member.startswith("data.tar"):
                    with _tar(member, content) as archive:
                        for entry in archive:
                            self._take(archive, entry, name, sums)
                    return
        raise ValueError("it has no data.tar")

    def _read_control(self, archive: tarfile.TarFile, sums: dict[str, str]) -> str | None:
        name = None
        for entry in archive:
            text = archive.extractfile(entry) if entry.isreg() else None  # a link's target may be anything
            if text is None:
                continue
            if PurePosixPath(entry.name).name == "control":
                fields = dict(
                    line.split(": ", 1) for line in text.read().decode(errors="replace").splitlines() if ": " in line
                )
                name = fields.get("Package", "")
                if not re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", name):
                    raise ValueError(f"its name is {name!r}")
                source = f", source {fields['Source']}" if "Source" in fields else ""
                self.packages[name] = f"{fields.get('Version', '?')}{source}"
            elif PurePosixPath(entry.name).name == "md5sums":
                for line in text.read().decode(errors="replace").splitlines():
                    digest, _, path = line.partition("  ")
                    sums[path] = digest
        return name

    def _take(self, archive: tarfile.TarFile, entry: tarfile.TarInfo, package: str, sums: dict[str, str]) -> None:
        path = entry.name.removeprefix("./")
        if found := _LIBRARY.fullmatch(path):
            self.owner.setdefault(found[1], package)
            if entry.issym():
                target = PurePosixPath(entry.linkname).name
                if target != found[1] and not os.path.lexists(self.libraries / found[1]):
                    (self.libraries / found[1]).symlink_to(target)
                return
            target_file = self.libraries / found[1]
        elif _BINARY.fullmatch(path):
            self.owner["criu"] = package
            target_file = self.binary
        elif found := _COPYRIGHT.fullmatch(path):
            target_file = self._copyrights / found[1]
        elif (found := _DOC_LINK.fullmatch(path)) and entry.issym():
            self._doc_links[found[1]] = PurePosixPath(entry.linkname).name
            return
        elif found := _COMMON_LICENSE.fullmatch(path):
            if entry.issym():
                (self.common_licenses / found[1]).unlink(missing_ok=True)
                (self.common_licenses / found[1]).symlink_to(PurePosixPath(entry.linkname).name)
                return
            target_file = self.common_licenses / found[1]
        else:
            return
        content = archive.extractfile(entry) if entry.isreg() else None
        if content is None:
            return
        target_file.unlink(missing_ok=True)  # never write through a link
        with target_file.open("wb") as out:
            shutil.copyfileobj(content, out)
        target_file.chmod(0o755 if entry.mode & 0o111 else 0o644)
        wanted = sums.get(path)
        if wanted and hashlib.md5(target_file.read_bytes(), usedforsecurity=False).hexdigest() != wanted:
            raise ValueError(f"{path} differs from its checksum")


class _Part(io.RawIOBase):
    """The next `size` bytes of a file, as a file. Raises EOFError if the file ends before."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._left = file, size

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, into: memoryview) -> int:  # type: ignore[override]
        """Read."""
        data = self._file.read(min(len(into), self._left))
        if not data and self._left:
            raise EOFError("the file ends early")
        self._left -= len(data)
        into[: len(data)] = data
        return len(data)


def _members(file: IO[bytes]) -> Iterator[tuple[str, int]]:
    """Yield (name, size in bytes) of each member of an `ar` archive, with the file at the member's first byte."""
    if file.read(len(_MAGIC)) != _MAGIC:
        raise ValueError("it does not begin as an ar archive")
    at = len(_MAGIC)
    while header := file.read(_HEADER):
        if len(header) < _HEADER or header[58:] != b"`\n":
            raise ValueError("an ar header is garbled")
        if not (digits := header[48:58].strip()).isdigit():  # int() would take a negative size, and the loop never end
            raise ValueError("an ar header is garbled")
        size = int(digits)
        yield header[:16].decode("ascii", errors="replace").strip().rstrip("/"), size
        at += _HEADER + size + size % 2
        file.seek(at)


def _tar(member: str, content: io.RawIOBase) -> tarfile.TarFile:
    """Open a tar file by the compression that its name ends with."""
    if member.endswith(".zst"):
        stream = zstandard.ZstdDecompressor().stream_reader(io.BufferedReader(content), read_across_frames=True)
        return tarfile.open(fileobj=stream, mode="r|")
    kind = {".xz": "xz", ".gz": "gz", ".bz2": "bz2"}.get(PurePosixPath(member).suffix, "")
    return tarfile.open(fileobj=io.BufferedReader(content), mode=f"r|{kind}")  # type: ignore[call-overload, no-any-return]
