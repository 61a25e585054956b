"""Exceptions of the capacity package, each with a stable code and a one-line message.

CapacityError
 ├─ InputError        invalid input in the plan file, a trace or a lead-time file
 ├─ Waiting           nothing to do yet
 ├─ InfeasibleError   no plan satisfies every constraint; has the conflict and the nearest feasible change
 └─ SolverError       HiGHS gave up (time limit, numerical trouble), or a plan failed the independent check
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

NO_CHANGE = "no nearest change: time ran out before one was found; change one of these, or plan fewer pools or services"

Value = TypeVar("Value")


class CapacityError(Exception):
    """Base class; `code` is kebab-case and does not change between versions."""

    exit_code = 1

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class InputError(CapacityError):
    """Invalid input. Names the file, the line (1-based, None if unknown) and the field."""

    exit_code = 2

    def __init__(self, code: str, message: str, *, file: str = "", line: int | None = None, where: str = "") -> None:
        place = file + (f":{line}" if line is not None else "")
        super().__init__(code, ": ".join(part for part in (place, where, message) if part))
        self.file = file
        self.line = line
        self.field = where
        self.others: list[InputError] = []

    @property
    def all(self) -> list[InputError]:
        """This error and the others that were found in the same run."""
        return [self, *self.others]

    @classmethod
    def joined(cls, errors: list[InputError]) -> InputError:
        """Return one error that carries all of them, the first of the file in front."""
        first, *first.others = sorted((one for error in errors for one in error.all), key=lambda e: e.line or 0)
        return first


class Errors:
    """Collects the errors of an input, so that one run names all of them."""

    def __init__(self) -> None:
        self.found: list[InputError] = []

    def read(self, reader: Callable[..., Value], *values: Any, **options: Any) -> Value | None:
        """Return what the reader returns; None if it raises InputError, which is kept."""
        try:
            return reader(*values, **options)
        except InputError as bad:
            self.found += bad.all
            bad.others = []
            return None

    def check(self) -> None:
        """Raise InputError if anything was found."""
        if self.found:
            raise InputError.joined(self.found)


class Waiting(CapacityError):
    """Nothing is wrong, and nothing can be done yet: another controller leads, or the observation has only begun."""

    exit_code = 0


@dataclass(frozen=True)
class Change:
    """One part of the nearest feasible change: set `what` from `now` to `needed`.

    `step`, from 1, is the step that needs the most of it; None if there is only one step.
    """

    what: str
    now: float
    needed: float
    unit: str
    step: int | None = None

    def __str__(self) -> str:
        text = f"{self.what}: from {self.now:g} to {self.needed:g} {self.unit}".rstrip()
        return text if self.step is None else f"{text} (for step {self.step})"


@dataclass(frozen=True)
class Conflict:
    """An irreducible set of constraints that cannot hold together, and the cheapest change that makes them hold.

    Without a change, the time to look for one ran out: of constraints that are named, some can always be changed.
    """

    constraints: tuple[str, ...]
    smallest: bool
    changes: tuple[Change, ...] = field(default_factory=tuple)


class InfeasibleError(CapacityError):
    """No plan satisfies every constraint."""

    def __init__(self, conflict: Conflict) -> None:
        cause = "; ".join(conflict.constraints) or "the constraints contradict each other"
        remedy = "; ".join(str(change) for change in conflict.changes)
        if remedy:
            cause += f"; nearest change: {remedy}"
        elif conflict.constraints:
            cause += f"; {NO_CHANGE}"
        super().__init__("infeasible", f"these cannot hold together: {cause}")
        self.conflict = conflict

    def lines(self) -> list[str]:
        """Return the message as lines for people, one constraint per line."""
        found = ["no plan is possible: these cannot hold together"]
        if not self.conflict.smallest:
            found = ["no plan is possible: these cannot hold together (there may be fewer: time ran out)"]
        found += [f"  - {text}" for text in self.conflict.constraints]
        if self.conflict.changes:
            found += ["the nearest change that makes one possible", *(f"  - {c}" for c in self.conflict.changes)]
        else:
            found.append(NO_CHANGE)
        return found


class SolverError(CapacityError):
    """HiGHS returned no usable answer."""
