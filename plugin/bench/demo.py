"""`quickthaw demo` (`make demo`): the main use case with a real engine, reported as it happens.

Cold start through the lazy mount → snapshot → first answer → the snapshot is rehearsed → the engine stops → a chat request to the
proxy's port while nothing runs → restore → the answer. The demo removes everything it made, also when it is interrupted.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from launchers import ENGINES
from plugin.bench import client as measure
from plugin.bench.presets import preset
from plugin.launch import PASS_THROUGH
from plugin.options import option
from plugin.runtime.home import state_home

REHEARSED, NOT_REHEARSED = "its next restore is a fast one", ": not rehearsed ("
"""What the launch's log says of a rehearsal (plugin/rehearsal/beside.py)."""
ASK = "Which city is the capital of France? Answer in one sentence."
WORDS = {
    "mounting": "weights shown as files through the lazy mount",
    "starting": "engine process in its sandbox",
    "loading": "engine start: imports, weights, compilation",
    "warming": "warm-up requests",
    "trimming": "KV cache emptied, memory released",
    "checkpointing": "CRIU writes the process tree",
    "resuming": "the engine resumes",
    "restoring": "CRIU restores the process tree",
    "waking": "random generators reseeded",
    "verifying": "canary: the same token ids as before",
}


class Story:
    """Print events as they happen: live on a terminal, plain lines otherwise."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(highlight=False)
        self.live = self.console.is_terminal

    def say(self, text: str) -> None:
        """Print one line, unwrapped so that commands can be copied."""
        self.console.print(text, soft_wrap=True)

    @contextlib.contextmanager
    def watching(self, port: int, since: float) -> Iterator[None]:
        """Show the phases of a start while the block runs."""
        done = threading.Event()
        thread = threading.Thread(target=self._watch, args=(port, since, done), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join(5.0)

    def _watch(self, port: int, since: float, done: threading.Event) -> None:
        from rich.live import Live
        from rich.spinner import Spinner

        shown = 0
        live = Live(console=self.console, transient=True, refresh_per_second=10) if self.live else None
        with live or contextlib.nullcontext():
            while True:
                last = done.is_set()
                replica = self._replica(port)
                spans = replica["timeline"] if replica else []
                # A wake starts a new timeline; skip the old one.
                if replica and replica["phase"] not in ("asleep", "idle"):
                    for span in spans[shown:]:
                        self.console.print(
                            f"  [green]✓[/green] {span['phase']:<14}{span['took_s']:8.2f} s   [dim]{WORDS.get(span['phase'], '')}[/dim]"
                        )
                    shown = max(shown, len(spans))
                    if live and replica["phase"] != "serving":
                        text = f"{replica['phase']} {time.monotonic() - since:6.1f} s   [dim]{WORDS.get(replica['phase'], '')}[/dim]"
                        live.update(Spinner("dots", text=text))
                if last:
                    return
                done.wait(0.1)

    @staticmethod
    def _replica(port: int) -> dict[str, Any] | None:
        try:
            found = measure.status(port)["pools"][0]["replicas"][0]
            assert isinstance(found, dict)
            return found
        except (OSError, ValueError, KeyError, IndexError, http.client.HTTPException):
            return None  # not up yet, or shutting down


def chat(port: int, model: str, timeout_s: float) -> tuple[str, float, float]:
    """Run one streamed chat; return (text, seconds to the first token, total seconds). Retries for 30 s while the port is closed."""
    began = time.monotonic()
    body = json.dumps(
        {
            "model": model,
            "messages": [{"role": "user", "content": ASK}],
            "max_tokens": 24,
            "temperature": 0,
            "stream": True,
        }
    )
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
        try:
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            break
        except ConnectionRefusedError:
            connection.close()
            if time.monotonic() - began > 30:
                raise
            time.sleep(0.02)
    try:
        response = connection.getresponse()
        if response.status != 200:
            raise measure.MeasureError(f"the chat was answered with {response.status}: {response.read()[:300]!r}")
        text, first = "", 0.0
        for line in response:
            if line.startswith(b"data: {"):
                choices = json.loads(line[6:])["choices"]
                piece = choices[0]["delta"].get("content") if choices else None
                if piece and not first:
                    first = time.monotonic() - began
                text += piece or ""
        return text, first, time.monotonic() - began
    finally:
        connection.close()


@click.command(context_settings=PASS_THROUGH)
@option("--engine", type=click.Choice(list(ENGINES)), default="vllm", help="Which engine to show.")
@option(
    "--keep", is_flag=True, help="Keep the snapshot, so that `quickthaw launch --snapshot-name demo-…` restores it."
)
def demo(engine: str, keep: bool) -> int:
    """Show a cold start, a snapshot and a restore in three minutes, with a real engine and a real model.

    \b
    make demo                    installs what it needs first
    quickthaw demo --engine sglang --keep
    """
    from checkpoint.errors import CheckpointError
    from checkpoint.snapshot.library import Library

    home = state_home()
    setting = preset(engine, home)
    name, port = f"demo-{engine}", measure.free_port()
    model = str(setting.model)
    story = Story()
    library = Library(home)
    with contextlib.suppress(CheckpointError):
        library.remove(name)
    logs = Path(tempfile.mkdtemp(prefix="quickthaw-demo-"))
    options = ["--snapshot-name", name, "--rehearse", "--sleep-after", "1.5s", "--engine-python", str(setting.python)]
    argv = [
        sys.executable,
        "-m",
        "plugin.launch",
        *options,
        engine,
        *setting.arguments,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    environment = {**os.environ, **setting.environment, "QUICKTHAW_HOME": str(home)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = measure.Command(argv, environment, logs / "launch.log", Path(__file__).resolve().parents[2])
    story.say(
        f"\n[bold]1. {engine} starts cold[/bold], {setting.model.name} through the lazy mount; a chat request waits at port {port}"
    )
    failed = True
    try:
        process = command.start()
        with story.watching(port, command.began):
            cold_text, _, _ = _with_process(process, lambda: chat(port, model, 900.0))
        snapshot = library.load(name)
        story.say(f"  first answer: [italic]{cold_text.strip()!r}[/italic]\n")
        story.say(
            "[bold]2. No requests: the snapshot is rehearsed[/bold], restored once in a second sandbox, which records what a restore needs"
        )
        story.say(f"  {_rehearsed(command.log)}\n")
        story.say(
            "[bold]3. The engine is stopped[/bold] when it is idle (--sleep-after), and nothing runs behind the port"
        )
        _wait_asleep(port)
        story.say(f"  [green]✓[/green] asleep: {_engine_processes(process.pid)} engine processes\n")
        story.say(
            "[bold]4. A chat request arrives[/bold] while nothing is running; it is held, and a replica is restored"
        )
        text, first = _restored(story, process, port, model)
        story.say("[bold]5. Asleep, and another request[/bold]")
        _wait_asleep(port)
        again, second = _restored(story, process, port, model)
        same = text == again == cold_text
        _table(story, engine, snapshot, (first, second), same)
        failed = not same
    except (measure.MeasureError, OSError, CheckpointError) as error:
        story.say(f"[red]the demo failed[/red]: {error}")
        with contextlib.suppress(OSError):
            tail = (logs / "launch.log").read_text(errors="replace").splitlines()[-15:]
            story.say("\n".join(tail))
    finally:
        command.stop()
        if not keep:
            with contextlib.suppress(CheckpointError):
                library.remove(name)
        shutil.rmtree(logs, ignore_errors=True)
    if not failed:
        variables = " ".join(f"{key}={value}" for key, value in setting.environment.items())
        story.say("Try it yourself: the first start takes a snapshot, the second uses it.\n")
        words = " ".join(setting.arguments)
        story.say(
            f"  {variables} {sys.executable} -m plugin.launch --engine-python {setting.python} \\\n      {engine} {words} --port 8000",
        )
        story.say(
            "  curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\\n"
            f"""      -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'\n"""
        )
    return 1 if failed else 0


def _restored(story: Story, process: Any, port: int, model: str) -> tuple[str, float]:
    """Send a chat request to a port without a running engine; return its answer and the seconds to the first token."""
    began = time.monotonic()
    with story.watching(port, began):
        text, first, _ = _with_process(process, lambda: chat(port, model, 120.0))
    story.say(f"  answer after {first:.2f} s: [italic]{text.strip()!r}[/italic]\n")
    return text, first


def _with_process(process: Any, ask: Any) -> tuple[str, float, float]:
    try:
        found = ask()
        assert isinstance(found, tuple)
        return found
    except (OSError, http.client.HTTPException) as error:
        code = process.poll()
        if code is not None:
            raise measure.MeasureError(f"launch ended with code {code}") from error
        raise


def _rehearsed(log: Path, limit_s: float = 180.0) -> str:
    """Wait until the launch's log says what came of the rehearsal; return that as a line."""
    began = time.monotonic()
    while (took := time.monotonic() - began) < limit_s:
        text = log.read_text(errors="replace")
        if REHEARSED in text:
            return f"[green]✓[/green] rehearsed in {took:.1f} s, at the lowest priority, beside the engine"
        given_up = [line for line in text.splitlines() if NOT_REHEARSED in line]
        if given_up:
            return f"[yellow]not rehearsed[/yellow] ({given_up[-1].partition(NOT_REHEARSED)[2]}; the first restore is slower"
        time.sleep(0.1)
    return f"[yellow]not rehearsed[/yellow] within {limit_s:.0f} s; the first restore is slower"


def _wait_asleep(port: int, limit_s: float = 60.0) -> None:
    limit = time.monotonic() + limit_s
    while time.monotonic() < limit:
        if measure.status(port)["pools"][0]["replicas"][0]["phase"] == "asleep":
            return
        time.sleep(0.1)
    raise measure.MeasureError("the engine was not put to sleep")


def _engine_processes(launcher: int) -> int:
    """Return the number of processes below the launcher in a PID namespace of their own: an engine's."""
    from checkpoint.sandbox.process_tree import processes

    ours = os.readlink("/proc/self/ns/pid")
    count = 0
    for pid in processes(launcher):
        with contextlib.suppress(OSError):
            count += os.readlink(f"/proc/{pid}/ns/pid") != ours
    return count


def _table(story: Story, engine: str, snapshot: Any, restores: tuple[float, float], same: bool) -> None:
    from rich.table import Table

    table = Table(
        title=f"{engine}, {Path(snapshot.model).name}, {len(os.sched_getaffinity(0))} cores", title_justify="left"
    )
    for column in ("cold start", "first restore", "second", "ratio", "snapshot", "token ids"):
        table.add_column(column, justify="right")
    table.add_row(
        f"{snapshot.cold_s:.1f} s",
        *(f"{seconds:.2f} s" for seconds in restores),
        f"{snapshot.cold_s / max(restores):.0f} times",
        f"{snapshot.image_bytes / 1e9:.2f} GB (no {snapshot.kv_cache_bytes / 1e9:.2f} GB KV cache)",
        "identical" if same else "DIFFERENT",
    )
    story.console.print(table)
    story.say(
        "[dim]The cold start ends at the engine's first generated token, before the snapshot is taken.\n"
        "For a fair comparison with the engine alone, several runs each: quickthaw bench coldstart.[/dim]\n"
    )
