"""`quickthaw plan FILE`, and `quickthaw plan simulate FILE --trace CSV`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
from rich.console import Console

from capacity import report
from capacity.errors import CapacityError
from capacity.load import load
from capacity.plan import solve


class PlanGroup(click.Group):
    """A group whose first word may be a file instead of a subcommand; then `solve` is meant."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands:
            args = ["solve", *args]
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # Options before the file (`plan --json FILE`) belong to `solve` too.
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = ["solve", *args]
        return super().parse_args(ctx, args)


def fail(error: CapacityError) -> None:
    """One line on standard error, and the exit code of its kind."""
    click.echo(f"quickthaw plan: {error}", err=True)
    sys.exit(error.exit_code)


@click.group(cls=PlanGroup, invoke_without_command=False)
def plan() -> None:
    """How many GPUs to hold, where, and how many of them idle."""


@plan.command("solve")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--exact", is_flag=True, help="Solve the integer program.")
@click.option("--explain", is_flag=True, help="Say where each number comes from.")
def solve_command(file: Path, as_json: bool, exact: bool, explain: bool) -> None:
    """The plan of FILE."""
    try:
        problem = load(file)
        chosen = solve(problem, "restored", exact=exact)
        other = solve(problem, "cold", exact=exact)
    except CapacityError as error:
        fail(error)
        return
    if as_json:
        click.echo(json.dumps(report.to_json(chosen, other), indent=2))
    else:
        report.print_plan(Console(), chosen, other, explain=explain)
