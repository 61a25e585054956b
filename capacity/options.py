"""Option types of the commands of `quickthaw plan`, and how they report errors."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console

from capacity import report
from capacity.errors import CapacityError, InfeasibleError, InputError


class Number(click.FloatRange):
    """A FloatRange that also rejects infinity and NaN, which passes every comparison."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number. Fails as click does."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class Quantity(click.ParamType[float]):
    """A number with a unit of `kind` (capacity/inputs/units.py), in its base unit."""

    def __init__(self, kind: str) -> None:
        self.kind = self.name = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number. Fails as click does."""
        from capacity.inputs.units import parse

        try:
            number = parse(value, self.kind)
        except InputError as bad:
            self.fail(bad.message, param, ctx)
        if number < 0:
            self.fail(f"{value} is negative.", param, ctx)
        return number


class Samples(click.ParamType[tuple[float, ...]]):
    """Durations separated by commas, such as `97s,105s`; returns seconds."""

    name = "times"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Return seconds. Fails as click does."""
        one = Quantity("duration")
        return value if isinstance(value, tuple) else tuple(one.convert(v, param, ctx) for v in value.split(","))


class Duration(Quantity):
    """A duration such as `90s` or `10m`; a bare number is seconds. Returns seconds, at least `low`."""

    def __init__(self, low: float) -> None:
        super().__init__("duration")
        self.low = low

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return seconds. Fails as click does."""
        number = super().convert(value, param, ctx)
        if number < self.low:
            self.fail(f"{value} is shorter than {self.low:g}s.", param, ctx)
        return number


def option(*names: str, **attributes: Any) -> Callable[[Any], Any]:
    """Define a click option that a QUICKTHAW_PLAN_… variable also sets."""
    word = next(name for name in names if name.startswith("--")).split("/")[0]
    variable = "QUICKTHAW_PLAN_" + word.removeprefix("--").upper().replace("-", "_")
    return click.option(*names, envvar=variable, show_envvar=True, **attributes)


def console() -> Console:
    """Return a console; width 130 if standard output is not a terminal, so that table columns stay apart in a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=130)


def fail(error: CapacityError, *, file: Path | None = None, as_json: bool = False) -> NoReturn:
    """Report an error on standard error and exit with its exit code.

    One line for each error of the input; several if there is no plan. If `as_json`, also prints the error as JSON on standard output.
    """
    if isinstance(error, InfeasibleError) and error.conflict.constraints:
        first, *rest = error.lines()
        click.echo(f"quickthaw: {error.code}: {f'{file}: ' if file else ''}{first}", err=True)
        for line in rest:
            click.echo(line, err=True)
    else:
        for one in error.all if isinstance(error, InputError) else [error]:
            click.echo(f"quickthaw: {one}", err=True)
    if as_json:
        click.echo(json.dumps(report.error_json(error), indent=2))
    sys.exit(error.exit_code)


def check_folder(plot: Path | None) -> None:
    """Raise InputError before the work begins if the plot could not be written after it."""
    if plot is not None and not plot.absolute().parent.is_dir():
        raise InputError("cannot-write", f"there is no folder {plot.parent}", where="--plot")


def say(paths: list[Path]) -> None:
    for path in paths:
        click.echo(f"wrote {path}", err=True)
