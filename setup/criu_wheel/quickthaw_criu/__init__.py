"""CRIU with every library it needs and the loader of the libc it was built for; `path()` is the program.

quickthaw finds it by itself (checkpoint.criu.self_contained) and starts the binary by the loader, without the wrapper.
"""

from pathlib import Path


def path() -> Path:
    """Return the program: a shell script that starts criu.bin by lib/ld-linux-*.so.*."""
    return Path(__file__).resolve().parent / "criu"
