"""`quickthaw snapshot …`: the commands of checkpoint.cli, and those that start an engine or need to know one: rehearse, create, key."""

from __future__ import annotations

import json
from typing import Any

import click
import msgspec

from checkpoint.cli import snapshot as snapshot
from plugin.launch import start_log
from plugin.options import log_options, option, using


@snapshot.command("rehearse")
@click.argument("name")
@using(
    option("--engine-python", metavar="PYTHON", show_default="the snapshot's own", help="The engine's interpreter."),
    option("--api-key", help="The key that the engine was started with, for the canary."),
    option("--admin-api-key", help="SGLang's key for its control endpoints, if it was started with one."),
    option("--json", "as_json", is_flag=True, help="Print JSON instead of text."),
    *log_options,
)
def rehearse(name: str, **options: Any) -> None:
    """Restore a snapshot once, ask it what users ask, and mark it: its first restore that somebody waits for is then a fast one.

    A launch does the same with the snapshot that it took, at the lowest priority. After `snapshot pull` it makes what
    does not travel with a snapshot. A snapshot that cannot be restored or answers otherwise is put into quarantine.

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
