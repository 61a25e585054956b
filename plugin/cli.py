"""The `quickthaw` command: all subcommands, each loaded from its package's own `cli` only when it is called.

Only this module converts an error to an exit code: 0 done, 1 failed, 2 usage, 3 this host cannot.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import click

COMMANDS = {
    "launch": ("plugin.launch", "launch", "Start an engine with its own arguments, in about a second when it can."),
    "restore": ("plugin.restore", "restore", "Serve a replica from a named snapshot."),
    "proxy": ("plugin.proxy.cli", "proxy", "Hold requests in front of an endpoint that exists already."),
    "weights": ("lazyfs.cli", "weights", "Import, list, verify and remove models in the store."),
    "mount": ("lazyfs.cli", "mount", "Show a model of the store as files."),
    "snapshot": ("checkpoint.cli", "snapshot", "List, inspect, verify, move and remove snapshots."),
    "plan": ("capacity.cli", "plan", "How many replicas and idle GPUs to hold, and what a faster restore is worth."),
    "doctor": ("plugin.doctor", "doctor", "What this host can do, and what to do about what it cannot."),
    "bench": ("plugin.bench.cli", "bench", "Measure cold starts against restores, side by side."),
    "demo": ("plugin.bench.demo", "demo", "The whole story in three minutes, with a real engine."),
}
EXIT_FAILED, EXIT_USAGE, EXIT_HOST = 1, 2, 3


class LazyGroup(click.Group):
    """A group that imports a command's module when it is called; the one-line help texts are in `COMMANDS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order that a new user needs them, not alphabetically."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return the command."""
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the help from `COMMANDS`, without importing every module."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in COMMANDS.items()])


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="quickthaw", message="quickthaw %(version)s")
def cli() -> None:
    """Cold starts of vLLM and SGLang in about a second.

    \b
    quickthaw launch vllm --model DIR --port 8000     the first time cold, from then on in a second
    quickthaw doctor                                  what this host can do
    quickthaw bench coldstart --engine vllm --model DIR --engine-python PYTHON
    """


def exit_code_of(error: Exception) -> int | None:
    """Return the exit code of one of quickthaw's own errors, or None for any other exception (a defect)."""
    kinds = {type(error).__module__.partition(".")[0]} if hasattr(error, "code") else set()
    if not kinds & {"checkpoint", "launchers", "lazyfs", "capacity", "plugin"}:
        return None
    name = type(error).__name__
    if name in ("Usage", "BadModel"):
        return EXIT_USAGE
    if name == "HostLacks":
        return EXIT_HOST
    exit_code = getattr(error, "exit_code", EXIT_FAILED)
    return exit_code if isinstance(exit_code, int) and 0 < exit_code < 256 else EXIT_FAILED


def run(arguments: Sequence[str]) -> None:
    """Run one command line and exit the process with its exit code."""
    try:
        code = cli.main(list(arguments), prog_name="quickthaw", standalone_mode=False)
    except click.exceptions.Abort:
        code = 130
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 0
    except Exception as error:
        known = exit_code_of(error)
        if known is None:
            raise
        click.echo(f"quickthaw: {error}", err=True)
        code = known
    sys.exit(code if isinstance(code, int) else 0)
