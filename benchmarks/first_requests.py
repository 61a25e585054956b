"""`standby.py first-requests` and `standby.py pulled`: what the requests just after a restore take, each by its place.

`first-requests` takes a snapshot, rehearses it, and launches it. Each run puts the engine to sleep and asks ten requests,
one after the other, of which the first waits for the restore; then, once every page is in place, ten warm ones. It puts the
engine to sleep again, asks a full batch at the same time, all waiting for the restore, and then a warm batch. No two prompts begin alike.

Targets: the second request and each later one within 1.3 times of a warm one; the last answer of a waiting batch within 1.3 times of a warm
batch, plus the restore (first token of the first request, less a warm first token); medians.

`pulled` takes and rehearses a snapshot, pushes it to a store, and pulls it into an empty state folder over HTTP on loopback, once
a run: the first restore there, from the command to the first token of a waiting request, against the later ones. Target: within 1.15
times; medians.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click

from benchmarks.switching import ENGINE, LIMIT_S, ROOT, act, fresh_home, fresh_prompt, launch_words, running
from plugin.bench import client as measure
from plugin.bench.presets import Preset, preset
from plugin.runtime.config import state_home

TARGET, PULLED_TARGET = 1.3, 1.15
PLACES = 10
TOKENS = 8
NAME = "first-requests"
SETTLE_LIMIT_S = 60.0
"""Maximum seconds after a restore for every page to be in place."""
COUNTS_AGE_S = 1.5
"""Age in seconds of the page counters that /-/status shows, at most."""
ORIGIN = ROOT / "benchmarks" / "lazyfs_origin.py"


def quickthaw(home: Path, one: Preset, *words: str) -> str:
    """Run a command of quickthaw with its state in `home`; return its output."""
    env = {**os.environ, **one.environment, "QUICKTHAW_HOME": str(home)}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(
        [sys.executable, "-m", "plugin", *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=LIMIT_S
    )
    if done.returncode:
        raise click.ClickException(f"quickthaw {' '.join(words[:2])} failed: {done.stderr[-2000:]}")
    return done.stdout


def create(home: Path, one: Preset, *options: str) -> float:
    """Take and rehearse the snapshot, unless it is there; return the seconds of the rehearsal."""
    named = ("--engine-python", str(one.python), "--snapshot-name", NAME, "--weights", "included")
    made = json.loads(
        quickthaw(home, one, "snapshot", "create", "--json", *named, *options, one.engine, *one.arguments)
    )
    return float(made["rehearsed_s"])


def ask(port: int, model: str, began: float | None = None) -> measure.FirstToken:
    """Ask one request with a new prompt, timed from `began` or from now."""
    return measure.stream_completion(port, model, began or time.monotonic(), TOKENS, LIMIT_S, fresh_prompt())


def together(port: int, model: str, count: int) -> list[measure.FirstToken]:
    """Ask requests at the same time, all timed from the same moment."""
    began: list[float] = []
    start = threading.Barrier(count, action=lambda: began.append(time.monotonic()), timeout=LIMIT_S)

    def one(_: int) -> measure.FirstToken:
        start.wait()
        return ask(port, model, began[0])

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def pages(port: int) -> dict[str, float]:
    """Return the replica's page counters."""
    found: dict[str, float] = measure.status(port)["pools"][0]["replicas"][0]["pages"]
    return found


def settle(port: int) -> None:
    """Wait until every page is in place."""
    time.sleep(COUNTS_AGE_S)
    limit = time.monotonic() + SETTLE_LIMIT_S
    while pages(port)["left"] and time.monotonic() < limit:
        time.sleep(0.1)
    if left := pages(port)["left"]:
        raise click.ClickException(f"{left / 1e6:.0f} MB of pages were not in place in {SETTLE_LIMIT_S:.0f} s")
    time.sleep(COUNTS_AGE_S)  # the caches beside the images are written


def median(values: list[float]) -> float:
    """Return the median in seconds, in milliseconds' precision."""
    return round(statistics.median(values), 4)


@click.command("first-requests")
@ENGINE
@click.option("--runs", type=click.IntRange(1), default=5, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=64, show_default=True, help="Requests of the waiting batch.")
@click.option(
    "--home", type=click.Path(path_type=Path), help="A state folder to use and to keep.  [default: a new one]"
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def first_requests(engine: str, runs: int, batch: int, home: Path | None, as_json: bool) -> int:
    """Measure the first ten requests after a restore by their place, and a batch that waits for one."""
    one = preset(engine, state_home())
    with fresh_home(home) as state:
        took_s = create(state, one)
        port = measure.free_port()
        with running(state, one, NAME, launch_words(one, one.model, NAME, port)) as command:
            assert command.process is not None
            measure.waiting_client(port, str(one.model), command.began, LIMIT_S, command.process)
            found = measured(port, str(one.model), runs, batch)
            if "restoring" not in command.log.read_text(errors="replace"):
                raise click.ClickException("not restored: " + command.log.read_text(errors="replace")[-2000:])
    result = {"engine": engine, "runs": runs, "batch": batch, "rehearsed_s": took_s, **summary(found)}
    click.echo(json.dumps(result | {"all": found}, indent=1) if as_json else shown(result))
    return 0 if result["met"] else 1


def measured(port: int, model: str, runs: int, batch: int) -> dict[str, Any]:
    """Return the seconds of the requests: by place, warm, of the waiting batch and of the warm one."""
    found: dict[str, Any] = {
        "places": [],  # by run and place, to the last token
        "restored_first": [],  # first token of the request that waits for the restore
        "warm": [],
        "warm_first": [],
        "batch": [],  # by run, every answer's last token
        "warm_batch": [],
        "counts": [],  # of the page server, by run
    }
    settle(port)
    together(port, model, batch)  # what only a first batch does
    for number in range(runs):
        act(port, "default", "sleep")
        before = pages(port)
        soon = [ask(port, model) for _ in range(PLACES)]
        settle(port)
        after = pages(port)
        found["counts"].append({key: after[key] - before[key] for key in before})
        warm = [ask(port, model) for _ in range(PLACES)]
        act(port, "default", "sleep")
        waiting = together(port, model, batch)
        settle(port)
        warm_batch = together(port, model, batch)
        found["places"].append([answer.end_s for answer in soon])
        found["restored_first"].append(soon[0].first_s)
        found["warm"] += [answer.end_s for answer in warm]
        found["warm_first"] += [answer.first_s for answer in warm]
        found["batch"].append(sorted(answer.end_s for answer in waiting))
        found["warm_batch"].append(sorted(answer.end_s for answer in warm_batch))
        click.echo(
            f"run {number + 1} of {runs}: {' '.join(f'{answer.end_s:.2f}' for answer in soon)} s, "
            f"warm {median([answer.end_s for answer in warm]):.2f} s; "
            f"batch {found['batch'][-1][0]:.2f} to {found['batch'][-1][-1]:.2f} s, warm {found['warm_batch'][-1][-1]:.2f} s",
            err=True,
        )
    return found


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Return the medians, their ratios, and whether the targets are met."""
    places = [median([run[place] for run in found["places"]]) for place in range(PLACES)]
    warm, restored = median(found["warm"]), median(found["restored_first"])
    restore = round(restored - median(found["warm_first"]), 4)
    last, warm_last = (median([run[-1] for run in found[name]]) for name in ("batch", "warm_batch"))
    ratios = [round(place / warm, 2) for place in places]
    over = round((last - restore) / warm_last, 2)
    return {
        "places_s": places,
        "warm_s": warm,
        "ratios": ratios,
        "restore_s": restore,
        "batch_first_s": median([run[0] for run in found["batch"]]),
        "batch_last_s": last,
        "warm_batch_last_s": warm_last,
        "batch_ratio": over,
        "met": max(ratios[1:]) <= TARGET and over <= TARGET,
    }


def shown(result: dict[str, Any]) -> str:
    """Return the figures as text."""
    rows = [
        f"{result['engine']}, {TOKENS} tokens, medians of {result['runs']} restores; rehearsed in {result['rehearsed_s']:.0f} s"
    ]
    for number, (place, ratio) in enumerate(zip(result["places_s"], result["ratios"], strict=True), 1):
        against = "waits for the restore" if number == 1 else f"{ratio:.2f} times a warm one (target {TARGET})"
        rows.append(f"request {number:>2}  {place * 1e3:8.0f} ms  {against}")
    rows.append(f"warm        {result['warm_s'] * 1e3:8.0f} ms")
    rows.append(
        f"{result['batch']} waiting: first answer {result['batch_first_s']:.2f} s, last {result['batch_last_s']:.2f} s; a warm batch "
        f"{result['warm_batch_last_s']:.2f} s; restore {result['restore_s']:.2f} s: {result['batch_ratio']:.2f} times (target {TARGET})"
    )
    return "\n".join(rows)


@click.command("pulled")
@ENGINE
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True)
@click.option(
    "--later", type=click.IntRange(1), default=3, show_default=True, help="Restores after the first, each run."
)
@click.option("--home", type=click.Path(path_type=Path), help="A state folder to take the snapshot in and to keep.")
def pulled(engine: str, runs: int, later: int, home: Path | None) -> int:
    """Measure the first restore of a pulled snapshot in an empty state folder, against the later ones."""
    one = preset(engine, state_home())
    first: list[float] = []
    others: list[float] = []
    took: list[float] = []
    texts = set()
    with fresh_home(home) as made, fresh_home() as scratch:
        store = scratch / "store"
        create(made, one, "--snapshot-store", f"file://{store}")
        with loopback(store) as url:
            for number in range(runs):
                with fresh_home() as empty:
                    began = time.monotonic()
                    quickthaw(empty, one, "snapshot", "pull", NAME, url)
                    took.append(time.monotonic() - began)
                    port = measure.free_port()
                    for restore in range(1 + later):
                        with running(empty, one, NAME, launch_words(one, one.model, NAME, port)) as command:
                            assert command.process is not None
                            answer = measure.waiting_client(
                                port, str(one.model), command.began, LIMIT_S, command.process, TOKENS
                            )
                            texts.add(answer.text)
                            (others if restore else first).append(answer.first_s)
                            settle(port)
                            if "restoring" not in (log := command.log.read_text(errors="replace")):
                                raise click.ClickException("not restored: " + log[-2000:])
                click.echo(
                    f"run {number + 1} of {runs}: pulled in {took[-1]:.1f} s; first {first[-1]:.2f} s, later "
                    f"{' '.join(f'{value:.2f}' for value in others[-later:])} s",
                    err=True,
                )
    ratio = statistics.median(first) / statistics.median(others)
    click.echo(
        f"{engine}, a pulled snapshot in an empty state folder, medians: pulled in {statistics.median(took):.1f} s, first restore "
        f"{statistics.median(first):.2f} s, later ones {statistics.median(others):.2f} s: {ratio:.2f} times (target {PULLED_TARGET})"
    )
    return 0 if ratio <= PULLED_TARGET and len(texts) == 1 else 1


@contextlib.contextmanager
def loopback(store: Path) -> Iterator[str]:
    """Serve a folder over HTTP on loopback and yield its URL."""
    port = measure.free_port()
    with subprocess.Popen(
        [sys.executable, str(ORIGIN), str(store), "127.0.0.1", str(port), "0"], stdout=subprocess.PIPE
    ) as origin:
        try:
            assert origin.stdout is not None
            origin.stdout.readline()
            yield f"http://127.0.0.1:{port}"
        finally:
            origin.kill()
            shutil.rmtree(store, ignore_errors=True)
