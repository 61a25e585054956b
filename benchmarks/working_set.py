"""Measure the targets of the working set: restores from a cold disk, an image twice as large, the requests just after a restore;
and the gain of a speculative restore.

    python benchmarks/working_set.py cold NAME [--runs 5]
    python benchmarks/working_set.py requests NAME [--runs 5]
    python benchmarks/working_set.py early NAME [--runs 5]
    python benchmarks/working_set.py doubled vllm|sglang [--runs 5] [--keep]

All use the command that a user types (`quickthaw restore`), with its proxy and its canary. NAME: see `quickthaw snapshot ls`. A snapshot
without a recorded working set is restored once more before the timed runs.

cold: first token of a waiting request with the snapshot's files in the page cache, and after they were dropped from it (POSIX_FADV_DONTNEED
on these files; prints how much of them is still cached). The engine's own files stay cached. Mark: 1.5 times.
requests: the second to the tenth request, one after the other, right after the first token; and nine more of the same, once every page
is in place. A request is 16 tokens, from the request to the last token. Mark: medians 1.5 times apart.
early: first token of a waiting request with a saved plan of this command line (checkpoint.snapshot.speculative) and without; pairs in
turn. No mark but to be faster.
doubled: takes two snapshots of one engine, a normal one and one that includes a KV cache which makes the images more than twice as large
(`--no-trim`, and the engine's own option), and restores both in turn. Mark: first tokens 10 % apart. Takes two cold starts.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT), *[p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]]

from checkpoint.errors import NotFound  # noqa: E402
from checkpoint.lazy_pages import uffd  # noqa: E402
from checkpoint.snapshot.library import Library  # noqa: E402
from plugin.bench.cli import Bench  # noqa: E402
from plugin.bench.client import Command, service_port, status, waiting_client  # noqa: E402
from plugin.bench.presets import preset  # noqa: E402
from plugin.runtime.config import state_home  # noqa: E402
from plugin.runtime.signals import unwind  # noqa: E402

LIMIT_S = 120.0
SETTLE_S = 30.0
COLD_MARK, REQUESTS_MARK, DOUBLED_MARK = 1.5, 1.5, 0.10
LARGER = {
    "vllm": ({"VLLM_CPU_KVCACHE_SPACE": "2"}, ()),
    "sglang": ({}, ("--max-total-tokens", "106496")),
}
"""Environment and arguments that make an engine's KV cache larger than the rest of its image (the last of an option given twice counts)."""


def drop(files: list[Path]) -> None:
    """Drop these files from the page cache; dirty pages are written first."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fdatasync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def read(files: list[Path]) -> None:
    """Read files into the page cache."""
    block = memoryview(mmap.mmap(-1, 8 << 20))
    for file in files:
        with file.open("rb", buffering=0) as source:
            while source.readinto(block):
                pass


def cached(files: list[Path]) -> int:
    """Return how many bytes of these files are in the page cache."""
    total = 0
    for file in files:
        address, size = uffd.map_file(str(file))
        if size:
            total += sum(page & 1 for page in uffd.cached(address, size)) * uffd.PAGE
    return total


def restored(name: str, log: Path, later: Callable[[int, str, Any], None] | None = None) -> float:
    """Return the seconds from the command to the first token of a waiting request; then call `later` with port, model and process."""
    model = Library(state_home()).load(name).model
    port = service_port()
    argv = [sys.executable, "-m", "plugin.restore", name, "--port", str(port)]
    command = Command(argv, os.environ, log, ROOT)
    process = command.start()
    try:
        answer = waiting_client(port, model, command.began, LIMIT_S, process)
        if later:
            later(port, model, process)
        return answer.first_s
    finally:
        command.stop()


def nine(port: int, model: str, process: Any) -> list[float]:
    """Send nine requests; return the seconds of each, to its last token."""
    return [waiting_client(port, model, time.monotonic(), LIMIT_S, process).end_s for _ in range(9)]


def recorded(name: str, log: Path) -> None:
    """Restore twice before the timed runs: records the working set if needed, and fills the page cache."""
    for _ in range(2):
        restored(name, log, nine)
    if not Library(state_home()).working_set(name).exists():
        raise SystemExit(f"no working set of {name} was recorded; see {log}")


def cold(options: argparse.Namespace, log: Path) -> dict[str, Any]:
    """Images cached against images on the disk."""
    folder = Library(state_home()).path(options.name)
    files = [file for file in folder.rglob("*") if file.is_file()]
    recorded(options.name, log)
    warm_s, cold_s, left = [], [], []
    for _ in range(options.runs):
        read(files)
        warm_s.append(restored(options.name, log))
        drop(files)
        left.append(cached(files))
        cold_s.append(restored(options.name, log))
    ratio = statistics.median(cold_s) / statistics.median(warm_s)
    return {
        "snapshot": options.name, "cached_s": warm_s, "cold_s": cold_s, "still_cached_bytes": max(left), "ratio": round(ratio, 3),
        "mark": COLD_MARK, "met": ratio <= COLD_MARK,
    }  # fmt: skip


def settled(port: int) -> None:
    """Wait until every page is in place: the page server has exited."""
    limit = time.monotonic() + SETTLE_S
    while any(servers()) and time.monotonic() < limit:
        time.sleep(0.1)
    if any(servers()):
        raise SystemExit("not every page was copied in time")
    status(port)


def servers() -> Iterator[int]:
    """Yield the process numbers of page servers."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            # A prestarted one has its owner's command line, and its own name (checkpoint.sandbox.prestart).
            name, line = (entry / "comm").read_text().strip(), (entry / "cmdline").read_bytes()
            if name == "quickthaw-pages" or b"checkpoint.lazy_pages.main" in line:
                yield int(entry.name)
        except OSError:
            continue


def requests(options: argparse.Namespace, log: Path) -> dict[str, Any]:
    """Compare the second to tenth request with later ones."""
    recorded(options.name, log)
    soon: list[float] = []
    warm: list[float] = []

    def later(port: int, model: str, process: Any) -> None:
        soon.extend(nine(port, model, process))
        settled(port)
        warm.extend(nine(port, model, process))

    for _ in range(options.runs):
        restored(options.name, log, later)
    ratio = statistics.median(soon) / statistics.median(warm)
    return {
        "snapshot": options.name, "second_to_tenth_s": round(statistics.median(soon), 4), "worst_s": round(max(soon), 4),
        "warm_s": round(statistics.median(warm), 4), "ratio": round(ratio, 3), "mark": REQUESTS_MARK, "met": ratio <= REQUESTS_MARK,
    }  # fmt: skip


def early(options: argparse.Namespace, log: Path) -> dict[str, Any]:
    """Compare speculative restores with others."""
    recorded(options.name, log)
    restored(options.name, log)  # the first that does not record saves its plan
    with_s, without_s = [], []
    for _ in range(options.runs):
        with_s.append(restored(options.name, log))
        for plan in (state_home() / "run").glob("next-*.json"):
            plan.unlink()
        without_s.append(restored(options.name, log))  # saves the plan for the next pair
    sooner = statistics.median(after - before for before, after in zip(with_s, without_s, strict=True))
    return {
        "snapshot": options.name, "with_s": with_s, "without_s": without_s, "median_with_s": round(statistics.median(with_s), 3),
        "median_without_s": round(statistics.median(without_s), 3), "median_sooner_s": round(sooner, 3), "mark": 0.0, "met": sooner > 0,
    }  # fmt: skip


def doubled(options: argparse.Namespace, log: Path) -> dict[str, Any]:
    """Compare an image with one more than twice as large."""
    engine, library = options.name, Library(state_home())
    usual = preset(engine, state_home())
    environment, arguments = LARGER[engine]
    large = replace(usual, arguments=(*usual.arguments, *arguments), environment={**usual.environment, **environment})
    names = {f"ws-{engine}": (usual, ()), f"ws-{engine}-large": (large, ("--no-trim",))}
    try:
        for name, (how, launch) in names.items():
            if not library.has(name):
                Bench(how, name, log.parent, 900.0, launch).run("restored", name, None)
            recorded(name, log)
        first: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(options.runs):
            for name, took in first.items():
                took.append(restored(name, log))
        sizes = [library.load(name).image_bytes for name in names]
    finally:
        for name in names if not options.keep else ():
            try:
                library.remove(name)
            except NotFound:
                pass  # it was not taken
    small_s, large_s = (statistics.median(took) for took in first.values())
    change = large_s / small_s - 1
    return {
        "engine": engine, "image_bytes": sizes, "first_token_s": list(first.values()), "change": round(change, 3), "mark": DOUBLED_MARK,
        "met": abs(change) < DOUBLED_MARK,
    }  # fmt: skip


def main() -> None:
    """Measure and print."""
    unwind()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cold", "requests", "early", "doubled"))
    parser.add_argument("name", help="a snapshot; for `doubled` an engine")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--keep", action="store_true", help="keep the two snapshots of `doubled` for the next run")
    options = parser.parse_args()
    if options.what == "doubled" and options.name not in LARGER:
        parser.error("doubled takes an engine: vllm or sglang")
    with tempfile.TemporaryDirectory(prefix="qt-working-set-") as scratch:
        way = {"cold": cold, "requests": requests, "early": early, "doubled": doubled}[options.what]
        found = way(options, Path(scratch) / "log")
    print(json.dumps(found, indent=1))
    print(f"{options.what}: {'met' if found['met'] else 'MISSED'} (mark {found['mark']})")


if __name__ == "__main__":
    main()
