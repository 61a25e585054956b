"""Compare the bytes of a snapshot in the store with those of a naive dump of the same engine, in one command.

    python benchmarks/small.py [--engine vllm|sglang] [--model DIR] [--home DIR] [--json]

Naive: the engine as it stands after its warm-up, dumped untrimmed (`--no-trim`: with the KV cache, without garbage collection) and
uncompressed. Ours: the same engine trimmed, `snapshot push` to an empty store, at the level of a disk and of
a link. Both are taken here, one after the other, by `quickthaw launch` (two cold starts: minutes). Target: a quarter, for vLLM with
SmolLM2.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT), *[p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]]

from checkpoint.snapshot.library import Library  # noqa: E402
from checkpoint.store.archive import LEVEL_LOCAL, LEVEL_REMOTE, open_chunks, push  # noqa: E402
from plugin.bench import client as measure  # noqa: E402
from plugin.bench.presets import preset  # noqa: E402
from plugin.runtime.config import state_home  # noqa: E402
from plugin.runtime.signals import unwind  # noqa: E402

TARGET = 0.25
LIMIT_S = 900.0


def take(engine: str, model: Path | None, home: Path, name: str, *options: str) -> None:
    """A cold start that leaves the snapshot `name` in `home`."""
    port, one = measure.free_port(), preset(engine, state_home(), model)
    argv = [
        sys.executable,
        "-m",
        "plugin.launch",
        "--engine-python",
        str(one.python),
        "--snapshot-name",
        name,
        *options,
    ]
    argv += [engine, *one.arguments, "--host", "127.0.0.1", "--port", str(port)]
    env = {**os.environ, **one.environment, "QUICKTHAW_HOME": str(home)}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    command = measure.Command(argv, env, home / f"{name}.log", ROOT)
    process = command.start()
    try:
        measure.waiting_client(port, str(one.model), command.began, LIMIT_S, process)
    finally:
        command.stop()


def bytes_of(folder: Path) -> int:
    """Bytes that the folder's files occupy (holes of shared memory are not counted)."""
    return sum(f.lstat().st_blocks * 512 for f in folder.rglob("*") if f.is_file() and not f.is_symlink())


def compare(engine: str, model: Path | None, home: Path) -> dict[str, Any]:
    """Both dumps, and what the store holds of the second; bytes."""
    library = Library(home)
    take(engine, model, home, "naive", "--no-restore", "--no-trim")
    naive = bytes_of(library.path("naive"))
    library.remove("naive")
    take(engine, model, home, "small", "--no-restore")
    small = library.load("small")
    found: dict[str, Any] = {
        "engine": engine,
        "naive": naive,
        "folder": bytes_of(library.path("small")),
        "kv_cache_left_out": small.kv_cache_bytes,
        "stored": {},
    }
    for level in (LEVEL_LOCAL, LEVEL_REMOTE):
        store = home / f"store-{level}"
        push(library.path("small"), open_chunks(f"file://{store}", level))
        found["stored"][level] = bytes_of(store)
    return found


def show(found: dict[str, Any]) -> None:
    naive = found["naive"]

    def row(what: str, size: int, note: str = "") -> None:
        print(f"{what:<48}{size / 1e6:>9.1f} MB{size / naive:>8.3f} of naive  {note}".rstrip())

    print(f"{found['engine']}")
    row("naive dump: not trimmed, not compressed", naive)
    row("snapshot folder", found["folder"], f"without {found['kv_cache_left_out'] / 1e6:.0f} MB of empty KV cache")
    for level, size in found["stored"].items():
        row(
            f"in the store, zstd level {level}",
            size,
            f"target {TARGET}: {'met' if size / naive <= TARGET else 'missed'}",
        )


def main() -> None:
    """Run and print."""
    unwind()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["vllm", "sglang"], default="vllm")
    parser.add_argument("--model", type=Path)
    parser.add_argument(
        "--home", type=Path, help="Where the snapshots are made (about 7 GB).  [default: a folder in $QUICKTHAW_HOME]"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    parent = options.home or state_home()
    parent.mkdir(parents=True, exist_ok=True)
    home = Path(tempfile.mkdtemp(prefix="bench-small-", dir=parent))
    try:
        for shared in ("criu", "compile"):
            (home / shared).symlink_to(state_home() / shared)
        found = compare(options.engine, options.model, home)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    print(json.dumps(found, indent=1)) if options.json else show(found)


if __name__ == "__main__":
    main()
