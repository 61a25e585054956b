"""Plot a simulation as PNG and SVG: demand, replicas, idle buffer and waits over time. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from capacity.errors import CapacityError
from capacity.model import Floats
from capacity.simulation.simulate import Result


def draw(results: list[Result], stem: Path, *, title: str = "") -> list[Path]:
    """Write STEM.png and STEM.svg; equal results give equal SVG bytes.

    Raises CapacityError (no-matplotlib).
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as missing:
        raise CapacityError("no-matplotlib", "the plot needs matplotlib: pip install 'quickthaw[plot]'") from missing
    with pyplot.rc_context({"svg.hashsalt": "quickthaw", "font.size": 8}):
        figure, axes = pyplot.subplots(5, 1, figsize=(10, 11), sharex=True, layout="constrained")
        try:
            longest = max(float(r.arrivals.max()) for r in results)
            unit, word = (60.0, "minutes") if longest < 4 * 3600 else (3600.0, "hours")
            width = 15.0 if longest < 4 * 3600 else 300.0
            edges = np.arange(0.0, longest + 2 * width, width)
            first = results[0]
            count, _ = np.histogram(first.arrivals, edges)
            axes[0].fill_between(edges[:-1] / unit, count / width, step="post", color="0.6", linewidth=0)
            axes[0].set_ylabel("requests/s")
            for result in results:
                at = np.array(result.series.at) / unit
                for axis, values in ((1, result.series.replicas), (2, result.series.held), (3, result.series.idle)):
                    axes[axis].step(at, values, where="post", linewidth=1.0, label=result.policy)
                middle, worst = _worst(result, edges)
                axes[4].plot(middle / unit, worst, linewidth=1.0, marker=".", markersize=2.5)
            for axis, label in (
                (1, "replicas ready"),
                (2, "GPUs held"),
                (3, "idle buffer, GPUs"),
                (4, "p99 wait of arrivals, s"),
            ):
                axes[axis].set_ylabel(label)
                axes[axis].grid(alpha=0.3)
                axes[axis].set_ylim(bottom=0, top=max(1.0, axes[axis].get_ylim()[1]))
            axes[4].set_yscale("symlog", linthresh=1.0)
            axes[4].set_xlabel(word)
            lines, labels = axes[1].get_legend_handles_labels()
            figure.legend(lines, labels, loc="outside upper center", ncols=min(5, len(results)), title=title or None)
            written = []
            for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
                path = stem.with_name(stem.name + suffix)
                part = path.with_name(path.name + ".part")
                figure.savefig(part, format=suffix[1:], dpi=120, metadata=metadata)
                part.replace(path)
                written.append(path)
        finally:
            pyplot.close(figure)
    return written


def _worst(result: Result, edges: Floats) -> tuple[Floats, Floats]:
    """Return the 99th percentile of the waits of requests that arrived in each bin; NaN, a gap in the line, for empty bins."""
    where = np.digitize(result.arrivals, edges) - 1
    order = np.argsort(where, kind="stable")
    bins, starts = np.unique(where[order], return_index=True)
    worst = np.full(len(edges), np.nan)
    worst[bins] = [np.quantile(part, 0.99) for part in np.split(result.waits[order], starts[1:])]
    return edges + (edges[1] - edges[0]) / 2, worst
