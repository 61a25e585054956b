"""`quickthaw bench coldstart`: the headline number, measured side by side in one run.

The baseline is the engine alone, as its own user would start it, with warm page and compile caches. `--kinds` can add a
cold start through quickthaw (lazy mount, sandbox, proxy, no snapshot), which shows the overhead where a restore is not
possible.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click

from launchers import ENGINES
from launchers import engine as launcher_of
from plugin.bench import client as measure
from plugin.bench.page_cache import PageCache
from plugin.bench.presets import Preset, preset
from plugin.launch import PASS_THROUGH
from plugin.options import Duration, option, using
from plugin.runtime.home import state_home

KINDS = ("alone", "cold", "restored")
MEANING = {
    "alone": "the engine alone, plain directory, warm page and compile caches",
    "cold": "cold start through quickthaw: lazy mount, sandbox, proxy; no snapshot",
    "restored": "restored from its snapshot behind the proxy",
}


@dataclass
class Series:
    """The runs of one kind, in seconds from the command to the first token."""

    first_s: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Return median and spread, and the median of every phase."""
        return {
            "runs_s": [round(value, 4) for value in self.first_s],
            "median_s": round(statistics.median(self.first_s), 4),
            "min_s": round(min(self.first_s), 4),
            "max_s": round(max(self.first_s), 4),
            "phases_s": {phase: round(statistics.median(values), 4) for phase, values in self.phases.items()},
        }


@dataclass
class Bench:
    """One comparison: how to build the commands, and where their logs go."""

    preset: Preset
    name: str
    logs: Path
    limit_s: float
    launch_options: tuple[str, ...] = ()

    def page_cache(self) -> PageCache:
        """Return a tracker of everything that any kind reads: engine environment, model, quickthaw's state and code, standard library."""
        ours, library = Path(__file__).resolve().parents[2], Path(os.__file__).parent
        return PageCache(
            {state_home(), self.preset.python.parent.parent, self.preset.model, Path(sys.prefix), ours, library}
        )

    def command(self, kind: str, port: int, run: str) -> measure.Command:
        """Return the command of a kind, listening on `port`."""
        environment = {
            **os.environ,
            **self.preset.environment,
            "QUICKTHAW_HOME": str(state_home()),  # a relative one means this process's folder
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "QUICKTHAW_REHEARSE": "0",  # it would run beside the next measurement
        }
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        cwd = Path(__file__).resolve().parents[2]
        if kind == "alone":
            module = {"vllm": "vllm.entrypoints.openai.api_server", "sglang": "sglang.launch_server"}[
                self.preset.engine
            ]
            argv = [
                str(self.preset.python),
                "-m",
                module,
                *self.preset.arguments,
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
            ]
            return measure.Command(argv, environment, self.logs / f"{kind}-{run}.log", self.logs)
        how = {"cold": ["--no-restore", "--no-snapshot"], "restored": []}[kind]
        argv = [
            sys.executable,
            "-m",
            "plugin.launch",
            "--snapshot-name",
            self.name,
            "--engine-python",
            str(self.preset.python),
            *how,
        ]
        argv += [
            *self.launch_options,
            self.preset.engine,
            *self.preset.arguments,
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ]
        return measure.Command(argv, environment, self.logs / f"{kind}-{run}.log", cwd)

    def run(self, kind: str, run: str, series: Series | None) -> measure.FirstToken:
        """Run one start to the end of its answer and record it in `series`. Raises MeasureError with the log's path."""
        port = measure.service_port() if kind == "restored" else measure.free_port()
        command = self.command(kind, port, run)
        try:
            process = command.start()
            answer = measure.waiting_client(port, str(self.preset.model), command.began, self.limit_s, process)
            if series is not None:
                series.first_s.append(answer.first_s)
                series.texts.append(answer.text)
                if kind != "alone":
                    self._phases(port, kind, series)
            return answer
        except measure.MeasureError as error:
            raise measure.MeasureError(f"{kind} run {run}: {error}; its log is {command.log}") from error
        finally:
            command.stop()

    @staticmethod
    def _phases(port: int, kind: str, series: Series) -> None:
        replica = measure.status(port)["pools"][0]["replicas"][0]
        names = [span["phase"] for span in replica["timeline"]]
        if kind == "restored" and "restoring" not in names:
            raise measure.MeasureError("it started cold instead of restoring")
        for span in replica["timeline"]:
            series.phases.setdefault(span["phase"], []).append(span["took_s"])


def compare(bench: Bench, kinds: tuple[str, ...], runs: int, report: Any) -> dict[str, Any]:
    """Warm up each kind (the first also takes the snapshot), then run the kinds in turn. Return all measurements as plain data."""
    from checkpoint.snapshot.library import Library

    series = {kind: Series() for kind in kinds}
    cache = bench.page_cache()
    for kind in kinds:
        report(f"warming up: {MEANING[kind]}")
        bench.run(kind, "warm-up", None)
        if kind == "restored":
            # The first run took the snapshot; this one records its working set. The timed runs are like every later restore.
            report("warming up: the first restore, which records the working set")
            bench.run(kind, "recording", None)
            report("warming up: the second restore, which saves the plan of the next")
            bench.run(kind, "noting", None)
        cache.remember()
    for index in range(runs):
        for kind in kinds:
            cache.read_again()
            answer = bench.run(kind, str(index + 1), series[kind])
            report(f"run {index + 1} of {runs}: {kind} {answer.first_s:.2f} s to the first token")
    found: dict[str, Any] = {
        "engine": bench.preset.engine,
        "model": bench.preset.model.name,
        "cores": len(os.sched_getaffinity(0)),
        "kinds": {kind: MEANING[kind] for kind in kinds},
        **{kind: one.summary() for kind, one in series.items()},
        "answers_equal": len({text for one in series.values() for text in one.texts}) == 1,
        "answer": next(iter(series.values())).texts[0],
    }
    if "restored" in kinds:
        snapshot = Library(state_home()).load(bench.name)
        found["image_bytes"] = snapshot.image_bytes
        found["kv_cache_bytes_left_out"] = snapshot.kv_cache_bytes
        for base in ("alone", "cold"):
            if base in kinds:
                found[f"ratio_to_{base}"] = round(found[base]["median_s"] / found["restored"]["median_s"], 1)
        # `quickthaw plan` reads the cold and restored lead times from here.
        found.setdefault("cold", found.get("alone"))
    return found


@click.group()
def bench() -> None:
    """Measure kinds of starts in turn, in one run.

    \b
    quickthaw bench coldstart --engine vllm --runs 5
    """


@bench.command(context_settings=PASS_THROUGH)
@using(
    option("--engine", type=click.Choice(list(ENGINES)), required=True, help="Which engine to measure."),
    option(
        "--model",
        type=click.Path(path_type=Path, exists=True, file_okay=False),
        show_default="the demo's",
        help="Model directory.",
    ),
    option(
        "--engine-python",
        type=click.Path(path_type=Path, exists=True),
        show_default="make setup's",
        help="The engine's interpreter.",
    ),
    option("--runs", type=click.IntRange(1, 100), default=5, help="Timed starts of each kind."),
    option("--kinds", default="alone,restored", help="Which starts, in turn: alone, cold, restored."),
    option("--limit", "limit_s", type=Duration(0.1), default="15m", help="How long one start may take."),
    option("--launch-option", "launch_options", multiple=True, help="An option for quickthaw launch. Repeatable."),
    option("--keep", is_flag=True, help="Keep the snapshot and the logs."),
    option("--json", "as_json", is_flag=True, help="Print JSON instead of the table."),
)
@click.argument("engine_arguments", nargs=-1, type=click.UNPROCESSED, metavar="[ENGINE-ARGS…]")
def coldstart(
    engine: str,
    model: Path | None,
    engine_python: Path | None,
    runs: int,
    kinds: str,
    limit_s: float,
    launch_options: tuple[str, ...],
    keep: bool,
    as_json: bool,
    engine_arguments: tuple[str, ...],
) -> int:
    """Cold starts against restores, each from the command to the first token of a request that was waiting.

    \b
    quickthaw bench coldstart --engine vllm --runs 5
    quickthaw bench coldstart --engine sglang --model /models/qwen --engine-python /opt/sglang/bin/python --json
    quickthaw bench coldstart --engine vllm --kinds alone,cold,restored
    """
    chosen = tuple(kind.strip() for kind in kinds.split(","))
    if not set(chosen) <= set(KINDS):
        raise click.UsageError(f"--kinds takes {', '.join(KINDS)}")
    from checkpoint.errors import NotFound
    from checkpoint.snapshot.library import Library

    model = model.absolute() if model is not None else None  # each kind runs in a folder of its own
    found = preset(engine, state_home(), model) if engine_python is None else None
    if found is None:
        flag = launcher_of(engine).model_flags[0]
        assert engine_python is not None
        if model is None:
            raise click.UsageError("--engine-python needs --model too")
        found = Preset(engine, engine_python.absolute(), model, (flag, str(model)), {})
    found = replace(found, arguments=(*found.arguments, *engine_arguments))
    name = f"bench-{engine}-{os.getpid()}"
    logs = Path(tempfile.mkdtemp(prefix="quickthaw-bench-"))
    library = Library(state_home())

    def report(text: str) -> None:
        click.echo(f"bench: {text}", err=True)

    keep_logs = keep
    try:
        result = compare(Bench(found, name, logs, limit_s, launch_options), chosen, runs, report)
    except measure.MeasureError as error:
        keep_logs = True  # the message names one
        click.echo(f"quickthaw: no-first-token: {error}", err=True)
        return 1
    finally:
        if not keep:
            with contextlib.suppress(NotFound):  # no kind has taken a snapshot
                library.remove(name)
        if not keep_logs:
            shutil.rmtree(logs, ignore_errors=True)
    click.echo(json.dumps(result, indent=1)) if as_json else _table(result, chosen, runs)
    return 0


def _table(result: dict[str, Any], kinds: tuple[str, ...], runs: int) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(
        title=f"{result['engine']} · {result['model']} · {result['cores']} cores · {runs} runs each, in turn",
        title_justify="left",
    )
    for column, justify in (("to the first token", "left"), ("median", "right"), ("spread", "right"), ("", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for kind in kinds:
        one = result[kind]
        table.add_row(kind, f"{one['median_s']:.2f} s", f"{one['min_s']:.2f} – {one['max_s']:.2f} s", MEANING[kind])
    console.print(table)
    for base in ("alone", "cold"):
        if f"ratio_to_{base}" in result:
            console.print(f"restored is [bold]{result[f'ratio_to_{base}']} times[/bold] faster than {base}")
    for kind in kinds:
        if result[kind]["phases_s"]:
            console.print(
                f"{kind}: " + ", ".join(f"{phase} {took:.2f} s" for phase, took in result[kind]["phases_s"].items())
            )
    if "image_bytes" in result:
        console.print(
            f"snapshot images {result['image_bytes'] / 1e9:.2f} GB, "
            f"without {result['kv_cache_bytes_left_out'] / 1e9:.2f} GB of empty KV cache"
        )
    console.print(
        f"answers {'identical' if result['answers_equal'] else 'DIFFERENT'} in every run: {result['answer']!r}"
    )
