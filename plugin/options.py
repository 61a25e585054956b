"""The vocabulary of options: name, unit, variable, default and help of each option that several commands share.

`launch`, `restore`, `proxy` and the file of `proxy --config` take these definitions, so they agree. Every option reads
the variable QUICKTHAW_NAME, after its long name. An old name works for one version more and logs the new one.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from lazyfs.cli.options import CACHE_LIMIT_HELP, CacheLimit
from lazyfs.cli.options import Duration as Duration
from lazyfs.durations import invalid as invalid
from lazyfs.durations import limit as limit
from lazyfs.durations import seconds as seconds
from plugin.runtime.signals import is_container_command

PREFIX = "QUICKTHAW_"
GRACE_S, GRACE_IN_CONTAINER_S = 30.0, 24 * 3600.0
EVERY_INTERFACE = "0.0.0.0"

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


# Types


class Limit(Duration):
    """A duration; 0 or `none` for no limit."""

    def read(self, text: str) -> float:
        """Return the limit in seconds, infinity for none. Raises ValueError."""
        return limit(text)


class Rate(click.ParamType[float]):
    """Bytes a second: a number, or one with k, M or G (powers of 1000); `none` or 0 for no limit, which is 0."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Convert to bytes a second."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([kMG]?)", "0" if value == "none" else str(value))
        if not found:
            self.fail(f"{value!r} is not a rate; write 200M or 1.5G (bytes a second), or none", param, ctx)
        return float(found[1]) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[found[2]]


class Address(click.ParamType[tuple[str, int]]):
    """An address of the form HOST:PORT; without a host it means every interface."""

    name = "host:port"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        """Convert to (host, port); an IPv6 host is in brackets."""
        if isinstance(value, tuple):
            return value
        host, colon, port = str(value).rpartition(":")
        if not colon or not port.isdecimal() or int(port) > 65535:
            self.fail(f"{value!r} is not HOST:PORT, such as 127.0.0.1:8000, [::1]:8000 or :8000", param, ctx)
        return host.strip("[]") or EVERY_INTERFACE, int(port)


class Choice(click.Choice[str]):
    """One word of several. A former word works for one version more, with a warning.

    `old`: by former word, its new one.
    """

    def __init__(self, choices: Iterable[str], *, old: Mapping[str, str]) -> None:
        super().__init__(list(choices))
        self._old = old

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the word, or the new one of a former word."""
        if value in self._old:
            name = param.opts[0] if param else ""
            _warn_renamed(f"{name} {value}".strip(), f"{name} {self._old[value]}".strip())
            value = self._old[value]
        return super().convert(value, param, ctx)


def _grace(_: click.Context, __: click.Parameter, value: float | None) -> float:
    """Return the grace in seconds. Where none was given, a container's runtime has the limit: after SIGTERM it kills in time."""
    if value is not None:
        return value
    return GRACE_IN_CONTAINER_S if is_container_command() else GRACE_S


# Options


def variable(name: str) -> str:
    """Return the variable that an option reads: `--sleep-after` and `sleep_after` give QUICKTHAW_SLEEP_AFTER."""
    return PREFIX + name.lstrip("-").replace("-", "_").upper()


def warn(text: str) -> None:
    """Print a warning to standard error."""
    click.echo(f"quickthaw: warning: {text}", err=True)


class Option(click.Option):
    """An option that reads the variable of its long name; its help shows the variable and the default.

    `old`: former long names, those of a switch as `--on/--off`. `old_variables`: former variables that no former name yields.
    """

    def __init__(
        self, param_decls: list[str], *, old: Iterable[str] = (), old_variables: Iterable[str] = (), **attributes: Any
    ) -> None:
        super().__init__(param_decls, **({"show_envvar": True, "show_default": True} | attributes))
        self._long = next(name for name in self.opts if name.startswith("--"))
        self.old = tuple(name for names in old for name in names.split("/"))
        self._old_off = {names.split("/")[1] for names in old if "/" in names}
        self._old_variables = tuple(old_variables)
        self.envvar = variable(self._long)

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Let the parser know the old names too."""
        super().add_to_parser(parser, ctx)
        for old in self.old:
            if self.is_flag:
                parser.add_option(obj=self, opts=[old], dest=old, action="store_const", const=old not in self._old_off)
            else:
                parser.add_option(
                    obj=self, opts=[old], dest=old, action="append" if self.multiple else "store", nargs=1
                )

    def consume_value(self, ctx: click.Context, opts: Any) -> tuple[Any, ParameterSource]:
        """Take a value given by an old name, with a warning. A new name that is given too takes precedence."""
        found = dict(opts)
        for old in self.old:
            if old in found:
                ignored = "; ignored here, because the new one is given too" if self.name in opts else ""
                _warn_renamed(old, self.secondary_opts[0] if old in self._old_off else self._long, ignored)
                found.setdefault(str(self.name), found[old])
        return super().consume_value(ctx, found)

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        """Return the value of the variable, or of an old one, with a warning."""
        value = super().resolve_envvar_value(ctx)
        if value is not None:
            # Kubernetes sets QUICKTHAW_PORT=tcp://… in every pod beside a service that is called quickthaw.
            return None if value.startswith("tcp://") else value
        for name in self.old_variables(ctx.command):
            if value := os.environ.get(name):
                _warn_renamed(name, str(self.envvar))
                return value
        return None

    def old_variables(self, command: click.Command) -> list[str]:
        """Return the former variables that it still reads as an option of `command`."""
        old = [*(variable(name) for name in self.old if name not in self._old_off), *self._old_variables]
        if command.name == "proxy":
            old += [variable(f"proxy-{name.lstrip('-')}") for name in (self._long, *self.old)]
        return old


def _warn_renamed(old: str, new: str, more: str = "") -> None:
    warn(f"{old} is now {new}; the next version drops the old name{more}")


option: Callable[..., Decorator] = functools.partial(click.option, cls=Option)


def using(*options: Decorator) -> Decorator:
    """Return a decorator that adds options to a command, in this order."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for one in reversed(options):
            command = one(command)
        return command

    return add


def _check_prefix(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if len(value) < 2 or not value.startswith("/") or value.endswith("/"):
        raise click.BadParameter(f"{value!r} must start with a slash, name a folder, and not end in a slash")
    return value


def _check_token(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None and not value.strip():
        raise click.BadParameter("the token is empty; leave the option out to answer clients of this host only")
    return value


def _check_paths(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    if not value:
        return ()
    from plugin.proxy.http.path_rules import canonical, check_denied

    try:
        paths = tuple(check_denied(path, str(param.name)) for path in value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    for path in paths:
        if param.name == "allow" and canonical(path.encode()).startswith("/quickthaw"):
            raise click.BadParameter(f"{path} is how quickthaw controls the engine; clients must not reach it")
    return paths


def _check_wake_on(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    if value:
        from plugin.proxy.http.path_rules import check_wake_on

        try:
            return tuple(map(check_wake_on, value))
        except ValueError as error:
            raise click.BadParameter(str(error)) from error
    return ()


WAKE_ON = (
    *("/v1", "/v2", "/api", "/inference", "/invocations", "/vertex_generate", "/generate*", "/health_generate"),
    *("/completion*", "/chat*", "/infill", "/embed*", "/predict*", "/tokenize", "/detokenize", "/apply-template"),
    *("/pooling", "/classify", "/score", "/rerank", "/encode", "/separate_reasoning", "/parse_function_call"),
    *("/open_session", "/close_session", "/*lora_adapter*", "/*weight*"),
    *("/model_info", "/get_model_info", "/server_info", "/get_server_info", "/tokenizer_info"),
)
"""What wakes an engine unless --wake-on says otherwise: what vLLM, SGLang, and other servers of models serve to clients."""

log_options = (
    option(
        "--log-level",
        type=click.Choice(["debug", "info", "warning", "error"]),
        default="info",
        help="The least severe lines that are logged, on standard error.",
    ),
    option(
        "--log-format",
        type=click.Choice(["auto", "json", "text"]),
        default="auto",
        help="auto: text at a terminal and beside an engine's own output, else JSON lines.",
    ),
    option("--quiet", is_flag=True, help="Log only warnings and errors: --log-level warning."),
)
"""Options of the log: of every command that starts an engine or serves requests."""

serving = (
    option(
        "--standby-after",
        type=Duration(),
        default="0",
        help="Freeze the engine with its memory after this time without a request; the next one continues it at once. 0: never.",
    ),
    option(
        "--sleep-after",
        type=Duration(),
        default="0",
        old=["--idle-timeout"],
        help="End the engine after this time without a request; the next request starts it again. 0: never.",
    ),
    option(
        "--wake-on",
        multiple=True,
        metavar="PATH",
        callback=_check_wake_on,
        show_default="what engines serve to clients: /v1, /generate, …",
        help="A path whose requests wake the engine and keep it awake, with all below it, or a glob. Probes do neither. Repeatable.",
    ),
    option(
        "--grace",
        type=Duration(),
        show_default="30s; in a container as long as its runtime lets it run",
        callback=_grace,
        old=["--drain"],
        help="How long requests in flight may take when the command stops, and then the engine to end.",
    ),
    option(
        "--hold-timeout",
        type=Duration(),
        show_default="from the measured starts, with a margin",
        help="How long a request may wait for the engine.",
    ),
    option(
        "--early-stream", is_flag=True, help="Answer waiting streams at once, with comments on the start's progress."
    ),
    option(
        "--upstream-timeout",
        type=Limit(),
        default="1h",
        help="How long an engine may send nothing while it answers. 0 or none: no limit.",
    ),
    option(
        "--body-timeout",
        type=Limit(),
        default="15m",
        help="How long a client may take to send one body. 0 or none: no limit.",
    ),
    option("--max-held", type=click.IntRange(min=0), default=4096, help="Requests that may wait at once."),
    option(
        "--max-held-mb",
        type=click.IntRange(min=0),
        default=256,
        help="Megabytes of waiting requests' bodies in memory.",
    ),
    option(
        "--deny",
        multiple=True,
        metavar="PATH",
        callback=_check_paths,
        help="A path of the engine that clients must not reach, nor anything below it. Repeatable.",
    ),
    option(
        "--allow",
        multiple=True,
        metavar="PATH",
        callback=_check_paths,
        help="A path that clients may reach although it is denied: by --deny, or as a control path of the engine. Repeatable.",
    ),
    option(
        "--trust-forwarded",
        is_flag=True,
        help="Keep X-Forwarded-* of the client, because it is a trusted proxy; otherwise they are replaced.",
    ),
    option(
        "--admin-token",
        callback=_check_token,
        old=["--token"],
        show_default="none; they answer clients of this host only",
        help="Token that status, metrics and the admin page require: a bearer token, or signed in with in a browser.",
    ),
    option(
        "--admin-prefix",
        default="/-",
        callback=_check_prefix,
        old=["--own-prefix"],
        help="Where the admin endpoints are: PREFIX/live, /ready, /status, /metrics, and the page PREFIX/.",
    ),
    option(
        "--admin-listen",
        type=Address(),
        old=["--own-listen"],
        help="HOST:PORT for the admin endpoints alone; they leave the public port.",
    ),
    option("--access-log", is_flag=True, help="Log every request, not only those that waited or failed."),
    *log_options,
)
"""Options of every command that serves requests: `launch`, `restore`, `proxy`. The file of `proxy --config` takes them too."""

sources = (
    option(
        "--store",
        metavar="URL",
        show_default="none: a local model is read in place",
        help="Keep the weights as chunks in this store, too; a model that is new there is imported while the engine serves.",
    ),
    option(
        "--snapshot-store",
        metavar="URL",
        help="Remote store for snapshots (streamed during a restore) and compile caches.",
    ),
    option("--cache-limit", type=CacheLimit(), default="auto", help=CACHE_LIMIT_HELP),
)
"""Options of the commands that fetch snapshots and models: where from."""

trusting = option(
    "--trust-key",
    type=click.Path(path_type=Path),
    multiple=True,
    old_variables=["QUICKTHAW_TRUST_KEYS"],
    help="Restore only snapshots that one of these keys has signed. Repeatable.",
)

stores = (
    *sources,
    option(
        "--push/--no-push",
        default=True,
        help="Push a rehearsed snapshot to --snapshot-store, in the background.",
    ),
    option(
        "--verify",
        type=click.Choice(["auto", "always", "never"]),
        default="auto",
        help="Which digests to verify before a restore: of changed files, all, none.",
    ),
    trusting,
)
"""Options of the commands that restore or make snapshots: where from and where to, and what is trusted."""

replica = (
    option(
        "--replicas",
        type=click.IntRange(1),
        default=1,
        help="Replicas behind the one port, each on a GPU of its own where there are several.",
    ),
    option(
        "--restore-concurrency",
        type=click.IntRange(0),
        default=0,
        old=["--restores-at-once"],
        show_default="one for every two processors",
        help="How many replicas are restored at the same time.",
    ),
    *stores,
    option(
        "--rehearse/--no-rehearse",
        default=True,
        help="Restore a new snapshot once, at the lowest priority beside the engine, so that its first real restore is a fast one.",
    ),
    option(
        "--lazy/--no-lazy",
        default=True,
        help="Restore the recorded working set first and the rest after the first token, or every page before the engine runs.",
    ),
    option(
        "--silence-timeout",
        type=Duration(),
        default="1m",
        help="Restart an engine that has requests and answers nothing for this time, not even a probe. 0: never.",
    ),
    option(
        "--suspend-before-kill",
        type=click.Choice(["auto", "always", "never"]),
        default="auto",
        help="Take an engine off the GPU before it is ended. auto: where the driver hangs otherwise (595).",
    ),
)
"""Options of the commands that run replicas: `launch` and `restore`."""


def settings_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `serving` options as keyword arguments of `plugin.proxy.settings.Settings`."""
    return {
        "hold_timeout_s": options["hold_timeout"],
        "early_stream": options["early_stream"],
        "upstream_timeout_s": options["upstream_timeout"],
        "body_total_s": options["body_timeout"],
        "max_held": options["max_held"],
        "max_held_bytes": options["max_held_mb"] << 20,
        "denied_paths": frozenset(options["deny"]),
        "allowed_paths": frozenset(options["allow"]),
        "wake_on": frozenset(options["wake_on"] or WAKE_ON),
        "trust_forwarded": options["trust_forwarded"],
        "admin_token": options["admin_token"],
        "admin_prefix": options["admin_prefix"],
        "admin_on_public_port": options["admin_listen"] is None,
        "access_log": options["access_log"],
        "drain_s": options["grace"],
    }


def replica_settings_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `replica` and `serving` options as keyword arguments of `plugin.runtime.config.LaunchSettings`."""
    return {
        "store_url": options["store"],
        "snapshot_store": options["snapshot_store"],
        "cache_limit": options["cache_limit"],
        "rehearse": options["rehearse"],
        "push": options["push"],
        "replicas": options["replicas"],
        "restore_concurrency": options["restore_concurrency"],
        "lazy_restore": options["lazy"],
        "verify": options["verify"],
        "trust_keys": options["trust_key"],
        "sleep_after_s": options["sleep_after"],
        "standby_after_s": options["standby_after"],
        "grace_s": options["grace"],
        "silence_limit_s": options["silence_timeout"],
        "suspend_before_kill": options["suspend_before_kill"],
        "proxy": settings_of(options),
        "admin_listen": options["admin_listen"],
    }


def log_level(options: Mapping[str, Any]) -> str:
    """Return the log level that --quiet and --log-level ask for."""
    return "warning" if options["quiet"] and options["log_level"] in ("debug", "info") else str(options["log_level"])


_INHERITED = ("log_level", "log_format", "quiet", "api_key")


def consume_variables(command: click.Command, environment: MutableMapping[str, str]) -> None:
    """Remove the variables of a command's options, so that commands which it starts do not read them as theirs.

    The log's level and format remain, and the engine's key, which a `quickthaw restore` needs too.
    """
    for one in command.params:
        if isinstance(one, Option) and one.name not in _INHERITED:
            for name in (str(one.envvar), *one.old_variables(command)):
                environment.pop(name, None)
