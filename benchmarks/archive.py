"""Measure the costs of verifying, pushing and pulling an existing snapshot.

    python benchmarks/archive.py ~/.cache/quickthaw/snapshots/NAME
    python benchmarks/archive.py FOLDER --levels 1 3 9 --naive-mb 3000 --restore-s 0.6 --json

A copy (hard links) is digested, verified in full and by the ledger, pushed to a store folder beside it at each level, and pulled again.
`--naive-mb`: size of an untrimmed dump, for the ratio. `--restore-s`: seconds of a restore, for verification's share.
Medians of `--runs`; the store lies on the disk of `--scratch` (default: the folder's own), which needs room for twice the snapshot.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT), *[p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]]

import msgspec  # noqa: E402

from checkpoint.inspect.contents import inspect  # noqa: E402
from checkpoint.snapshot.digests import LEDGER, digest_folder, verify  # noqa: E402
from checkpoint.store.archive import open_chunks, pull, push  # noqa: E402


def copy(source: Path, target: Path) -> None:
    """The snapshot's files again, without copying a byte; sockets are left out as an archive does."""
    for below, _, files in os.walk(source):
        folder = target / Path(below).relative_to(source)
        folder.mkdir(mode=0o700)
        for name in files:
            path = Path(below, name)
            if path.is_symlink():
                (folder / name).symlink_to(path.readlink())
            elif path.is_file() and not name.startswith(LEDGER):
                (folder / name).hardlink_to(path)


def timed(runs: int, call: Any, before: Any = None) -> tuple[float, Any]:
    """Median of seconds, and the last result."""
    took, result = [], None
    for _ in range(runs):
        if before:
            before()
        began = time.perf_counter()
        result = call()
        took.append(time.perf_counter() - began)
    return statistics.median(took), result


def measure(source: Path, scratch: Path, levels: list[int], runs: int) -> dict[str, Any]:
    """All figures of one snapshot; seconds and bytes."""
    folder = scratch / source.name
    copy(source, folder)
    found: dict[str, Any] = {}
    found["contents_s"], contents = timed(runs, lambda: inspect(folder))
    found["memory"], found["zero"], found["duplicate"] = (
        contents.total.bytes,
        contents.total.zero,
        contents.total.duplicate,
    )
    files = digest_folder(folder)
    document = {"format": 1, "name": folder.name, "files": msgspec.to_builtins(files)}
    (folder / "manifest.json").unlink(missing_ok=True)
    (folder / "manifest.json").write_bytes(msgspec.json.encode(document))
    found["bytes"] = sum(f.size for f in files.values())
    found["verify_full_s"], _ = timed(runs, lambda: verify(folder, files, always=True))
    found["verify_again_s"], again = timed(runs, lambda: verify(folder, files))
    found["hashed_again"] = again.hashed
    found["levels"] = {}
    for level in levels:
        store = scratch / f"store-{level}"
        chunks = open_chunks(f"file://{store}", level)
        push_s, pushed = timed(1, lambda chunks=chunks: push(folder, chunks))
        target = scratch / "pulled" / folder.name
        pull_s, _ = timed(
            runs,
            lambda chunks=chunks, target=target: pull(folder.name, chunks, target),
            before=lambda target=target: shutil.rmtree(target, ignore_errors=True),
        )
        found["levels"][level] = {
            "stored": pushed.stored,
            "copies": pushed.copies,
            "zero": pushed.zero,
            "push_s": push_s,
            "pull_s": pull_s,
        }
        shutil.rmtree(store)
        shutil.rmtree(scratch / "pulled")
    return found


def show(found: dict[str, Any], naive: float | None, restore: float | None) -> None:
    size = found["bytes"]
    print(f"snapshot            {size / 1e6:10.1f} MB, of which memory {found['memory'] / 1e6:.1f} MB")
    print(
        f"  zero / duplicate  {found['zero'] / 1e6:10.1f} / {found['duplicate'] / 1e6:.1f} MB   (found in {found['contents_s']:.2f} s)"
    )
    for name, key in (("verify, all bytes", "verify_full_s"), ("verify, unchanged", "verify_again_s")):
        share = f"   {found[key] / restore:6.1%} of a restore of {restore:g} s" if restore else ""
        print(f"{name:<20}{found[key] * 1000:10.1f} ms{share}")
    print(f"{'zstd level':<12}{'stored MB':>12}{'of size':>10}{'of naive':>10}{'push MB/s':>12}{'pull MB/s':>12}")
    for level, row in found["levels"].items():
        of_naive = f"{row['stored'] / 1e6 / naive:10.3f}" if naive else f"{'':>10}"
        rates = f"{size / 1e6 / row['push_s']:12.0f}{size / 1e6 / row['pull_s']:12.0f}"
        print(f"{level:<12}{row['stored'] / 1e6:12.1f}{row['stored'] / size:10.3f}{of_naive}{rates}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--naive-mb", type=float)
    parser.add_argument("--restore-s", type=float)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not (options.folder / "images").is_dir():
        parser.error(f"{options.folder} is not a snapshot: it has no images/")
    with tempfile.TemporaryDirectory(
        prefix=".bench-", dir=options.scratch or options.folder.resolve().parent
    ) as scratch:
        found = measure(options.folder.resolve(), Path(scratch), options.levels, options.runs)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        show(found, options.naive_mb, options.restore_s)


if __name__ == "__main__":
    main()
