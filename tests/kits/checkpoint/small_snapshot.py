"""A snapshot of a few kilobytes that no engine made, taken on a host that the test describes."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from checkpoint.compatibility.check import Identity
from checkpoint.compatibility.engine import EngineFacts
from checkpoint.compatibility.host import HostFacts
from checkpoint.snapshot import manifest
from checkpoint.snapshot.digests import digest_folder
from checkpoint.snapshot.library import Library
from checkpoint.snapshot.manifest import FORMAT
from tests.kits.checkpoint.snapshots import draft

OLD = HostFacts(kernel="5.15.0", machine="x86_64", page_size=4096, cpu_model="old", cpu_flags=("avx2", "sse2"), cpus=8)
NEW = HostFacts(kernel="7.2.0", machine="x86_64", page_size=4096, cpu_model="new", cpu_flags=("avx2", "sse2"), cpus=8)
"""Neither restores what the other one took: kernel-older, kernel-newer."""


def identity(host: HostFacts) -> Identity:
    """Return the identity of a launch on a host."""
    engine = EngineFacts("vllm", "vllm 0.32.0", "b" * 32, "/python", "3.11", "p", "glibc", {})
    return Identity(FORMAT, host, engine, {}, {}, {}, (), "5a" * 16, "d" * 64, "included")


def write(library: Library, name: str, host: HostFacts | None = None, data: bytes | None = None) -> Path:
    """Write a snapshot into a library; `data`: its pages, random by default. Return its folder."""
    with library.writing(name) as folder:
        (folder / "images").mkdir(mode=0o700)
        (folder / "images" / "pages-1.img").write_bytes(os.urandom(3 * 4096) if data is None else data)
        (folder / "images" / "core-7.img").write_bytes(name.encode())
        made = msgspec.structs.replace(
            draft(name, 1), identity=identity(host).encode() if host else {}, files=digest_folder(folder)
        )
        (folder / manifest.FILE_NAME).write_bytes(manifest.dump(made))
    return library.path(name)
