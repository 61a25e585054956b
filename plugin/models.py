"""`quickthaw ps`, `wake`, `standby` and `sleep`: see the models of a running quickthaw, and move them by hand.

They ask the admin endpoints of a `launch`, `restore` or `proxy` that runs, wherever it listens.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
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
        help="Where quickthaw listens: its public port, that of --admin-listen, or the socket of --uds as unix:/path.",
    ),
    option("--admin-token", help="The admin token. The variable keeps it out of process lists."),
    option("--admin-prefix", default="/-", help="Where its admin endpoints are."),
)


class Refused(click.ClickException):
    """quickthaw refused, or could not be asked."""


class _UnixConnection(http.client.HTTPConnection):
    """A connection to a UNIX socket."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket's file. Raises OSError."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _connection(url: str, limit_s: float) -> tuple[http.client.HTTPConnection, str]:
    """Return a connection to a URL, and the folder before its paths. Raises UsageError, ValueError or OSError."""
    parts = urlsplit(url)
    if parts.scheme == "unix" and parts.path:
        return _UnixConnection(os.path.abspath(url.removeprefix("unix:").removeprefix("//")), limit_s), ""
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise click.UsageError(f"{url!r} is not http://HOST:PORT, https://HOST:PORT or unix:/PATH")
    if parts.scheme == "http":
        return http.client.HTTPConnection(parts.hostname, parts.port, timeout=limit_s), parts.path.rstrip("/")
    context = ssl.create_default_context()
    made = http.client.HTTPSConnection(parts.hostname, parts.port, timeout=limit_s, context=context)
    return made, parts.path.rstrip("/")


def call(url: str, method: str, path: str, token: str | None, limit_s: float) -> dict[str, Any]:
    """Send one request to an admin endpoint and return its document. Raises Refused with the code of the answer."""
    try:
        connection, folder = _connection(url, limit_s)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            connection.request(method, folder + path, headers=headers)
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
    """List the models of a running quickthaw: the state of each, what it holds, and what it costs to have it back.

    MEMORY and GPU are held now (`-`: unknown); GPU AWAKE is taken while it is awake; WAKE is how long a request would wait.

    \b
    quickthaw ps
    quickthaw ps --url http://10.0.0.5:8000 --json
    """
    document = call(url, "GET", f"{admin_prefix}/status", admin_token, 30.0)
    if as_json:
        click.echo(json.dumps(document, indent=1))
        return
    click.echo(table(document))


def table(document: dict[str, Any]) -> str:
    """Return the models of a status document as lines of text."""
    rows = [("MODEL", "REPLICA", "STATE", "FOR", "MEMORY", "GPU", "GPU AWAKE", "WAKE", "REQUESTS")]
    for pool in document["pools"]:
        wake = "-" if pool.get("wake_s") is None else f"{pool['wake_s']:.2f} s"
        for replica in pool["replicas"]:
            requests = f"{replica['outstanding']} in flight, {pool['held']} waiting"
            held = (_size(replica["memory_bytes"]), _size(replica["gpu_bytes"]))
            costs = (*held, _size(pool.get("gpu_memory_bytes")), wake)
            since = f"{replica['seconds_in_phase']:.0f} s"
            rows.append((pool["name"], replica["name"], replica["phase"], since, *costs, requests))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


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
