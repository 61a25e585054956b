"""`standby.py rehearsal`: the first restore after a rehearsal against later ones, and requests beside a rehearsal.

Each run starts the engine cold with an empty state folder, has it take its snapshot and rehearse it beside a client that asks one request
after the other (4 tokens, as a stream, a pause of --think seconds between them), stops it, and restores it with the same command line: once
for the first time, then a few times more. With --home, which stays, only the first run starts cold; the others restore that snapshot, and
what the rehearsal before left is removed once the engine serves. A rehearsal pauses for requests; after 30 s of pauses it runs beside
them.

Targets: the first restore within 1.15 times of the later ones (from the command to the first token of a waiting request, medians); the 99th
percentile of the requests beside the rehearsal, to the first token and to the last, within 1.2 times of that without.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.first_requests import NAME
from benchmarks.switching import fresh_home
from checkpoint.snapshot import rehearsal as mark
from checkpoint.snapshot.library import Library
from plugin.bench.client import (
    Command,
    FirstToken,
    MeasureError,
    free_port,
    stream_completion,
    waiting_client,
)
from plugin.bench.presets import Preset, preset
from plugin.runtime.config import state_home

ROOT = Path(__file__).resolve().parent.parent
FIRST_TARGET, P99_TARGET = 1.15, 1.2
COLD_LIMIT_S, REHEARSED_LIMIT_S, RESTORE_LIMIT_S = 900.0, 600.0, 120.0
WARM_UP = 10
"""Requests before the rehearsal that do not count."""
BEGINS, ENDS = "rehearsing it beside the engine", "its next restore is a fast one"


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which a share of the values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


class Launches:
    """Launches of one engine in one state folder, all with the same command line."""

    def __init__(self, chosen: Preset, home: Path) -> None:
        self.preset, self.home, self.port = chosen, home, free_port()
        self.log = home / "launch.log"

    def command(self) -> Command:
        """Return the launch, not yet started."""
        chosen = self.preset
        argv = [
            sys.executable,
            "-m",
            "plugin.launch",
            "--rehearse",
            "--weights",
            "included",
            "--snapshot-name",
            NAME,
        ]
        argv += ["--engine-python", str(chosen.python), chosen.engine, *chosen.arguments]
        argv += ["--host", "127.0.0.1", "--port", str(self.port)]
        env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        env |= chosen.environment | {"QUICKTHAW_HOME": str(self.home)}
        return Command(argv, env, self.log, ROOT)

    @contextlib.contextmanager
    def running(self, limit_s: float) -> Iterator[FirstToken]:
        """Start it with a request waiting, yield the answer, and stop it."""
        command = self.command()
        process = command.start()
        try:
            yield waiting_client(self.port, str(self.preset.model), command.began, limit_s, process)
        except MeasureError as error:
            raise MeasureError(f"{error}\n{self.log.read_text(errors='replace')[-3000:]}") from error
        finally:
            command.stop()

    def ask(self) -> FirstToken:
        """Ask one request."""
        return stream_completion(self.port, str(self.preset.model), time.monotonic(), 4, 120.0)

    def said(self, words: str) -> bool:
        """Return whether the log has these words."""
        return words in self.log.read_text(errors="replace")

    def forget_rehearsal(self) -> None:
        """Remove what a rehearsal left of the snapshot."""
        folder = Library(self.home).path(NAME)
        for file in (folder / mark.FILE_NAME, Library(self.home).working_set(NAME), *folder.rglob(".verified-p*")):
            file.unlink(missing_ok=True)


def requests_beside(launches: Launches, think_s: float, without_s: float) -> dict[str, list[FirstToken]]:
    """Ask one request after the other from the beginning of the rehearsal until `without_s` after its end; return the answers."""
    found: dict[str, list[FirstToken]] = {"without": [], "beside": []}
    over = 0.0
    limit = time.monotonic() + REHEARSED_LIMIT_S
    for _ in range(WARM_UP):
        launches.ask()
    while not launches.said(BEGINS) and time.monotonic() < limit:
        time.sleep(0.02)
    while not over or time.monotonic() - over < without_s:
        if time.monotonic() > limit:
            raise MeasureError("not rehearsed in time: " + launches.log.read_text(errors="replace")[-2000:])
        before = launches.said(BEGINS)
        answer = launches.ask()
        ended = launches.said(ENDS)
        if before and not ended:
            found["beside"].append(answer)
        elif before == launches.said(BEGINS) and (ended or not before):
            found["without"].append(answer)
        over = over or (time.monotonic() if ended else 0.0)
        time.sleep(think_s)
    return found


def in_short(answers: dict[str, list[FirstToken]]) -> str:
    """Return count, median and 99th percentile, in milliseconds to the last token, without and beside a rehearsal so far."""
    rows = []
    for kind, some in answers.items():
        ends = [1e3 * one.end_s for one in some]
        if ends:
            rows.append(f"{kind} {len(ends)}: {percentile(ends, 0.5):.0f}, {percentile(ends, 0.99):.0f} ms")
    return "; ".join(rows)


def targets_met(result: dict[str, Any]) -> bool:
    """Return whether all targets were measured and reached, and every answer was the same text."""
    first: float | None = result["ratio"]
    reached = first is not None and first <= FIRST_TARGET and result["end_s"]["p99_ratio"] <= P99_TARGET
    return reached and result["texts"] == 1


@click.command()
@click.option("--engine", type=click.Choice(["sglang", "vllm"]), default="sglang")
@click.option("--runs", type=click.IntRange(1), default=3)
@click.option("--later", type=click.IntRange(0), default=2, help="Restores after the first one, in each run.")
@click.option(
    "--without", "without_s", default=40.0, show_default=True, help="Seconds of requests after each rehearsal."
)
@click.option("--home", type=click.Path(path_type=Path), help="A state folder to use and to keep.  [default: new ones]")
@click.option("--think", type=float, default=0.7, help="Seconds between an answer and the next request.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def rehearsal(
    engine: str, runs: int, later: int, think: float, without_s: float, home: Path | None, as_json: bool
) -> int:
    """Measure the first restore after a rehearsal, and what the rehearsal costs the requests beside it."""
    shared = state_home()
    chosen = preset(engine, shared)
    first: list[float] = []
    others: list[float] = []
    answers: dict[str, list[FirstToken]] = {"without": [], "beside": []}
    took: list[float] = []
    texts = set()
    for number in range(runs):
        with fresh_home(home) as state:
            launches = Launches(chosen, state)
            with launches.running(COLD_LIMIT_S) as answer:
                texts.add(answer.text)
                if launches.said("restoring"):
                    launches.forget_rehearsal()
                began = time.monotonic()
                for kind, some in requests_beside(launches, think, without_s).items():
                    answers[kind] += some
                took.append(time.monotonic() - began)
            click.echo(f"run {number + 1} of {runs}: {in_short(answers)}", err=True)
            for restore in range(1 + later if later else 0):
                with launches.running(RESTORE_LIMIT_S) as answer:
                    texts.add(answer.text)
                    (others if restore else first).append(answer.first_s)
                    if not launches.said("restoring"):
                        raise MeasureError("not restored: " + launches.log.read_text(errors="replace")[-2000:])
                    time.sleep(1.0)
        click.echo(
            f"rehearsed within {took[-1]:.0f} s of requests; first restores {first[-1:]}, later {others[-later:]}",
            err=True,
        )
    result: dict[str, Any] = {
        "engine": engine,
        "first_restore_s": first,
        "later_restores_s": others,
        "ratio": statistics.median(first) / statistics.median(others) if others else None,
        "texts": len(texts),
    }
    for name in ("first_s", "end_s"):
        by_kind = {kind: [getattr(one, name) for one in some] for kind, some in answers.items()}
        result[name] = {
            kind: {"count": len(some), **{f"p{int(100 * q)}": round(percentile(some, q), 4) for q in (0.5, 0.9, 0.99)}}
            for kind, some in by_kind.items()
        }
        result[name]["p99_ratio"] = percentile(by_kind["beside"], 0.99) / percentile(by_kind["without"], 0.99)
    if as_json:
        click.echo(json.dumps(result, indent=1))
    else:
        if others:
            shown = f"{statistics.median(first):.2f} s, later ones {statistics.median(others):.2f} s"
            click.echo(
                f"{engine}: first restore after a rehearsal {shown}: {result['ratio']:.2f} times (target {FIRST_TARGET})"
            )
        for name, words in (("first_s", "first token"), ("end_s", "last token")):
            row = result[name]
            click.echo(
                f"requests to the {words}: p50 {row['without']['p50']:.3f} s, p99 {row['without']['p99']:.3f} s "
                f"(n={row['without']['count']}); beside a rehearsal p50 {row['beside']['p50']:.3f} s, p99 "
                f"{row['beside']['p99']:.3f} s (n={row['beside']['count']}): {row['p99_ratio']:.2f} times (target {P99_TARGET})"
            )
    if result["ratio"] is None:
        click.echo("first restore after a rehearsal: not measured (--later 0), so its target is not met", err=True)
    return 0 if targets_met(result) else 1
