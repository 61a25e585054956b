"""Loaders that read past the page cache, over a mount and over the plain directory: O_DIRECT, fastsafetensors, Run:ai's streamer.

    python benchmarks/lazyfs_loaders.py --runs 3                    makes an environment with the loaders (CPU torch), and removes it
    python benchmarks/lazyfs_loaders.py --environment ~/loaders     makes it there, or uses the one that is there

The model lies on a disk (--scratch) and in no page cache before each load. The plain directory holds the very file that the mounts
serve, complete in the cache. Each load runs in a new process; the clock begins after its imports and ends with the last tensor, in
memory of the CPU. The bytes of all tensors are compared. Kinds alternate; medians of `--runs` are printed, and their least and greatest.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The benchmark lazyfs.py is called like the package: its folder must not come first.
sys.path[:] = [str(ROOT), *[p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]]

from lazyfs.api import import_directory, mount  # noqa: E402
from plugin.runtime.signals import unwind  # noqa: E402
from tests.kits.lazyfs.models import make_model  # noqa: E402

PACKAGES = ["torch==2.13.0", "numpy", "safetensors", "fastsafetensors==0.5.0", "runai-model-streamer==0.17.1"]
LIMIT_S = 900
LOAD = r"""
import hashlib, json, mmap, os, sys, threading, time
how, path = sys.argv[1:3]
tensors = {}
if how.startswith("O_DIRECT"):
    size, at, lock = os.path.getsize(path), [0], threading.Lock()
    whole = mmap.mmap(-1, -(-size // 4096) * 4096)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    def go():
        while True:
            with lock:
                start, at[0] = at[0], at[0] + (8 << 20)
            if start >= size:
                return
            got = start
            while got < min(size, start + (8 << 20)):
                n = os.preadv(fd, [memoryview(whole)[got:start + (8 << 20)]], got)
                assert n > 0
                got += n
    began = time.perf_counter()
    threads = [threading.Thread(target=go) for _ in range(int(how.split()[1]))]
    [t.start() for t in threads]; [t.join() for t in threads]
    took = time.perf_counter() - began
    digest = hashlib.blake2b(memoryview(whole)[:size]).hexdigest()
else:
    import torch
    if how.startswith("fastsafetensors"):
        from fastsafetensors import SafeTensorsFileLoader
        began = time.perf_counter()
        loader = SafeTensorsFileLoader(None, device="cpu", nogds=True)
        loader.add_filenames({0: [path]})
        buffers = loader.copy_files_to_device()
        tensors = {name: buffers.get_tensor(name) for name in loader.get_keys()}
        took = time.perf_counter() - began
    elif how == "runai_streamer":
        from runai_model_streamer import SafetensorsStreamer
        began = time.perf_counter()
        with SafetensorsStreamer() as streamer:
            streamer.stream_file(path)
            # Each is valid until the next one only.
            tensors = {name: tensor.clone() for name, tensor in streamer.get_tensors()}
        took = time.perf_counter() - began
    else:
        from safetensors.torch import load_file
        began = time.perf_counter()
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        took = time.perf_counter() - began
    found = hashlib.blake2b()
    for name in sorted(tensors):
        found.update(name.encode()); found.update(tensors[name].contiguous().view(torch.uint8).numpy())
    digest = found.hexdigest()
print(json.dumps({"took": took, "digest": digest}))
"""
KINDS = ["safetensors (mmap)", "O_DIRECT 1 thread", "O_DIRECT 4 threads"]
KINDS += ["fastsafetensors", "fastsafetensors buffered", "runai_streamer"]
WHERE: dict[str, dict[str, object]] = {
    "plain directory": {},
    "passed through": {},
    "raw, not passed through": {"native": "off"},
    "pyfuse3": {"transport": "pyfuse3"},
}


@contextlib.contextmanager
def environment(folder: Path | None) -> Iterator[Path]:
    """Return the Python of an environment with the loaders, made if it is not there; without `folder` it is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="qt-loaders-") as scratch:
        where = folder or Path(scratch) / "venv"
        python = where / "bin" / "python"
        if not python.exists():
            print(f"installing {', '.join(PACKAGES)}", file=sys.stderr)
            subprocess.run([sys.executable, "-m", "venv", where], check=True, timeout=LIMIT_S)
            subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], check=True, timeout=LIMIT_S)
        yield python


def forget(path: Path) -> None:
    """Drop a file's pages from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load(python: Path, how: str, path: Path) -> tuple[float, str]:
    """Return the seconds of one load, and the digest of what was loaded."""
    variables = {**os.environ, "FASTSAFETENSORS_ODIRECT": "0"} if how.endswith("buffered") else dict(os.environ)
    done = subprocess.run(
        [python, "-c", LOAD, how, path], env=variables, stdout=subprocess.PIPE, text=True, timeout=LIMIT_S, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    return found["took"], found["digest"]


def measure(python: Path, scratch: Path, megabytes: int, runs: int) -> None:
    os.environ["QUICKTHAW_HOME"] = str(scratch / "home")
    model = make_model(scratch / "model", megabytes=megabytes)
    digest = import_directory(model)
    settings: dict[str, object] = {"use_origin": False, "cache_dir": scratch / "cache", "record": "never"}
    with mounted(digest, scratch, settings) as where:
        (where / "model.safetensors").read_bytes()
    data = max((scratch / "cache").glob("images/*/*/data"), key=lambda path: path.stat().st_size)
    size = data.stat().st_size
    (scratch / "plain").mkdir()
    os.link(data, scratch / "plain" / "model.safetensors")
    took: dict[tuple[str, str], list[float]] = {}
    digests: dict[str, set[str]] = {}
    for _ in range(runs):
        for how in KINDS:
            for title, more in WHERE.items():
                with contextlib.ExitStack() as stack:
                    folder = scratch / "plain"
                    if title != "plain directory":
                        folder = stack.enter_context(mounted(digest, scratch, {**settings, **more}))
                    forget(data)
                    seconds, found = load(python, how, folder / "model.safetensors")
                took.setdefault((how, title), []).append(seconds)
                digests.setdefault("O_DIRECT" if how.startswith("O_DIRECT") else "tensors", set()).add(found)
    assert all(len(found) == 1 for found in digests.values()), f"bytes differ: {digests}"
    print(f"{size / 1e6:.0f} MB, median of {runs}: GB/s (of the plain directory; least to greatest of the runs)")
    for how in KINDS:
        plain = statistics.median(took[how, "plain directory"])
        for title in WHERE:
            times = took[how, title]
            speed = size / statistics.median(times) / 1e9
            spread = f"{size / max(times) / 1e9:.2f} to {size / min(times) / 1e9:.2f}"
            print(f"{how:26} {title:24} {speed:6.2f}  ({plain / statistics.median(times):.2f}; {spread})", flush=True)


@contextlib.contextmanager
def mounted(digest: str, scratch: Path, settings: dict[str, object]) -> Iterator[Path]:
    handle = mount(digest, scratch / "mnt", **settings)
    try:
        yield handle.mountpoint
    finally:
        handle.unmount(force=True)


def main() -> None:
    unwind()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, help="folder of the environment with the loaders")
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--scratch", type=Path, help="a folder on the disk to measure  [default: the one for temporary files]"
    )
    given = parser.parse_args()
    with environment(given.environment) as python, tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
        measure(python, Path(scratch), given.megabytes, given.runs)


if __name__ == "__main__":
    main()
