"""`quickthaw snapshot …`: the commands of checkpoint.cli, and those that start an engine or need to know one: rehearse, create, key."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import TYPE_CHECKING, Any

import click
import msgspec

from checkpoint.cli import snapshot as snapshot
from plugin.launch import PASS_THROUGH, engine_options, engine_settings, interpreter_of, start_log
from plugin.options import log_options, option, stores, using

if TYPE_CHECKING:
    from plugin.runtime.config import LaunchSettings

_as_json = option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")


@snapshot.command("rehearse")
@click.argument("name")
@using(
    option("--engine-python", metavar="PYTHON", show_default="the snapshot's own", help="The engine's interpreter."),
    option("--api-key", help="The key that the engine was started with, for the canary."),
    option("--admin-api-key", help="SGLang's key for its control endpoints, if it was started with one."),
    _as_json,
    *log_options,
)
def rehearse(name: str, **options: Any) -> None:
    """Restore a snapshot once, ask it what users ask, and mark it: its first restore that somebody waits for is then a fast one.

    A launch does the same with the snapshot that it took, at the lowest priority. A snapshot that cannot be
    restored or answers otherwise is put into quarantine.

    \b
    quickthaw snapshot rehearse NAME
    """
    from checkpoint.snapshot.library import Library
    from plugin.rehearsal.rehearse import Rehearsal, named_settings
    from plugin.runtime.config import state_home

    start_log(options)
    home = state_home()
    found = Library(home).load(name)
    settings = named_settings(
        found, home, options["engine_python"] or "", api_key=options["api_key"], admin_key=options["admin_api_key"]
    )
    mark = Rehearsal(settings).run()
    if options["as_json"]:
        click.echo(json.dumps(msgspec.to_builtins(mark)))
    else:
        click.echo(f"rehearsed {name} in {mark.took_s:.1f} s: {', '.join(mark.requests)}")


def settings_of(engine: str, engine_arguments: tuple[str, ...], options: dict[str, Any], **more: Any) -> LaunchSettings:
    """Return the settings of the launch of a command. Raises Usage, and LauncherError for one that quickthaw runs as given."""
    import launchers
    from launchers import command_words
    from launchers.errors import LauncherError

    start_log(options)
    words = command_words.read((engine, *engine_arguments))
    environment = {**os.environ, **words.variables}
    python = options["engine_python"] or words.python or (interpreter_of(words.engine) if words.engine else "")
    why = words.plain or launchers.engine(words.engine).why_as_given(words.arguments, environment, python)
    if why:
        raise LauncherError(
            "run-as-given", f"{why}; no snapshot is ever taken of it; give a command that starts one engine"
        )
    return engine_settings(words, python, environment, options, use_snapshot=False, **more)


@snapshot.command("create", context_settings=PASS_THROUGH)
@using(
    *engine_options,
    *stores,
    _as_json,
    *log_options,
)
@click.argument("engine", metavar="vllm|sglang|COMMAND")
@click.argument("engine_arguments", nargs=-1, type=click.UNPROCESSED, metavar="ARGS…")
def create(engine: str, engine_arguments: tuple[str, ...], **options: Any) -> None:
    """Take the snapshot of a launch, rehearse it, push it to --snapshot-store, and exit: for images, and for CI.

    The arguments are those of `quickthaw launch`. The engine listens on no port of this host, and is ended. A snapshot
    that is there already is only rehearsed and pushed. Fails, with a code, where a launch would only go on without.

    \b
    quickthaw snapshot create vllm --model /models/llama
    quickthaw snapshot create --snapshot-store s3://bucket/quickthaw vllm --model /models/llama
    """
    settings = settings_of(
        engine,
        engine_arguments,
        options,
        strict=True,
        store_url=options["store"],
        snapshot_store=options["snapshot_store"],
        cache_limit=options["cache_limit"],
        push=options["push"],
        verify=options["verify"],
        trust_keys=options["trust_key"],
    )
    from plugin.rehearsal.create import create as make

    made = make(settings)
    if options["as_json"]:
        click.echo(json.dumps(dataclasses.asdict(made)))
        return
    pushed = "" if made.pushed_bytes is None else f", pushed ({made.pushed_bytes / 1e9:.2f} GB written)"
    how = "taken" if made.taken else "there already"
    click.echo(f"{made.name}: {how}, rehearsed ({', '.join(made.requests)}){pushed}")


@snapshot.command("key", context_settings=PASS_THROUGH)
@using(*engine_options, *log_options)
@click.argument("engine", metavar="vllm|sglang|COMMAND")
@click.argument("engine_arguments", nargs=-1, type=click.UNPROCESSED, metavar="ARGS…")
def key(engine: str, engine_arguments: tuple[str, ...], **options: Any) -> None:
    """Print the name of the snapshot that a launch with these arguments selects. Starts nothing.

    \b
    quickthaw snapshot key vllm --model /models/llama
    """
    settings = settings_of(engine, engine_arguments, options)
    from plugin.rehearsal.create import key as name_of

    click.echo(name_of(settings))
