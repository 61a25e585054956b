"""Read the words after `quickthaw launch`: an engine's name and its arguments, or the command that starts it.

`vllm serve …`, `python3 -m sglang.launch_server …`, `/opt/venv/bin/vllm serve …`, `sh -c "exec vllm serve …"`: a container's
command needs one word in front of it. What is a command but none of these is run as it was given (`Words.plain`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from launchers import ENGINES
from launchers.errors import Usage
from launchers.given_options import is_option

_MODULES = {
    "vllm.entrypoints.openai.api_server": ("vllm", ""),
    "vllm.entrypoints.cli.main": ("vllm", "serve"),
    "sglang.launch_server": ("sglang", ""),
    "sglang.cli.main": ("sglang", "serve"),
}
"""Module of `python -m` → the engine, and the word that must follow."""
_OTHER_COMMANDS = {
    "vllm": frozenset(
        [
            "bench",
            "chat",
            "collect-env",
            "complete",
            "download-kernels",
            "launch",
            "openai",
            "preload",
            "run-batch",
            "snapshot",
        ]
    ),
    "sglang": frozenset(["generate", "version"]),
}
"""Commands of the engines' scripts that start no server."""
_PYTHON = r"python(\d+(\.\d+)?)?"
_SHELLS = frozenset(["sh", "bash", "dash", "ash"])
_SCRIPT_OPTION = r"-[eux]*c"
_ASSIGNMENT = r"(?s)([A-Za-z_]\w*)=(.*)"
_SYNTAX = frozenset("$`&|;<>()*?[]{}#~!\n")
_TRAMPOLINE = r"""(?m)^'''exec' "?([^"\n]+?)"? "\$0" "\$@"$"""
"""Second line of an installed script whose interpreter's path is too long for the first."""
_NESTED = 8
_HEAD_BYTES = 4096
_UNEXPANDED = r"\$\([A-Za-z_][\w.-]*\)|\$\{[A-Za-z_]\w*\}"


@dataclass(frozen=True)
class Words:
    """What a command line starts.

    `python`: the engine's interpreter, where the words tell. `variables`: those that they set. `plain`: why the command
    `given` is run as it is; "" for a server of an engine.
    """

    engine: str = ""
    arguments: tuple[str, ...] = ()
    python: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)
    plain: str = ""
    given: tuple[str, ...] = ()


class _NotSimple(Exception):
    """A shell's script is more than one simple command."""


def read(words: Sequence[str], path: str | None = None) -> Words:
    """Read a command line; programs without a slash are looked up in `path` (default: PATH).

    Raises Usage (unknown-engine, engine-script) for a first word that names neither an engine nor a program.
    """
    found = _read(words, path, 0)
    if found.plain:
        return Words(plain=found.plain, given=tuple(words))
    return found


def as_one_command(words: Sequence[str], python: str) -> tuple[str, ...]:
    """Return the command that starts an engine alone, for words that begin with an engine's name and its options.

    vLLM's `serve` is more than its server's module, but needs the distribution `vllm`, which builds of other names lack.
    """
    engine, *rest = words
    if engine not in ENGINES or rest[:1] == ["serve"]:
        return tuple(words)
    from checkpoint.compatibility.engine import package_folders

    script = engine == "vllm" and any(any(folder.glob("vllm-*.dist-info")) for folder in package_folders(Path(python)))
    modules = [name for name, (of, needed) in _MODULES.items() if of == engine and bool(needed) == script]
    return (python, "-m", modules[0], *(["serve"] if script else []), *rest)


def program_of(name: str, path: str | None = None) -> str | None:
    """Return the path of a program, or None."""
    from shutil import which  # takes 4 ms, which a launch by an engine's name need not wait for

    return which(name, path=path)


def unexpanded(words: Sequence[str]) -> tuple[str, ...]:
    """Return the words with a reference to a variable that nothing expanded, such as `$(POD_IP)` of an unset variable."""
    return tuple(word for word in words if "$" in word and re.search(_UNEXPANDED, word))


def _read(words: Sequence[str], path: str | None, depth: int) -> Words:
    first, *rest = words
    name = Path(first).name
    if first in ENGINES:
        return _of_script(first, rest, "", named=not depth)
    if name in ENGINES:
        return _of_script(name, rest, script_python(Path(first)))
    if not (program := program_of(first, path)):
        raise Usage(
            "unknown-engine", f"there is no engine and no program {first!r}; quickthaw knows {' and '.join(ENGINES)}"
        )
    if re.fullmatch(_PYTHON, name):
        return _of_python(program, rest)
    if depth < _NESTED and name == "env":
        return _of_assignments(rest, path, depth)
    if depth < _NESTED and name in _SHELLS:
        return _of_shell(name, rest, path, depth)
    return Words(plain=f"{first} is no engine that quickthaw knows")


def _of_script(engine: str, words: Sequence[str], python: str, named: bool = False) -> Words:
    """Read what follows `vllm` or `sglang`; `named`: as the name of an engine, which needs no `serve`."""
    if words and words[0] == "serve":
        return _served(engine, words[1:], python)
    other = bool(words) and words[0] in _OTHER_COMMANDS.get(engine, ()) and not Path(words[0]).exists()
    if not other and (named or asks_for_help(words)):
        return Words(engine, tuple(words), python)
    return Words(plain=f"{' '.join([engine, *words[:1]])} starts no server")


def asks_for_help(words: Sequence[str]) -> bool:
    """Return True if an engine with these arguments would print something and exit."""
    return any(word.partition("=")[0] in ("-h", "--help", "--version") for word in words)


def _served(engine: str, words: Sequence[str], python: str) -> Words:
    """Read the arguments of `serve`, or of a server's module."""
    kept: list[str] = []
    at = 0
    while at < len(words):
        head, equals, value = words[at].partition("=")
        at += 1
        if engine != "sglang" or head != "--model-type":  # `sglang serve` removes it, too
            kept.append(words[at - 1])
            continue
        if not equals and at < len(words):
            value = words[at]
            at += 1
        if value not in ("auto", "llm"):
            return Words(plain=f"--model-type {value} serves no requests for text")
    if engine == "sglang" and any((Path(word.rpartition("=")[2]) / "model_index.json").is_file() for word in kept):
        return Words(plain="a diffusion model serves no requests for text")
    return Words(engine, tuple(kept), python)


def _of_python(program: str, words: Sequence[str]) -> Words:
    """Read what follows an interpreter: `-m MODULE …`, or an engine's script."""
    words = list(words)
    while words[:1] == ["-u"]:  # every engine runs unbuffered
        del words[0]
    python = _interpreter(program)
    if len(words) > 1 and words[0] == "-m" and words[1] in _MODULES:
        engine, needed = _MODULES[words[1]]
        if needed:
            return _of_script(engine, words[2:], python)
        return _served(engine, words[2:], python)
    if words and "/" in words[0] and Path(words[0]).name in ENGINES:
        return _of_script(Path(words[0]).name, words[1:], python)
    return Words(plain=f"{' '.join([Path(program).name, *words[:2]])} is no server that quickthaw knows")


def _of_assignments(words: Sequence[str], path: str | None, depth: int, shell: bool = False) -> Words:
    """Read `NAME=VALUE … COMMAND`, as after `env`; in a `shell`, `exec` may stand before the command."""
    variables: dict[str, str] = {}
    words = list(words)
    while words and (found := re.fullmatch(_ASSIGNMENT, words[0])):
        variables[found[1]] = found[2]
        del words[0]
    if shell and words[:1] == ["exec"]:
        del words[0]
    if not words or is_option(words[0]):
        return Words(plain="the command sets its environment in a way that quickthaw does not read")
    inner = _read(words, variables.get("PATH", path), depth + 1)
    return replace(inner, variables={**variables, **inner.variables})


def _of_shell(name: str, words: Sequence[str], path: str | None, depth: int) -> Words:
    if len(words) < 2 or not re.fullmatch(_SCRIPT_OPTION, words[0]):
        return Words(plain=f"{name} runs a script that quickthaw does not read")
    try:
        return _of_assignments(_simple_command(words[1]), path, depth, shell=True)
    except _NotSimple as error:
        return Words(plain=f"the script of {name} -c is more than one simple command ({error})")
    except Usage:  # a builtin, or a program that is not there: the shell says so
        return Words(plain=f"{name} runs no engine that quickthaw knows")


def _simple_command(script: str) -> list[str]:
    """Return the words of one simple command without expansions. Raises _NotSimple with the syntax that makes it more."""
    words: list[str] = []
    word: list[str] | None = None
    quote = ""
    script = script.strip()
    at = 0
    while at < len(script):
        char, following = script[at], script[at + 1 : at + 2]
        at += 1
        if char == "\\" and quote != "'" and (not quote or following in ('"', "\\", "$", "`", "\n")):
            at += 1
            if following != "\n":  # else the line goes on
                word = [*(word or ()), following]
        elif char == quote:
            quote = ""
        elif not quote and char in ("'", '"'):
            quote, word = char, word or []
        elif not quote and char in " \t":
            if word is not None:
                words.append("".join(word))
            word = None
        elif (not quote and char in _SYNTAX) or (quote == '"' and char in "$`"):
            raise _NotSimple("several lines" if char == "\n" else char)
        else:
            word = [*(word or ()), char]
    if quote:
        raise _NotSimple(quote)
    return [*words, "".join(word)] if word is not None else words


def _interpreter(program: str) -> str:
    """Return the interpreter that a program is, or that it starts if it is a script (pyenv's, asdf's)."""
    import subprocess

    python = os.path.abspath(program)
    try:
        with open(python, "rb") as file:
            if file.read(2) != b"#!":
                return python
        asked = subprocess.run([python, "-c", "import sys; print(sys.executable)"], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return python
    return asked.stdout.decode(errors="replace").strip() or python


def script_python(script: Path) -> str:
    """Return the interpreter of an installed script. Raises Usage (engine-script) if it cannot be read or names none."""
    try:
        with script.open("rb") as file:
            head = file.read(_HEAD_BYTES).decode(errors="replace")
    except OSError as error:
        raise Usage(
            "engine-script", f"{script}: {error.strerror}; give the engine's interpreter with --engine-python"
        ) from error
    line = head.partition("\n")[0]
    words = line.removeprefix("#!").split() if line.startswith("#!") else []
    if found := re.search(_TRAMPOLINE, head):
        return found[1]
    if words and Path(words[0]).name == "env":
        words = [program_of(word) or "" for word in words[1:] if not is_option(word)][:1]
    if words and re.fullmatch(_PYTHON, Path(words[0]).name):
        return _interpreter(words[0])
    for beside in ("python", "python3"):
        if os.access(script.parent / beside, os.X_OK, effective_ids=True):
            return str((script.parent / beside).absolute())
    raise Usage("engine-script", f"{script} names no Python; give the engine's interpreter with --engine-python")
