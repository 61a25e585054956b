"""Measure an engine in standby: how long a wake takes to the first token, and a switch of two models behind one port.

Each command takes its own snapshots in a temporary state folder (one or two cold starts), runs all ways side by side in
one run, and compares every answer. Figures and dates: docs/measurements.md.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import click

from checkpoint.sandbox.process_tree import processes
from checkpoint.snapshot.library import Library
from plugin.bench import client as measure
from plugin.bench.presets import Preset, preset
from plugin.records import wake_times
from plugin.runtime.config import state_home
from tests.kits.memory_kit import mapped_pages

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 900.0
BUSY_LIMIT_S = 10.0
TOKENS = 8
PROMPTS = tuple(f"{word} is a word, and the next one is" for word in ("River", "Window", "Paper", "Garden", "Winter"))
ENGINE = click.option("--engine", type=click.Choice(["sglang", "vllm"]), default="sglang", show_default=True)


@contextlib.contextmanager
def fresh_home(kept: Path | None = None) -> Iterator[Path]:
    """A state folder of this run alone, or the folder `kept`, which stays; with this machine's CRIU and compile caches."""
    parent = state_home()
    home = kept or Path(tempfile.mkdtemp(prefix="bench-standby-", dir=parent))
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        for shared in ("criu", "compile"):
            (parent / shared).mkdir(mode=0o700, exist_ok=True)
            if not (home / shared).exists():
                (home / shared).symlink_to(parent / shared)
        yield home
    finally:
        if kept is None:
            shutil.rmtree(home, ignore_errors=True)


@contextlib.contextmanager
def running(home: Path, one: Preset, name: str, words: list[str]) -> Iterator[measure.Command]:
    """Run a command of quickthaw with its state in `home`, and stop it at the end."""
    env = {**os.environ, **one.environment, "QUICKTHAW_HOME": str(home)}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    command = measure.Command([sys.executable, "-m", "plugin", *words], env, home / f"{name}.log", ROOT)
    command.start()
    try:
        yield command
    finally:
        command.stop()


def launch_words(one: Preset, model: Path, name: str, port: int, *options: str) -> list[str]:
    """A launch of the preset's engine with another model."""
    arguments = [str(model) if word == str(one.model) else word for word in one.arguments]
    words = ["launch", "--engine-python", str(one.python), "--snapshot-name", name, "--weights", "included", *options]
    return [*words, one.engine, *arguments, "--host", "127.0.0.1", "--port", str(port)]


def act(port: int, name: str, action: str) -> None:
    """Move a model by hand, as `quickthaw wake|standby|sleep` does; again while the end of its last start is under way."""
    limit = time.monotonic() + BUSY_LIMIT_S
    while True:
        connection = HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
        connection.request("POST", f"/-/models/{name}/{action}")
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        if answer.status == 200:
            return
        if answer.status != 503 or '"busy"' not in text or time.monotonic() > limit:
            raise click.ClickException(f"{action} of {name}: {answer.status} {text}")
        time.sleep(0.01)


def ask(port: int, model: str, prompt: str) -> measure.FirstToken:
    """One streamed completion, timed from before its connection."""
    return measure.stream_completion(port, model, time.monotonic(), TOKENS, LIMIT_S, prompt)


def fresh_prompt(numbers: Iterator[int] = itertools.count()) -> str:  # noqa: B008 - one sequence for the whole run
    """A prompt that no prefix cache holds: a wake drops the cache, and the warm request beside it must not profit from one."""
    return f"Number {next(numbers)} {random.randrange(10**6)} is a number, and the next one is"


def spread(values: list[float]) -> str:
    """Median and range in milliseconds."""
    found = [value * 1e3 for value in values]
    return f"{statistics.median(found):8.1f} ms ({min(found):.1f} – {max(found):.1f}, {len(found)} runs)"


@click.command()
@ENGINE
@click.option("--runs", default=10, show_default=True)
@click.option("--rest", default=1.0, show_default=True, help="Seconds in standby before each wake.")
def wake(engine: str, runs: int, rest: float) -> None:
    """From standby to the first token, beside a warm first token and a restore, alternating in one run."""
    one = preset(engine, state_home())
    with fresh_home() as home:
        port = measure.free_port()
        model = str(one.model)
        with running(home, one, "wake", launch_words(one, one.model, "wake", port)) as command:
            assert command.process is not None
            measure.waiting_client(port, model, command.began, LIMIT_S, command.process)
            wait_serving(port)
            expected = {prompt: ask(port, model, prompt).text for prompt in PROMPTS}
            warm: list[float] = []
            found: dict[str, list[float]] = {"standby": [], "sleep": []}
            entering: list[float] = []
            shared: list[int] = []
            for run in range(runs):
                for way, took in found.items():
                    if way == "sleep" and run >= max(3, runs // 3):
                        continue
                    ask(port, model, fresh_prompt())
                    warm.append(ask(port, model, fresh_prompt()).first_s)
                    began = time.monotonic()
                    act(port, "default", way)
                    if way == "standby":
                        entering.append(time.monotonic() - began)
                        time.sleep(rest)
                        root = measure.status(port)["pools"][0]["replicas"][0]["pid"]
                        shared.append(mapped_pages(processes(root))[0])
                    prompt = PROMPTS[run % len(PROMPTS)]
                    answer = ask(port, model, prompt)
                    took.append(answer.first_s)
                    check(answer.text, expected[prompt], f"after {way}")
        images = Library(home).load("wake").image_bytes
        print(f"{engine}, first token of {TOKENS}, {runs} runs, every answer as before")
        print(f"warm                     {spread(warm)}")
        print(f"from standby             {spread(found['standby'])}")
        print(f"from a restore           {spread(found['sleep'])}")
        more = statistics.median(found["standby"]) - statistics.median(warm)
        print(f"standby above warm       {more * 1e3:8.1f} ms (target: at most 50)")
        print(f"the way to standby       {spread(entering)}")
        print(f"the wake, by the launch  {spread([wake['seconds'] for wake in rests(home)])}")
        print_memory(rests(home), images)
        print(f"shared with its file     {statistics.median(shared) / 1e6:8.0f} MB in the page cache")


def rests(home: Path) -> list[dict[str, Any]]:
    """What the launches of this run recorded of each wake from standby."""
    return [json.loads(line) for line in (home / wake_times.FILE).read_text().splitlines()]


def print_memory(wakes: list[dict[str, Any]], images: int) -> None:
    """Print what was held in standby, of anonymous and shared memory and swap; target: no more than the snapshot's images."""
    held = [wake["memory_bytes"] for wake in wakes if wake["memory_bytes"]]
    most = f"{max(held) / 1e6:.0f} MB at most; target: at most the snapshot's images, {images / 1e6:.0f} MB"
    print(f"memory in standby        {statistics.median(held) / 1e6:8.0f} MB ({most})")


def wait_serving(port: int) -> None:
    """Wait until every replica serves: the first answer comes before the snapshot is taken."""
    while any(r["phase"] != "serving" for p in measure.status(port)["pools"] for r in p["replicas"]):
        time.sleep(0.1)


def wait_listening(port: int) -> None:
    """Wait until a proxy answers, and no longer than 30 s."""
    limit = time.monotonic() + 30.0
    while True:
        try:
            measure.status(port)
        except OSError:
            if time.monotonic() > limit:
                raise
            time.sleep(0.05)
        else:
            return


def check(got: str, wanted: str, when: str) -> None:
    """Raise ClickException for a wrong answer."""
    if got != wanted:
        raise click.ClickException(f"wrong answer {when}: {got!r}, not {wanted!r}")


def other_model(source: Path, target: Path) -> Path:
    """A model of the same size whose answers differ: the weights of its last norm are moved by one."""
    if target.exists():
        return target
    target.mkdir()
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            shutil.copyfile(file, target / file.name)
        else:
            (target / file.name).symlink_to(file)
    (weights,) = target.glob("*.safetensors")
    with weights.open("r+b") as data:
        (size,) = struct.unpack("<Q", data.read(8))
        start, end = json.loads(data.read(size))["model.norm.weight"]["data_offsets"]
        data.seek(8 + size + start)
        norm = data.read(end - start)
        data.seek(8 + size + start)
        data.write(norm[2:] + norm[:2])
    return target


@click.command()
@ENGINE
@click.option("--switches", default=50, show_default=True)
@click.option(
    "--starts", default=2, show_default=True, help="Switches by stopping and starting the engine, as llama-swap does."
)
@click.option(
    "--home",
    "kept",
    type=click.Path(path_type=Path),
    help="A state folder that stays; the next run with it takes no snapshots.",
)
def switch(engine: str, switches: int, starts: int, kept: Path | None) -> None:
    """A switch of two models behind one port: from standby, by a restore, and by stopping and starting the engine."""
    one = preset(engine, state_home())
    with fresh_home(kept) as home:
        models = {"one": one.model, "two": other_model(one.model, home / "two")}
        expected = {name: cold_answers(home, one, name, folder) for name, folder in models.items()}
        if not switches:
            return
        if any(expected["one"][prompt] == expected["two"][prompt] for prompt in PROMPTS):
            raise click.ClickException("both models give the same answer, so no wrong one would be seen")
        found = {
            "standby": measured_switches(home, one, models, expected, "standby", switches),
            "restored": measured_switches(home, one, models, expected, "restored", max(10, switches // 5)),
            "started": measured_switches(home, one, models, expected, "started", starts),
        }
        print(f"{engine}, first token of {TOKENS} after a switch, every answer by the right model")
        if found["started"][0]:
            print(
                f"alone     {spread([found['started'][0].pop(0)])}: the engine's own start, nothing to be stopped before"
            )
        for way, (took, warm) in found.items():
            if took:
                above = statistics.median(took) - statistics.median(warm)
                print(f"{way:<10}{spread(took)}; warm {spread(warm)}; above warm {above * 1e3:.0f} ms")
        print("target from standby: at most 100 ms above warm, at the median")
        print_memory(rests(home), min(Library(home).load(name).image_bytes for name in models))


def cold_answers(home: Path, one: Preset, name: str, folder: Path) -> dict[str, str]:
    """Take the snapshot of a model, unless the state folder has it; return its answers to the prompts."""
    file = home / f"answers-{name}.json"
    if file.exists():
        return dict(json.loads(file.read_text()))
    port = measure.free_port()
    with running(home, one, f"cold-{name}", launch_words(one, folder, name, port)) as command:
        assert command.process is not None
        measure.waiting_client(port, str(folder), command.began, LIMIT_S, command.process)
        wait_serving(port)
        found = {prompt: ask(port, str(folder), prompt).text for prompt in PROMPTS}
    file.write_text(json.dumps(found))
    return found


def measured_switches(
    home: Path, one: Preset, models: dict[str, Path], expected: dict[str, dict[str, str]], way: str, count: int
) -> tuple[list[float], list[float]]:
    """Switch `count` times; return the first tokens after a switch, and the warm ones between, in seconds.

    Of the way `started` the first is the start of an engine beside which none is awake.
    """
    if not count:
        return [], []
    lines = ["max_awake: 1", "min_awake: 0", "models:"]
    for name, folder in models.items():
        if way == "started":
            words = [str(folder) if word == str(one.model) else word for word in one.arguments]
            module = "sglang.launch_server" if one.engine == "sglang" else "vllm.entrypoints.openai.api_server"
            line = f'command: "exec {one.python} -m {module} {" ".join(words)} --host 127.0.0.1 --port ${{PORT}}"'
        else:
            line = f"snapshot: {name}" + (", standby_after: 1h" if way == "standby" else "")
        lines.append(f'  {name}: {{{line}, served_name: "{folder}"}}')
    config = home / f"{way}.yaml"
    config.write_text("\n".join(lines) + "\n")
    port = measure.free_port()
    took: list[float] = []
    warm: list[float] = []
    words = ["proxy", "--config", str(config), "--listen", f"127.0.0.1:{port}", "--hold-timeout", "15m"]
    with running(home, one, f"proxy-{way}", words) as command:
        assert command.process is not None
        for name in models if way != "started" else ():  # a first restore records its working set
            measure.waiting_client(port, name, command.began, LIMIT_S, command.process)
            for _ in range(3):
                ask(port, name, fresh_prompt())
        if way == "started":
            wait_listening(port)
        names = list(models)
        for number in range(count + (way == "started")):
            name, prompt = names[number % 2], PROMPTS[number % len(PROMPTS)]
            answer = ask(port, name, prompt)
            took.append(answer.first_s)
            check(answer.text, expected[name][prompt], f"after switch {number} ({way})")
            ask(port, name, fresh_prompt())
            warm.append(ask(port, name, fresh_prompt()).first_s)
    return took, warm
