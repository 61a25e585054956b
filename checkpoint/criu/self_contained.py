"""The folder of a self-contained CRIU: `criu` (a wrapper), `criu.bin`, and `lib/` with every library and the loader.

`quickthaw setup criu` makes one in the state folder (plugin.setup), and the wheel quickthaw-criu carries one. CRIU then
depends on nothing of the host but its kernel, whatever libc the host has.
"""

from __future__ import annotations

from pathlib import Path

WRAPPER = "criu"
BINARY = "criu.bin"
LIBRARIES = "lib"
LICENSES = "licenses"
LOADERS = "ld-linux*.so.*"
"""The dynamic loader's name in LIBRARIES: ld-linux-x86-64.so.2, ld-linux-aarch64.so.1."""
WHEEL = "quickthaw_criu"
"""The package of the wheel that `make wheels` builds."""


def loader_of(folder: Path) -> Path | None:
    """Return the loader in a self-contained folder, or None if it is no such folder."""
    return next(iter(sorted((folder / LIBRARIES).glob(LOADERS))), None) if (folder / BINARY).exists() else None


def command(program: Path) -> tuple[str, ...]:
    """Return the words that start CRIU: past the wrapper of a self-contained folder, which is a shell script and takes 5 ms."""
    folder = program.resolve().parent
    loader = loader_of(folder) if program.name == WRAPPER else None
    if loader is None:
        return (str(program),)
    return (str(loader), "--library-path", str(folder / LIBRARIES), str(folder / BINARY))


def binary(program: Path) -> Path:
    """Return the file that tells one CRIU from another: the binary behind a wrapper, else the program itself."""
    behind = program.resolve().parent / BINARY
    return behind if program.name == WRAPPER and behind.exists() else program


def from_wheel() -> Path | None:
    """Return the program that an installed wheel quickthaw-criu carries, or None. Imports nothing of it."""
    import importlib.util

    try:
        found = importlib.util.find_spec(WHEEL)
    except (ImportError, ValueError):
        return None
    for place in (found.submodule_search_locations or ()) if found else ():
        program = Path(place) / WRAPPER
        if program.exists():
            return program
    return None
