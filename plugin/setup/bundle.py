"""Make the folder of a self-contained CRIU (checkpoint.criu.self_contained) of unpacked packages.

The loader itself says which libraries the binary names, so exactly those are taken: of the packages, else of the host. A
library that is in neither is named in the error.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
from pathlib import Path

from checkpoint.criu import self_contained
from checkpoint.errors import Failed, HostLacks
from plugin.setup.debian_package import Unpacked

_HOST_LOADERS = {"x86_64": "/lib64/ld-linux-x86-64.so.2", "aarch64": "/lib/ld-linux-aarch64.so.1"}
_LOADED_LATER = ("libgcc_s.so.1",)
"""Libraries that no ELF header names: glibc loads libgcc_s when a thread is cancelled."""
_LIMIT_S = 30.0
_WRAPPER = """#!/bin/sh
# criu, run by the loader of the libc it was built for.
d="$(dirname "$(readlink -f "$0")")"
exec "$d/lib/{loader}" --library-path "$d/lib" "$d/criu.bin" "$@"
"""


def build(unpacked: Unpacked, target: Path, host_files: bool = True) -> None:
    """Write a self-contained folder at `target`, which must not exist.

    `host_files`: libraries that the packages lack may be this host's. Raises Failed (criu-incomplete) if something is lacking,
    and OSError for the disk.
    """
    if not unpacked.binary.exists():
        raise Failed("criu-incomplete", "none of the packages holds sbin/criu; give the package criu too")
    loader = next(iter(sorted(unpacked.libraries.glob(self_contained.LOADERS))), None)
    if loader is None:
        loader = Path(_HOST_LOADERS.get(os.uname().machine, "/lib/ld-linux.so"))
    if not loader.exists():
        raise Failed("criu-incomplete", f"neither the packages nor this host have a glibc ({loader}); give libc6 too")
    libraries = target / self_contained.LIBRARIES
    libraries.mkdir(mode=0o755, parents=True)
    named = _named_libraries(loader, unpacked.libraries, unpacked.binary)
    for name in _LOADED_LATER:
        if (unpacked.libraries / name).exists():
            named[name] = unpacked.libraries / name
    named[loader.name] = loader
    packaged = unpacked.folder.resolve()
    if not host_files and (
        own := [name for name, file in named.items() if not file.resolve().is_relative_to(packaged)]
    ):
        raise Failed(
            "criu-incomplete",
            f"the packages lack {', '.join(sorted(own))}, and this host's have no licence to pass on; give the packages of these too",
        )
    for name, file in named.items():
        _place(unpacked, file, libraries / name, 0o755 if name == loader.name else 0o644)
    _place(unpacked, unpacked.binary, target / self_contained.BINARY, 0o755)
    _write(target / self_contained.WRAPPER, _WRAPPER.format(loader=loader.name), 0o755)
    _add_licenses(unpacked, named, target / self_contained.LICENSES)
    target.chmod(0o755)


def _named_libraries(loader: Path, libraries: Path, binary: Path) -> dict[str, Path]:
    """Return the libraries that a binary names, directly or not, by the name it uses. Raises Failed (criu-incomplete)."""
    argv = [str(word) for word in (loader, "--library-path", libraries, "--list", binary)]
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, errors="replace", timeout=_LIMIT_S, env={"LC_ALL": "C"}
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Failed("criu-incomplete", f"the loader {loader.name} does not start here: {error}") from error
    missing = sorted(set(re.findall(r"^\s*(\S+) => not found", done.stdout, re.MULTILINE)))
    missing += sorted(set(re.findall(r"(\S+: cannot open shared object file|version `[^']+' not found)", done.stderr)))
    if missing or done.returncode:
        what = ", ".join(missing) or (done.stderr or done.stdout).strip()[:200]
        raise Failed(
            "criu-incomplete",
            f"criu names what neither the packages nor this host have: {what}; give the packages of these libraries and libc6 too",
        )
    return {
        name: Path(file)
        for name, file in re.findall(r"^\s*(\S+) => (/.+) \(0x", done.stdout, re.MULTILINE)
        if "/" not in name
    }


def _add_licenses(unpacked: Unpacked, named: dict[str, Path], target: Path) -> None:
    """Copy the copyright file of each package that something was taken of, the licences these refer to, and a list of versions."""
    files = {"criu", *named, *(file.resolve().name for file in named.values())}
    packages = sorted({unpacked.owner[name] for name in files if name in unpacked.owner})
    target.mkdir(mode=0o755)
    texts = []
    for package in packages:
        if found := unpacked.copyright_of(package):
            _copy(found, target / package, 0o644)
            texts.append(found.read_text(errors="replace"))
    for name in sorted(set(re.findall(r"/usr/share/common-licenses/([\w.+-]*\w)", "\n".join(texts)))):
        if (unpacked.common_licenses / name).exists():
            _copy(unpacked.common_licenses / name, target / name, 0o644)
    lines = [f"{name} {unpacked.packages.get(name, '?')}" for name in packages]
    head = (
        "Packages of Debian or Ubuntu, unchanged; their sources are published there under the same names and versions."
    )
    _write(target / "PACKAGES", "\n".join([head, *lines, ""]), 0o644)


def copy(folder: Path, target: Path) -> None:
    """Copy a self-contained folder that was made elsewhere. Raises Failed (criu-incomplete), OSError."""
    loader = self_contained.loader_of(folder)
    if loader is None:
        raise Failed("criu-incomplete", f"{folder} holds no criu.bin with a loader in lib/")
    (target / self_contained.LIBRARIES).mkdir(mode=0o755, parents=True)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        place = target / file.relative_to(folder)
        if place.parent.name not in (target.name, self_contained.LIBRARIES, self_contained.LICENSES):
            continue
        place.parent.mkdir(mode=0o755, exist_ok=True)
        executable = file.name in (self_contained.WRAPPER, self_contained.BINARY, loader.name)
        _copy(file, place, 0o755 if executable else 0o644)
    target.chmod(0o755)


def check(folder: Path) -> str:
    """Return the version of the CRIU in a self-contained folder. Raises Failed: it does not start here, or is too old."""
    from checkpoint.criu.binary import Criu

    try:
        return Criu(folder / self_contained.WRAPPER).version
    except HostLacks as error:
        what = str(error.args[0]).partition("; ")[0].replace(str(folder), "the new criu")
        raise Failed(
            error.code, f"{what}; another package of criu (>= 4.2, for {os.uname().machine}) is needed"
        ) from error


def _place(unpacked: Unpacked, file: Path, target: Path, mode: int) -> None:
    """Link an unpacked file to `target`, which takes no more room on the disk; copy one of the host."""
    real = file.resolve()
    try:
        if not real.is_relative_to(unpacked.folder.resolve()):
            raise OSError(errno.EXDEV, "a file of the host")
        os.link(real, target)
    except OSError:  # another disk, or one without hard links
        _copy(real, target, mode)
        return
    with target.open("rb") as out:
        os.fsync(out.fileno())
    target.chmod(mode)


def _copy(file: Path, target: Path, mode: int) -> None:
    """Copy a file's bytes to the disk: after a power cut a renamed folder must not hold empty files."""
    with file.open("rb") as source, target.open("xb") as out:
        shutil.copyfileobj(source, out)
        out.flush()
        os.fsync(out.fileno())
    target.chmod(mode)


def _write(target: Path, text: str, mode: int) -> None:
    with target.open("x") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    target.chmod(mode)
