"""Read an engine's options as the engine will: first from the file that `--config` names, then from the command line.

`Engine.parse` (launchers/base.py) parses the whole command line; this module looks up single options. The engine itself
receives its arguments unchanged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

_Values = TypeVar("_Values")
_CONFIG_LIMIT = 1 << 20


def given_options(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Map each option (without dashes, `-` for `_`) to its last values, in the order of their last places.

    The command line overrides the file of `--config`. Of `x` and `no-x`, only the last one is there.
    """
    line = last_given(_pairs(arguments))
    written: Iterable[tuple[str, list[str]]] = ()
    for file in line.get("config", ())[:1]:
        written = _pairs(config_words(Path(file)))
    return last_given([*written, *line.items()])


def last_given(pairs: Iterable[tuple[str, _Values]]) -> dict[str, _Values]:
    """Map options to their values as argparse decides: the last place counts, of an option and of its opposite `no-…`."""
    found: dict[str, _Values] = {}
    for name, values in pairs:
        found.pop(name, None)
        found.pop(name[3:] if name.startswith("no-") else f"no-{name}", None)
        found[name] = values
    return found


def last(options: dict[str, list[str]], *names: str) -> str:
    """Return the last value of the first of these options that is given, or ""."""
    return next((options[name][-1] for name in names if options.get(name)), "")


def first(values: Sequence[str]) -> str:
    """Return the first value that is not empty, or "". Of several API keys each is accepted, and an empty one is none."""
    return next(filter(None, values), "")


def config_words(file: Path) -> list[str]:
    """Return the command-line words that both engines make of a YAML file of options.

    Empty if the file cannot be read; the engine reports that.
    """
    import yaml

    try:
        if file.stat().st_size > _CONFIG_LIMIT:
            return []
        found = yaml.safe_load(file.read_text())
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return []
    words: list[str] = []
    for key, value in found.items() if isinstance(found, dict) else ():
        if value is None or value is False:
            continue
        words.append(f"--{key}")
        if isinstance(value, list):
            words += map(str, value)
        elif value is not True:
            words.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return words


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each option with the values that follow it."""
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        if not is_option(word):
            continue
        head, equals, attached = word.partition("=")
        values = [attached] if equals else []
        while not equals and at < len(words) and not is_option(words[at]):
            values.append(words[at])
            at += 1
        yield head.lstrip("-").replace("_", "-"), values


def is_option(word: str) -> bool:
    """Return whether a word is an option, not a value such as a negative number."""
    return len(word) > 1 and word.startswith("-") and not re.fullmatch(r"-[0-9.]+(e[+-]?[0-9]+)?", word)
