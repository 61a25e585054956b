"""The `quickthaw` command: all subcommands, each loaded from its package's own `cli` only when it is called.

Only this module converts an error to an exit code: 0 done, 1 failed, 2 usage, 3 this host cannot.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from plugin.options import variable

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

COMMANDS = {
    "launch": ("plugin.launch", "launch", "Start an engine with its own arguments, in about a second when it can."),
    "restore": ("plugin.restore", "restore", "Serve a replica from a named snapshot."),
    "proxy": ("plugin.proxy.cli", "proxy", "Hold requests in front of an endpoint that exists already."),
    "ps": ("plugin.models", "ps", "List the models of a running quickthaw, and the state of each."),
    "wake": ("plugin.models", "wake", "Wake a model of a running quickthaw."),
    "standby": ("plugin.models", "standby", "Freeze a model with its memory; the next request continues it."),
    "sleep": ("plugin.models", "sleep", "End a model's engine; the next request restores it."),
    "weights": ("lazyfs.cli.weights", "weights", "Import, list, verify and remove models in the store."),
    "mount": ("lazyfs.cli.mount", "mount", "Show a model of the store as files."),
    "peer": ("lazyfs.cli.peer", "peer", "Serve this host's chunks of models to other hosts."),
    "cache": ("lazyfs.cli.cache", "cache", "Show and bound what this host keeps of models; fetch models ahead."),
    "warm": ("plugin.warm", "warm", "Bring a launch's snapshot and model to this host before they are needed."),
    "snapshot": ("plugin.snapshots", "snapshot", "List, inspect, verify, rehearse, move and remove snapshots."),
    "plan": ("capacity.cli", "plan", "How many replicas and idle GPUs to hold, and what a faster restore is worth."),
    "setup": ("plugin.setup.cli", "setup", "Install what quickthaw needs beside its own wheel: setup criu."),
    "doctor": ("plugin.doctor", "doctor", "Test what this host can do, and print the remedy for what it cannot."),
    "bench": ("plugin.bench.cli", "bench", "Measure cold starts against restores, side by side."),
    "demo": (
        "plugin.bench.demo",
        "demo",
        "Show a cold start, a snapshot and a restore in three minutes, with a real engine.",
    ),
    "completion": (
        "plugin.cli",
        "completion",
        "Print the script that completes quickthaw's commands and options in a shell.",
    ),
}
_UNWINDING = frozenset({"weights", "cache", "mount", "snapshot", "warm", "setup", "doctor", "bench", "demo"})
"""Commands that remove what they made when a signal ends them. `launch`, `restore` and `proxy` have handlers of their own."""
EXIT_FAILED, EXIT_USAGE, EXIT_HOST = 1, 2, 3
ACTIONS = frozenset(
    {"unmount", "force", "status", "metrics", "prefetch", "pin", "drop", "check", "contents", "picture", "from", "fix"}
)
"""Options that say what to do, not how. No variable sets them: each later command would do the same."""


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
        _show_variables(command)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete a command's name from `COMMANDS`, without importing every module."""
        from click.shell_completion import CompletionItem

        names = [
            CompletionItem(name, help=text) for name, (_, _, text) in COMMANDS.items() if name.startswith(incomplete)
        ]
        return names + click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the help from `COMMANDS`, without importing every module."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in COMMANDS.items()])


def _show_variables(command: click.Command) -> None:
    """Let every option of a command and its subcommands read the variable QUICKTHAW_NAME, and show it in the help."""
    if isinstance(command, click.Group):
        for one in command.commands.values():
            _show_variables(one)
    for option in command.params:
        if isinstance(option, click.Option) and (long := _long_name(option)) not in ACTIONS:
            option.envvar = option.envvar or variable(long)
            option.show_envvar = True


def _long_name(option: click.Option) -> str:
    return next(name for name in option.opts if name.startswith("--")).removeprefix("--")


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="quickthaw", message="quickthaw %(version)s")
def cli() -> None:
    """Cold starts of vLLM and SGLang in about a second.

    \b
    quickthaw launch vllm --model DIR --port 8000     the first time cold, from then on in a second
    quickthaw doctor                                  what this host can do
    quickthaw bench coldstart --engine vllm --model DIR --engine-python PYTHON
    """


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that completes quickthaw's commands and options in a shell.

    \b
    quickthaw completion bash > ~/.local/share/bash-completion/completions/quickthaw
    source <(quickthaw completion zsh)
    quickthaw completion fish > ~/.config/fish/completions/quickthaw.fish
    """
    from click.shell_completion import ShellComplete, get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    # The base class's method: bash's own starts a bash to ask for its version.
    click.echo(ShellComplete.source(kind(cli, {}, "quickthaw", "_QUICKTHAW_COMPLETE")))


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
    """Run one command line and exit the process with its exit code. Each error is one line on standard error."""
    if not _UNWINDING.isdisjoint(arguments[:1]):
        from plugin.runtime.signals import unwind

        unwind()
    try:
        code = cli.main(list(arguments), prog_name="quickthaw", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Abort:
        code = 130
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        code = error.exit_code
    except click.ClickException as error:
        code = _fail(_in_one_line(error), error.exit_code)
    except OSError as error:
        code = _io_failed(error)
    except Exception as error:
        known = exit_code_of(error)
        if known is None:
            raise
        code = _fail(with_code(error), known)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(text: str, code: int) -> int:
    click.echo(f"quickthaw: {text}", err=True)
    return code


def with_code(error: Exception) -> str:
    """Return the message of one of quickthaw's own errors with its code in front."""
    code, text = getattr(error, "code", ""), str(error)
    return text if text.startswith(f"{code}: ") else f"{code}: {text}"


def _in_one_line(error: click.ClickException) -> str:
    text = " ".join(error.format_message().split()).rstrip(".")
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else "quickthaw"
        return f"usage: {text}; see {command} --help"
    return text


def _io_failed(error: OSError) -> int:
    """Print an OSError and return the exit code. A reader that has closed the pipe is no failure."""
    if error.errno == errno.EMFILE:
        from plugin.proxy.descriptor_limit import TooFewFiles

        return _fail(with_code(TooFewFiles()), EXIT_FAILED)
    frames = traceback.extract_tb(error.__traceback__)
    if error.filename is None and frames[-1].name in ("echo", "run"):  # click.echo, or the flush above
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes again when it exits
        if isinstance(error, BrokenPipeError):
            return 0
        text = f"output-failed: cannot write to standard output; {error.strerror}; redirect it elsewhere"
        return _fail(text, EXIT_FAILED)
    what = f"{error.filename}; " if error.filename else ""
    return _fail(f"host-io: {what}{error.strerror or error}; quickthaw doctor checks this host", EXIT_FAILED)
