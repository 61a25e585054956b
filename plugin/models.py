"""`quickthaw ps`, `wake`, `standby` and `sleep`: see the models of a running quickthaw, and move them by hand.

They ask the admin endpoints of a `launch`, `restore` or `proxy` that runs, wherever it listens.
"""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, urlsplit

import click

from plugin.options import PREFIX, option, using

Command = Callable[..., Any]
LIMIT_S = 1800.0
"""Seconds that a move may take: a wake may be a cold start."""

_where = using(
    option(
        "--url",
        default="http://127.0.0.1:8000",
        help="Where quickthaw listens: its public port, or that of --admin-listen.",
    ),
    option("--admin-token", help="The admin token. The variable keeps it out of process lists."),
    option("--admin-prefix", default="/-", help="Where its admin endpoints are."),
)


class Refused(click.ClickException):
    """quickthaw refused, or could not be asked."""


def call(url: str, method: str, path: str, token: str | None, limit_s: float) -> dict[str, Any]:
    """Send one request to an admin endpoint and return its document. Raises Refused with the code of the answer."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise click.UsageError(f"{url!r} is not http://HOST:PORT or https://HOST:PORT")
    try:
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=limit_s)
        if parts.scheme == "https":
            context = ssl.create_default_context()
            connection = http.client.HTTPSConnection(parts.hostname, parts.port, timeout=limit_s, context=context)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            connection.request(method, parts.path.rstrip("/") + path, headers=headers)
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        document = json.loads(text)
    except (OSError, http.client.HTTPException, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        hint = f"give --url, or {PREFIX}URL"
        raise Refused(f"not-reached: no quickthaw answers at {url}; {why}; {hint}") from error
    if answer.status != 200 or not isinstance(document, dict):
        refusal = document.get("error") if isinstance(document, dict) else None
        if not isinstance(refusal, dict) or not isinstance(refusal.get("code"), str):  # an engine, or another server
            why = f"{path} answered {answer.status} there"
            raise Refused(f"not-quickthaw: no quickthaw answers at {url}; {why}; give --url and --admin-prefix")
        hint = "; quickthaw ps lists the models" if refusal["code"] == "model-not-found" else ""
        raise Refused(f"{refusal['code']}: {refusal.get('message', 'it refused')}{hint}")
    return document


@click.command()
@_where
@option("--json", "as_json", is_flag=True, help="Print the whole status document.")
def ps(url: str, admin_token: str | None, admin_prefix: str, as_json: bool) -> None:
    """List the models of a running quickthaw: the state of each, and what it holds.

    \b
    quickthaw ps
    quickthaw ps --url http://10.0.0.5:8000 --json
    """
    document = call(url, "GET", f"{admin_prefix}/status", admin_token, 30.0)
    if as_json:
        click.echo(json.dumps(document, indent=1))
        return
    rows = [("MODEL", "REPLICA", "STATE", "FOR", "MEMORY", "GPU", "REQUESTS")]
    for pool in document["pools"]:
        for replica in pool["replicas"]:
            requests = f"{replica['outstanding']} in flight, {pool['held']} waiting"
            held = (_size(replica["memory_bytes"]), _size(replica["gpu_bytes"]))
            since = f"{replica['seconds_in_phase']:.0f} s"
            rows.append((pool["name"], replica["name"], replica["phase"], since, *held, requests))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def _size(held: int | None) -> str:
    return "-" if held is None else f"{held / 1e6:.0f} MB"


def _mover(action: str, text: str) -> click.Command:
    @click.command(action, help=text)
    @click.argument("name", default="default")
    @_where
    def move(name: str, url: str, admin_token: str | None, admin_prefix: str) -> None:
        path = f"{admin_prefix}/models/{quote(name, safe='')}/{action}"
        found = call(url, "POST", path, admin_token, LIMIT_S)
        click.echo(f"{found['name']} is {found['phase']}")

    return move


wake = _mover("wake", "Wake a model, from standby, from its snapshot or cold, and wait until it serves.")
standby = _mover(
    "standby", "Freeze a model's engine with its memory, once its requests are answered. The next request continues it."
)
sleep = _mover("sleep", "End a model's engine, once its requests are answered. The next request restores it.")
