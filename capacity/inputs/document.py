"""A YAML document whose values know their line and name, for errors such as `plan.yaml:12: pools[1].price: …`.

Rejects unknown and repeated keys, NaN and infinities, and converts no wrong types.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from capacity.errors import Errors, InputError
from capacity.files import read_text
from capacity.inputs.units import parse

MAX_BYTES = 32 * 1024 * 1024
Reader = Callable[["Field"], Any]
HINTS = {
    "boot": "how long an instance of this pool takes until a container can start, such as [95s, 120s]; 0s if it always runs",
    "rate": "what one replica serves at full load, such as 3.5/s",
    "gpus": "how many GPUs",
    "price": "of an instance, such as 24 $/h",
}


class Field:
    """One value of the file: `path` is its name from the root, `line` is 1-based."""

    def __init__(self, node: yaml.Node, path: str, file: str) -> None:
        self.node = node
        self.path = path
        self.file = file
        self.line: int = node.start_mark.line + 1

    def error(self, code: str, message: str) -> InputError:
        return InputError(code, message, file=self.file, line=self.line, where=self.path)

    def mapping(self, known: Iterable[str] | None = None) -> dict[str, Field]:
        """Return the entries of a mapping by key. With `known`, any other key raises InputError."""
        errors = Errors()
        found = self.entries(known, errors)
        errors.check()
        return found

    def entries(self, known: Iterable[str] | None, errors: Errors) -> dict[str, Field]:
        """Return the entries with good keys; errors of the other keys are collected."""
        if not isinstance(self.node, yaml.MappingNode):
            raise self.error("wrong-type", f"expected a mapping of names to values, found {_kind(self.node)}")
        allowed = None if known is None else set(known)
        found: dict[str, Field] = {}
        for key_node, value_node in self.node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                errors.found.append(
                    Field(key_node, self.path, self.file).error("wrong-type", "a key must be a plain word")
                )
                continue
            key = str(key_node.value)
            path = f"{self.path}.{key}" if self.path else key
            here = Field(key_node, path, self.file)
            if key_node.tag == "tag:yaml.org,2002:merge":
                text = "merge keys are not read; repeat the fields (an alias of a value is fine)"
                errors.found.append(here.error("unknown-field", text))
            elif allowed is not None and key not in allowed:
                near = difflib.get_close_matches(key, allowed, 1)
                hint = f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(sorted(allowed))}"
                errors.found.append(here.error("unknown-field", "no such field" + hint))
            elif key in found:
                text = f"given twice, first on line {found[key].line}"
                errors.found.append(here.error("repeated-field", text))
            else:
                found[key] = Field(value_node, path, self.file)
        return found

    def record(self, readers: Mapping[str, Reader], *required: str) -> dict[str, Any]:
        """Return the values of the given fields of a mapping, each converted by its reader.

        Raises InputError with all fields that are wrong, have no reader, or are missing though `required`.
        """
        errors = Errors()
        entries = self.entries(readers, errors)
        for key in required:
            if key not in entries:
                hint = HINTS.get(key, "")
                errors.found.append(self.error("missing-field", f"{key} is missing{hint and f': {hint}'}"))
        values = {key: errors.read(readers[key], value) for key, value in entries.items()}
        errors.check()
        return values

    def items(self) -> list[Field]:
        """Return the members of a list. Raises InputError if it is empty."""
        if not isinstance(self.node, yaml.SequenceNode):
            raise self.error("wrong-type", f"expected a list, found {_kind(self.node)}")
        if not self.node.value:
            raise self.error("empty", "the list is empty")
        return [Field(node, f"{self.path}[{i}]", self.file) for i, node in enumerate(self.node.value)]

    @property
    def is_mapping(self) -> bool:
        return isinstance(self.node, yaml.MappingNode)

    def scalar(self) -> object:
        if not isinstance(self.node, yaml.ScalarNode):
            raise self.error("wrong-type", f"expected one value, found {_kind(self.node)}")
        try:
            value: object = yaml.constructor.SafeConstructor().construct_object(self.node)
        except (yaml.YAMLError, ValueError) as bad:
            reason = getattr(bad, "problem", None) or bad
            raise self.error("wrong-type", f"cannot read {self.node.value!r}: {reason}") from bad
        return value

    def text(self) -> str:
        value = self.scalar()
        if not isinstance(value, str) or not value.strip():
            raise self.error("wrong-type", f"expected a word, found {value!r}")
        return value.strip()

    def stamp(self) -> datetime:
        """Return an ISO time, or the present one for `now`."""
        value = self.scalar()
        if isinstance(value, datetime):  # YAML reads times with a zone by itself, and turns them to UTC
            return value
        try:
            return datetime.now() if value == "now" else datetime.fromisoformat(str(value))
        except ValueError:
            raise self.error("bad-time", f"expected an ISO time or now, found {value!r}") from None

    def integer(self, low: int = 0, high: int = 10_000_000) -> int:
        value = self.scalar()
        if isinstance(value, float) and not math.isfinite(value):
            raise self.error("not-a-number", f"expected an integer, found {value}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value):
            raise self.error("wrong-type", f"expected an integer, found {value!r}")
        if not low <= value <= high:
            raise self.error("out-of-range", f"must be between {low} and {high}, found {value}")
        return int(value)

    def quantity(self, kind: str, low: float = 0.0, high: float = math.inf, *, open_low: bool = False) -> float:
        """Return a number in the base unit of `kind` (see units.py).

        Raises InputError outside [low, high].
        """
        said = self.scalar()
        try:
            value = parse(said, kind)
        except InputError as bad:
            raise self.error(bad.code, bad.message) from bad
        if value < low or (open_low and value == low):
            if value < 0 <= low:
                raise self.error("negative", f"must not be negative, found {value:g}")
            raise self.error("out-of-range", f"must be {'over' if open_low else 'at least'} {low:g}, found {value:g}")
        if value > high:
            if value == 1 and kind == "fraction":
                raise self.error(
                    "out-of-range", f"must be below 1, found {said}: no finite number of GPUs covers every case"
                )
            if kind == "fraction" and value <= 100:
                raise self.error(
                    "wrong-unit", f"is a fraction of at most {high:g}, found {value:g}; did you mean {value:g}%?"
                )
            raise self.error("out-of-range", f"must be at most {high:g}, found {value:g}; is the unit right?")
        return value

    def samples(self, kind: str, low: float = 0.0, high: float = math.inf) -> tuple[float, ...]:
        """Return one quantity or a list of them, as a tuple."""
        if isinstance(self.node, yaml.SequenceNode):
            return tuple(item.quantity(kind, low, high) for item in self.items())
        return (self.quantity(kind, low, high),)


def integer(low: int = 0, high: int = 10_000_000) -> Reader:
    """Return a reader of an integer in [low, high]."""
    return lambda field: field.integer(low, high)


def quantity(kind: str, low: float = 0.0, high: float = math.inf, *, open_low: bool = False) -> Reader:
    """Return a reader of a number in the base unit of `kind`."""
    return lambda field: field.quantity(kind, low, high, open_low=open_low)


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return f"{node.value!r}" if node.value else "nothing"


def read(path: Path) -> Field:
    """Return the root of a YAML file. Raises InputError (unreadable, too-large, not-yaml, empty)."""
    return parse_text(read_text(path, MAX_BYTES), str(path))


def parse_text(text: str, file: str) -> Field:
    """Return the root of YAML text; `file` is the name used in errors.

    Raises InputError (not-yaml, empty).
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as bad:
        mark = getattr(bad, "problem_mark", None)
        reason = str(getattr(bad, "problem", None) or bad).replace("\n", " ")
        raise InputError("not-yaml", reason, file=file, line=None if mark is None else mark.line + 1) from bad
    except RecursionError as bad:
        raise InputError("not-yaml", "is nested too deeply", file=file) from bad
    if node is None:
        raise InputError("empty", "the file is empty", file=file)
    return Field(node, "", file)
