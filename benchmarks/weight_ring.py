"""Measure the ring of excluded weights (plugin/runtime/weight_ring): how fast it fills, and how fast an engine takes from it.

    python benchmarks/weight_ring.py MODEL [--runs 5] [--threads N] [--json]             any Python with quickthaw: the fill rate
    ENGINE_PYTHON benchmarks/weight_ring.py MODEL --device cuda [--runs 5] [--json]      one with torch: to the device as well
    python benchmarks/weight_ring.py MODEL --cold 2 [--runs 5] [--json]       with files that are not in the page cache
    python benchmarks/weight_ring.py --engine sglang [--runs 5] [--json]      restores of a real engine with and without it

MODEL is a folder of safetensors files, which are read once before. All ways alternate in one run; the figures are medians in GB/s:

- one: one thread reads all files into one buffer.
- threads: as many threads as the ring has, each with a buffer of its own.
- ring: the ring, with a reader that frees each slot at once.
- device: from the ring into tensors on the device, by the engine's own code: `taken` with all slots filled before, as after a
  restore; `pinned` the same bytes from one pinned slot, which no ring can beat; `record` is the search for the layout.

With --cold: seconds until every slot was taken by a reader that begins so many seconds after the ring, as after a restore: `ahead`,
and `ring`, one that brings nothing beyond its slots into the page cache meanwhile.

With --engine: the demo's engine of `make setup` with the demo's model. The figures are seconds from the command to the first
token of a waiting request, restored from a snapshot without weights: `ring`, and `own`, the engine's own reload.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT), *[p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]]

from plugin.engine import weights  # noqa: E402
from plugin.runtime.phases import PhaseTracker  # noqa: E402
from plugin.runtime.weight_ring import layout  # noqa: E402
from plugin.runtime.weight_ring.feed import WeightFeed  # noqa: E402
from plugin.runtime.weight_ring.ring import SLOT_BYTES, THREADS, Ring, Source  # noqa: E402

STREAM_LIMIT_S = 60.0
COLD_LIMIT_S, RESTORE_LIMIT_S = 900.0, 120.0


def files_of(model: Path) -> list[Path]:
    """Return the weight files of a model folder. Raises SystemExit if there are none."""
    found = sorted(model.glob("*.safetensors"))
    if not found:
        raise SystemExit(f"{model} has no safetensors files")
    return found


def read(files: list[Path], threads: int) -> float:
    """Read all files, in pieces of a slot, with private buffers; return GB/s."""
    pieces = [(file, at) for file in files for at in range(0, file.stat().st_size, SLOT_BYTES)]
    pieces.reverse()

    def work() -> None:
        buffer = memoryview(bytearray(SLOT_BYTES))
        opened: dict[Path, int] = {}
        while pieces:
            try:
                file, at = pieces.pop()
            except IndexError:
                break  # another thread took the last
            if file not in opened:
                opened[file] = os.open(file, os.O_RDONLY)
            os.preadv(opened[file], [buffer], at)
        for fd in opened.values():
            os.close(fd)

    began = time.monotonic()
    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(file.stat().st_size for file in files) / (time.monotonic() - began) / 1e9


def fill(files: list[Path], threads: int) -> float:
    """Read all files through a ring whose reader frees each slot at once; return GB/s."""
    sources = {number: Source(file, file.stat().st_size) for number, file in enumerate(files)}
    segments = [(number, 0, file.stat().st_size) for number, file in enumerate(files)]
    began = time.monotonic()
    ring = Ring(sources, segments, threads=threads)
    ring.start()
    for number in range(ring.count):
        if not ring.wait_filled(number, STREAM_LIMIT_S):
            raise SystemExit(f"the ring does not fill: {ring.error}")
        ring.free(number)
    took = time.monotonic() - began
    ring.close()
    return ring.total / took / 1e9


def fill_rates(model: Path, runs: int = 5, threads: int | None = None) -> dict[str, float]:
    """Return median GB/s of `one`, `threads` and `ring` (see the module) for a model in the page cache."""
    files = files_of(model)
    wanted = threads or min(THREADS, os.cpu_count() or 1)
    read(files, 1)
    ways: dict[str, Callable[[], float]] = {
        "one": lambda: read(files, 1),
        "threads": lambda: read(files, wanted),
        "ring": lambda: fill(files, wanted),
    }
    found: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(runs):
        for way, measure in ways.items():
            found[way].append(measure())
    return {way: statistics.median(rates) for way, rates in found.items()}


class _Unwarmed(Ring):
    """A ring that reads nothing beyond its slots."""

    def _warm(self) -> None:
        self._leave()


def cold_seconds(model: Path, wait_s: float, runs: int = 5) -> dict[str, float]:
    """Return median seconds by `ahead` and `ring` (see the module) for a model on a disk, dropped from the page cache each time."""
    files, found = files_of(model), {"ahead": list[float](), "ring": list[float]()}
    for _ in range(runs):
        for way, kind in (("ahead", Ring), ("ring", _Unwarmed)):
            sources = {number: Source(file, file.stat().st_size) for number, file in enumerate(files)}
            for source in sources.values():
                os.posix_fadvise(source.fd, 0, 0, os.POSIX_FADV_DONTNEED)
            ring = kind(sources, [(number, 0, file.stat().st_size) for number, file in enumerate(files)])
            ring.start()
            time.sleep(wait_s)
            began = time.monotonic()
            for number in range(ring.count):
                if not ring.wait_filled(number, STREAM_LIMIT_S):
                    raise SystemExit(f"the ring does not fill: {ring.error}")
                ring.free(number)
            found[way].append(time.monotonic() - began)
            ring.close()
    return {way: statistics.median(seconds) for way, seconds in found.items()}


def device_rates(model: Path, device: str = "cuda", runs: int = 5) -> dict[str, float]:
    """Load a model's tensors onto a device, record their layout, lose them, and take them from the ring; return median GB/s.

    `record`: the search for the layout, byte by byte. `taken`: from the engine's call until every byte is on the device, with
    the ring filled before. `pinned`: a plain copy of as many bytes from one pinned slot. `bytes`: of the weights. Needs torch
    and safetensors. Raises SystemExit if the bytes that come back differ.
    """
    import torch
    from safetensors.torch import load_file

    where = torch.device(device)
    tensors = [tensor.to(where) for file in files_of(model) for tensor in load_file(file).values()]
    holder = torch.nn.Module()
    holder.held = torch.nn.ParameterList([torch.nn.Parameter(tensor, requires_grad=False) for tensor in tensors])
    expected = [_sum(tensor) for tensor in tensors]
    total = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    slot = torch.empty(SLOT_BYTES, dtype=torch.uint8, pin_memory=where.type == "cuda")
    target = torch.empty(SLOT_BYTES, dtype=torch.uint8, device=where)
    found: dict[str, list[float]] = {"record": [], "taken": [], "pinned": []}
    with tempfile.TemporaryDirectory() as folder:
        control, snapshot = Path(folder, "control"), Path(folder, "snapshot")
        control.mkdir()
        os.environ["QUICKTHAW_CONTROL_DIR"] = str(control)
        for _ in range(runs):
            began = time.monotonic()
            weights.record([holder], [str(model)])
            found["record"].append(total / (time.monotonic() - began))
            kept = layout.collect(control)
            if isinstance(kept, str):
                raise SystemExit(kept)
            shutil.rmtree(snapshot, ignore_errors=True)
            (snapshot / layout.FOLDER).mkdir(parents=True)
            for name, file in kept.items():
                shutil.copyfile(file, snapshot / name)
            for tensor in tensors:
                tensor.zero_()
            found["taken"].append(total / _take(holder, snapshot, control, where))
            if [_sum(tensor) for tensor in tensors] != expected:
                raise SystemExit("the weights differ from those that were recorded")
            _synchronize(where)
            began = time.monotonic()
            for _ in range(-(-total // SLOT_BYTES)):
                target.copy_(slot, non_blocking=True)
            _synchronize(where)
            found["pinned"].append(-(-total // SLOT_BYTES) * SLOT_BYTES / (time.monotonic() - began))
    return {way: statistics.median(rates) / 1e9 for way, rates in found.items()} | {"bytes": total}


def restore_seconds(engine: str, runs: int = 5) -> dict[str, list[float]]:
    """Return seconds to the first token by `ring` and `own`, of `runs` restores each, in turn. The first restore of all, by `own`,
    records the working set and does not count. Raises MeasureError.
    """
    from checkpoint.snapshot.library import Library
    from plugin.bench.client import Command, free_port, waiting_client
    from plugin.bench.presets import preset
    from plugin.runtime.config import state_home
    from plugin.runtime.weight_ring.feed import OFF

    chosen, name, found = preset(engine, state_home()), "weight-ring-benchmark", {"ring": [], "own": []}
    library = Library(state_home())
    texts = set()

    def start(way: str, limit_s: float) -> float:
        port = free_port()
        argv = [
            sys.executable,
            "-m",
            "plugin.launch",
            "--no-rehearse",
            "--weights",
            "excluded",
            "--snapshot-name",
            name,
        ]
        argv += [
            "--engine-python",
            str(chosen.python),
            engine,
            *chosen.arguments,
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ]
        env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"} | chosen.environment
        command = Command(argv, env, Path(folder, "log"), ROOT)
        if library.has(name):
            (library.path(name) / OFF).unlink(missing_ok=True) if way == "ring" else (library.path(name) / OFF).touch()
        process = command.start()
        try:
            answer = waiting_client(port, str(chosen.model), command.began, limit_s, process)
        finally:
            command.stop()
        if limit_s == COLD_LIMIT_S:
            return answer.first_s
        texts.add(answer.text)
        if ("GB taken in" in command.log.read_text()) != (way == "ring"):
            raise SystemExit(f"not restored by {way}:\n{command.log.read_text()[-2000:]}")
        return answer.first_s

    with tempfile.TemporaryDirectory() as folder:
        try:
            start("own", COLD_LIMIT_S)
            start("own", RESTORE_LIMIT_S)
            for _ in range(runs):
                for way, seconds in found.items():
                    seconds.append(start(way, RESTORE_LIMIT_S))
        finally:
            if library.has(name):
                library.remove(name)
    if len(texts) != 1:
        raise SystemExit(f"the answers differ: {texts}")
    return found


def _take(holder: Any, snapshot: Path, control: Path, where: Any) -> float:
    with WeightFeed(PhaseTracker()) as feed:
        if not feed.begin(snapshot, "", None) or feed.ring is None or not feed.ring.wait_ahead(STREAM_LIMIT_S):
            raise SystemExit("the ring does not fill")
        feed.offer(control)
        _synchronize(where)
        began = time.monotonic()
        if not weights.refill([holder]):
            raise SystemExit(next(control.glob("*.refilled")).read_text())
        _synchronize(where)
        return time.monotonic() - began


def _sum(tensor: Any) -> int:
    import torch

    return int(tensor.view(torch.uint8).sum(dtype=torch.int64)) if tensor.dim() else int(tensor.item() * 1e6)


def _synchronize(where: Any) -> None:
    if where.type == "cuda":
        import torch

        torch.cuda.synchronize(where)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument(
        "--engine", choices=("vllm", "sglang"), help="restores of this engine with and without the ring"
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", help="measure into tensors on this device, too")
    parser.add_argument(
        "--cold", type=float, help="seconds between the ring's begin and its reader's, with a cold page cache"
    )
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if given.engine:
        seconds = restore_seconds(given.engine, given.runs)
        if given.json:
            print(json.dumps(seconds))
        for way, some in seconds.items() if not given.json else ():
            print(f"{given.engine} {way:5} {statistics.median(some):.2f} s ({min(some):.2f} - {max(some):.2f})")
        return
    if given.model is None:
        parser.error("MODEL or --engine is required")
    if given.cold is not None:
        cold = cold_seconds(given.model, given.cold, given.runs)
        print(json.dumps(cold) if given.json else "\n".join(f"cold {way:5} {some:.2f} s" for way, some in cold.items()))
        return
    found = {"fill": fill_rates(given.model, given.runs, given.threads)}
    if given.device:
        found["device"] = device_rates(given.model, given.device, given.runs)
    if given.json:
        print(json.dumps(found))
        return
    for part, rates in found.items():
        for way, rate in rates.items():
            print(f"{part:7} {way:8} {rate / 1e9:6.2f} GB" if way == "bytes" else f"{part:7} {way:8} {rate:6.2f} GB/s")


if __name__ == "__main__":
    main()
