"""Cut wheels down to what one kind of GPU and one kind of model run, so that an engine fits where only 64 MiB may travel.

A CUDA library holds its kernels once for each GPU architecture, in fat binaries (section .nv_fatbin). The driver takes the one of its
own architecture, so the code of the others is overwritten with zeros, in place: every offset stays, and zeros compress to nothing.
FlashAttention 3 holds each kernel for several head sizes and number formats, too; those of one are kept.
"""

from __future__ import annotations

import io
import re
import shutil
import struct
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

FATBIN_MAGIC = 0xBA55ED50
FATBIN_HEADER = struct.Struct("<IHHQ")
"""Magic, version, size of the header, size of the entries after it."""
ENTRY_HEADER = struct.Struct("<HHIQIIHHI")
"""Kind (1: PTX, 2: machine code), version, size of the header, size of the code after it, …, the architecture (90: sm_90)."""
MACHINE_CODE = 2
FORWARD_KERNEL = b"CollectiveMainloopFwdSm90"
"""In the names of FlashAttention 3's large kernels; the small ones serve every head size."""
HEAD_128_BF16 = re.compile(FORWARD_KERNEL + rb"\w{1,200}?ELi128ENS_10bfloat16_tEf")


@dataclass(frozen=True)
class Entry:
    """The code of one architecture in a fat binary: where it lies in the file, in bytes."""

    start: int
    end: int
    kind: int
    architecture: int


class NotElf(ValueError):
    """A file that is not a 64-bit ELF library, or ends in the middle of one."""


def sections(data: bytes | bytearray) -> Iterator[tuple[str, int, int]]:
    """Yield the sections of an ELF file as (name, offset, bytes). Raises NotElf."""
    if data[:5] != b"\x7fELF\x02":
        raise NotElf("not a 64-bit ELF file")
    try:
        (table,) = struct.unpack_from("<Q", data, 0x28)
        size, count, names = struct.unpack_from("<HHH", data, 0x3A)
        headers = [struct.unpack_from("<IIQQQQ", data, table + index * size) for index in range(count)]
        for name, _, _, _, offset, length in headers:
            start = headers[names][4] + name
            yield bytes(data[start : data.index(b"\0", start)]).decode(), offset, length
    except (struct.error, ValueError, IndexError) as error:
        raise NotElf(f"its sections cannot be read: {error}") from error


def entries(data: bytes | bytearray) -> Iterator[list[Entry]]:
    """Yield the fat binaries of a library, each as its entries. Raises NotElf for one that ends outside the library."""
    for name, offset, length in sections(data):
        if name not in (".nv_fatbin", "__nv_relfatbin"):
            continue
        at, end = offset, offset + length
        while at + FATBIN_HEADER.size <= end:
            magic, _, header, size = FATBIN_HEADER.unpack_from(data, at)
            if magic != FATBIN_MAGIC:
                at += 8  # padding between two
                continue
            at, last = at + header, at + header + size
            if last > end:
                raise NotElf("a fat binary ends outside its section")
            found = []
            while at + ENTRY_HEADER.size <= last:
                kind, _, header, size, _, _, _, _, architecture = ENTRY_HEADER.unpack_from(data, at)
                found.append(Entry(at + header, at + header + size, kind, architecture))
                at += header + size
            yield found
            at = last


def slim_library(data: bytes, architecture: int = 90) -> bytes:
    """Zero the code for other architectures, and FlashAttention 3's for other models than bfloat16 with heads of 128. Raises NotElf.

    What has no machine code for `architecture` is zeroed, too: the kernels that only an older or newer GPU runs.
    """
    slim = bytearray(data)
    for group in entries(data):
        for entry in group:
            if entry.kind != MACHINE_CODE or entry.architecture != architecture or not _wanted(data, entry):
                slim[entry.start : entry.end] = bytes(entry.end - entry.start)
    return bytes(slim)


def _wanted(data: bytes, entry: Entry) -> bool:
    code = data[entry.start : entry.end]
    return FORWARD_KERNEL not in code or HEAD_128_BF16.search(code) is not None


def add_wheel(archive: tarfile.TarFile, wheel: Path, left_out: Callable[[str], bool]) -> int:
    """Add a wheel's files to an archive of a site-packages folder, libraries cut down; return the bytes added.

    `left_out(name)`: True for files that nothing there needs. Raises OSError, zipfile.BadZipFile, NotElf.
    """
    total = 0
    with zipfile.ZipFile(wheel) as file:
        for member in sorted(file.infolist(), key=lambda one: one.filename):
            if member.is_dir() or left_out(member.filename):
                continue
            data = file.read(member)
            if member.filename.endswith(".so"):
                data = slim_library(without_debug_information(data))
            where = tarfile.TarInfo(_installed_name(member.filename))
            where.size, where.mode = len(data), 0o755 if member.filename.endswith(".so") else 0o644
            archive.addfile(where, io.BytesIO(data))
            total += len(data)
    return total


def _installed_name(name: str) -> str:
    """Where a wheel's file lies in site-packages: what a .data folder holds for it is laid there, too."""
    return re.sub(r"^[^/]+\.data/(purelib|platlib)/", "", name)


def without_debug_information(data: bytes) -> bytes:
    """Return a library as `strip --strip-debug` leaves it, or as it is where there is no strip, or strip refuses it."""
    strip = shutil.which("strip")
    if strip is None:
        return data
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(data)
        file.flush()
        done = subprocess.run([strip, "--strip-debug", file.name], capture_output=True, check=False)
        return Path(file.name).read_bytes() if done.returncode == 0 else data
