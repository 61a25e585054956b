"""The command `quickthaw plan init`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from capacity.errors import CapacityError, InputError
from capacity.options import fail, option


@click.command("init", short_help="Write a first plan file.")
@click.argument("file", type=click.Path(path_type=Path), default="plan.yaml")
@option(
    "--model",
    "models",
    multiple=True,
    metavar="MODEL[,KEY=VALUE…]",
    help="A model as it is launched. Keys: name, gpus, rate, wait, unit, memory, cold, restored, demand, peak. Repeatable.",
)
@option(
    "--gpu",
    "gpus",
    multiple=True,
    metavar="TYPE[,KEY=VALUE…]",
    help="A GPU or instance type. Keys: instance, gpus, memory, price, boot, quota, region, zone. Repeatable.",
)
@option("--region", "regions", multiple=True, help="A region with all these types. Repeatable.")
@option(
    "--prices",
    type=click.Path(path_type=Path),
    help="CSV of prices: instance, gpu, gpus, price[, memory, region].  [default: a table of AWS, of January 2026]",
)
@option("--trace", type=click.Path(path_type=Path), help="CSV of past requests, from which demand is learned.")
@option("--step", default="1h", show_default=True, help="Length of a step of the plan.")
@option("--steps", type=click.IntRange(1, 1000), default=24, show_default=True, help="Steps to plan, with --trace.")
@option("--force", is_flag=True, help="Replace FILE if it is there.")
def init_command(
    file: Path,
    models: tuple[str, ...],
    gpus: tuple[str, ...],
    regions: tuple[str, ...],
    prices: Path | None,
    trace: Path | None,
    step: str,
    steps: int,
    force: bool,
) -> None:
    """Write FILE (default plan.yaml) with comments. Asks in a terminal for what no flag gives.

    Lead times come from what was measured on this host. Several times in one value are separated by spaces.

    \b
    quickthaw plan init
    quickthaw plan init --model /models/llama-8b,gpus=1,rate=3.5/s --gpu H100,boot="170s 190s" --trace week.csv
    quickthaw plan init --model chat,gpus=4,rate=2/s,cold=97s,restored=1.9s --gpu 8xH100,gpus=8,price=24,boot=3m --region east
    """
    from capacity.inputs import new_file
    from capacity.inputs import prices as prices_of

    def ask(question: str, default: str | None) -> str | None:
        if not sys.stdin.isatty():
            return None
        return str(click.prompt(question, default=default, show_default=bool(default), err=True)).strip()

    try:
        if file.exists() and not force:
            raise InputError("exists", "is there already; --force replaces it", file=str(file))
        answers = new_file.Answers(
            [new_file.words(text, new_file.MODEL, "--model") for text in models],
            [new_file.words(text, new_file.GPU, "--gpu") for text in gpus],
            regions,
            prices,
            trace,
            step,
            steps,
        )
        text, problem = new_file.compose(file, answers, ask)
        new_file.write(file, text)
    except CapacityError as error:
        fail(error)
    for note in problem.demand.notes:
        click.echo(note)
    if prices_of.SOURCE in text:
        click.echo(f"Prices: {prices_of.SOURCE}")
    click.echo(f"wrote {file}; next: quickthaw plan {file}")
