"""Unpack what `gpu.py prepare` made: python3 benchmarks/gpu_unpack.py build/gpu/ENGINE FOLDER. Standard library only.

Makes FOLDER/venv on top of the Python that runs this, whose packages (PyTorch, NumPy …) it sees, FOLDER/home with CRIU, and
FOLDER/tokenizer. What is already there stays: a second stage on the same machine begins at once.
"""

import sys
import sysconfig
import tarfile
import venv
from pathlib import Path


def unpack(carried: Path, folder: Path) -> Path:
    """Unpack into `folder`; return the interpreter there. Raises OSError, tarfile.TarError, lzma.LZMAError."""
    python = folder / "venv" / "bin" / "python"
    done = folder / "unpacked"
    if done.exists() and done.read_text() == str(carried):
        return python
    folder.mkdir(parents=True, exist_ok=True)
    venv.create(folder / "venv", clear=True, symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder / "venv"), "platbase": str(folder / "venv")}))
    with tarfile.open(carried / "site.tar.xz") as archive:
        archive.extractall(site, filter="data")
    # After the carried packages, so that those come first where both have one.
    (site / "machine.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    for name, where in (("criu", folder / "home"), ("tokenizer", folder / "tokenizer")):
        where.mkdir(parents=True, exist_ok=True)
        with tarfile.open(carried / f"{name}.tar.xz") as archive:
            archive.extractall(where, filter="tar")
    done.write_text(str(carried))
    return python


if __name__ == "__main__":
    print(unpack(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).absolute()))
