"""Plots as PNG and SVG, and an HTML page with the tables: of a plan, of a simulation, of wait against cost. Needs matplotlib."""

from __future__ import annotations

import html
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from capacity.errors import CapacityError
from capacity.files import replacing
from capacity.model import Floats
from capacity.optimize.plan import Plan
from capacity.simulation.simulate import Result, pareto, settings_of

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light }}
body {{ font: 15px/1.4 sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em }}
h1 {{ font-size: 1.3em }}
pre {{ font-size: 13px; overflow-x: auto }}
svg {{ max-width: 100%; height: auto }}
</style>
</head>
<body>
<h1>{title}</h1>
{pictures}
{tables}
</body>
</html>
"""


def write(stem: Path, title: str, show: Callable[[Console], None], *pictures: Callable[[Any], None]) -> list[Path]:
    """Write STEM.png and STEM.svg of the first picture, and STEM.html with all pictures and what `show` prints.

    Equal inputs give equal SVG bytes. Raises CapacityError (no-matplotlib), OSError.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as missing:
        raise CapacityError("no-matplotlib", "the plot needs matplotlib: pip install 'quickthaw[plot]'") from missing
    written, inline = [], []
    for number, draw in enumerate(pictures):
        with pyplot.rc_context({"svg.hashsalt": f"quickthaw{number}", "font.size": 8}):
            figure = pyplot.figure(figsize=(10, 4), layout="constrained")
            try:
                draw(figure)
                text = io.StringIO()
                figure.savefig(text, format="svg", metadata={"Date": None})
                inline.append(text.getvalue()[text.getvalue().index("<svg") :])
                if number == 0:
                    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
                        path = stem.with_name(stem.name + suffix)
                        part = path.with_name(path.name + ".part")
                        figure.savefig(part, format=suffix[1:], dpi=120, metadata=metadata)
                        part.replace(path)
                        written.append(path)
            finally:
                pyplot.close(figure)
    console = Console(record=True, width=140, file=io.StringIO())
    show(console)
    tables = console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
    path = stem.with_name(stem.name + ".html")
    with replacing(path) as file:
        file.write(PAGE.format(title=html.escape(title), pictures="".join(inline), tables=tables))
    return [*written, path]


def plan_steps(plan: Plan, other: Plan | None, labels: list[str]) -> Callable[[Any], None]:
    """Return a picture of the GPUs held by step: by type, and with cold lead times."""

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        at, bottom = np.arange(len(plan.instances)), np.zeros(len(plan.instances))
        pools = plan.problem.pools
        for gpu in sorted({pool.gpu for pool in pools}):
            held = sum(plan.instances[:, i] * pool.gpus for i, pool in enumerate(pools) if pool.gpu == gpu)
            if np.any(held):
                axis.bar(at, held, bottom=bottom, width=0.9, label=gpu)
            bottom = bottom + held
        unused = np.array([plan.unused(t) for t in range(len(at))])
        axis.bar(at, unused, bottom=bottom - unused, width=0.9, fill=False, hatch="//", linewidth=0, label="idle")
        if other is not None:
            axis.step(
                np.append(at, at[-1] + 1) - 0.5,
                np.append(other.gpus, other.gpus[-1]),
                where="post",
                color="0.2",
                label="cold starts",
            )
        every = max(1, len(at) // 12)
        axis.set_xticks(at[::every], labels[::every])
        axis.set_ylabel("GPUs held")
        axis.legend()

    return draw


def frontier(points: list[Result], names: list[str]) -> Callable[[Any], None]:
    """Return a picture of wait against cost: a point for each setting, a line along those that no other setting beats."""

    def draw(figure: Any) -> None:
        for axis, value, label in zip(
            figure.subplots(1, 2), ("p99", "p50"), ("p99 wait, s", "median wait, s"), strict=True
        ):
            for name in names:
                mine = settings_of(points, name)
                (line,) = axis.plot(
                    [r.cost for r in mine], [getattr(r, value) for r in mine], "o", markersize=3, alpha=0.5
                )
                best = pareto(mine, value)
                axis.step(
                    [r.cost for r in best],
                    [getattr(r, value) for r in best],
                    where="post",
                    color=line.get_color(),
                    label=name,
                )
            axis.set_xlabel("cost, $")
            axis.set_ylabel(label)
            if min(getattr(r, value) for r in points) < 1.0:  # below 1 s the scale is linear, without ticks
                axis.set_yscale("symlog", linthresh=1.0)
                axis.set_ylim(bottom=0, top=max(1.0, axis.get_ylim()[1]))
            else:
                axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("")
            axis.grid(alpha=0.3, which="both")
            axis.legend()

    return draw


def over_time(results: list[Result], title: str) -> Callable[[Any], None]:
    """Return a picture of demand, replicas, idle buffer and waits over time."""

    def draw(figure: Any) -> None:
        figure.set_size_inches(10, 11)
        axes = figure.subplots(5, 1, sharex=True)
        longest = max(float(r.arrivals.max()) for r in results)
        unit, word = (60.0, "minutes") if longest < 4 * 3600 else (3600.0, "hours")
        width = 15.0 if longest < 4 * 3600 else 300.0
        edges = np.arange(0.0, longest + 2 * width, width)
        count, _ = np.histogram(results[0].arrivals, edges)
        axes[0].fill_between(edges[:-1] / unit, count / width, step="post", color="0.6", linewidth=0)
        for result in results:
            series = result.series
            for axis, values in zip(axes[1:4], (series.replicas, series.held, series.idle), strict=True):
                axis.step(np.array(series.at) / unit, values, where="post", linewidth=1.0, label=result.policy)
            middle, worst = _worst(result, edges)
            axes[4].plot(middle / unit, worst, linewidth=1.0, marker=".", markersize=2.5)
        labels = ("requests/s", "replicas ready", "GPUs held", "idle buffer, GPUs", "p99 wait of arrivals, s")
        for axis, label in zip(axes, labels, strict=True):
            axis.set_ylabel(label)
            axis.grid(alpha=0.3)
            axis.set_ylim(bottom=0, top=max(1.0, axis.get_ylim()[1]))
        axes[4].set_yscale("symlog", linthresh=1.0)
        axes[4].yaxis.set_major_formatter("{x:g}")
        axes[4].set_xlabel(word)
        lines, names = axes[1].get_legend_handles_labels()
        figure.legend(lines, names, loc="outside upper center", ncols=min(5, len(results)), title=title)

    return draw


def _worst(result: Result, edges: Floats) -> tuple[Floats, Floats]:
    """Return the 99th percentile of the waits of requests that arrived in each bin; NaN, a gap in the line, for empty bins."""
    where = np.digitize(result.arrivals, edges) - 1
    order = np.argsort(where, kind="stable")
    bins, starts = np.unique(where[order], return_index=True)
    worst = np.full(len(edges), np.nan)
    worst[bins] = [np.quantile(part, 0.99) for part in np.split(result.waits[order], starts[1:])]
    return edges + (edges[1] - edges[0]) / 2, worst
