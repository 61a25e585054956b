"""Draw a snapshot's working set: which parts of each process's memory are needed, in the order of need.

Needs matplotlib. There is one field for each process. Vertical axis: its pages in the image, in address order, without
the gaps between mappings. Horizontal axis: how much was needed before, up to the first token (left of the line) and by
the next requests.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

from checkpoint.criu.pagemap import PAGE, ProcessImage, process_ids, read_process
from checkpoint.errors import Failed, HostLacks, NotFound
from checkpoint.lazy_pages.working_set import BadWorkingSet, WorkingSet

MB = 1e6


@dataclass(frozen=True)
class ProcessShare:
    """Bytes of one process.

    `image`: in the image. `eager`: of these, copied by CRIU itself. `first`, `later`: needed before the first token,
    and soon after it.
    """

    pid: int
    image: int
    eager: int
    first: int
    later: int


def shares(folder: Path) -> list[ProcessShare]:
    """Compare the working set with the image, by process.

    Zero pages, which no image contains, are not counted.

    Raises NotFound (no-working-set), Failed (working-set-unreadable).
    """
    known, images = _read(folder)
    found = []
    for pid, image in images.items():
        parts = [0, 0]
        for index, ranges in enumerate((known.before_first_token, known.after_first_token)):
            for process, start, end in ranges:
                if process == pid:
                    parts[index] += sum(high - low for low, high, _ in image.within(start, end))
        eager = image.eager_pages * PAGE
        found.append(ProcessShare(pid, image.lazy_pages * PAGE + eager, eager, parts[0], parts[1]))
    return found


def _read(folder: Path) -> tuple[WorkingSet, dict[int, ProcessImage]]:
    try:
        known = WorkingSet.load(str(folder / "working-set"))
        return known, {pid: read_process(str(folder / "images"), pid) for pid in process_ids(str(folder / "images"))}
    except FileNotFoundError as error:
        raise NotFound(
            "no-working-set", f"{folder.name} has no recorded working set yet; its first restore records it"
        ) from error
    except (OSError, BadWorkingSet, ValueError) as error:
        raise Failed("working-set-unreadable", f"{folder.name}: {error}") from error


def marks(known: WorkingSet, image: ProcessImage) -> list[tuple[float, float, float, float]]:
    """Return one process's rectangles in megabytes: (needed before it by all processes, its length, lowest page, height)."""
    starts = [start for start, _, _ in image.runs]
    below, at = [], 0
    for start, end, _ in image.runs:
        below.append(at)
        at += end - start
    found = []
    needed = 0
    for process, start, end in known.ranges:
        if process == image.pid:
            for low, high, _ in image.within(start, end):
                index = bisect_right(starts, low) - 1
                height = below[index] + low - starts[index]
                found.append((needed / MB, (high - low) / MB, height / MB, (high - low) / MB))
        needed += end - start
    return found


def draw(folder: Path, path: Path) -> None:
    """Write the picture in the format of its suffix (.svg, .png, .pdf).

    The same snapshot gives the same bytes of SVG.

    Raises HostLacks (no-matplotlib), NotFound (no-working-set), Failed (working-set-unreadable,
    picture-not-written).
    """
    known, images = _read(folder)
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
        from matplotlib.collections import PolyCollection
    except ImportError as missing:
        raise HostLacks("no-matplotlib", "the picture needs matplotlib: pip install 'quickthaw[plot]'") from missing
    first = sum(end - start for _, start, end in known.before_first_token) / MB
    total = sum(end - start for _, start, end in known.ranges) / MB
    shown = [image for image in images.values() if image.runs]
    with pyplot.rc_context({"svg.hashsalt": "quickthaw", "font.size": 8}):
        figure, axes = pyplot.subplots(
            len(shown), 1, figsize=(9, 2.2 * len(shown) + 0.8), sharex=True, squeeze=False, layout="constrained"
        )
        try:
            for axis, image in zip(axes[:, 0], shown, strict=True):
                boxes = marks(known, image)
                # A range of one page would be narrower than a pixel, so draw at least a visible width.
                wide = total / 700
                axis.add_collection(
                    PolyCollection(
                        [
                            [(x, y), (x, y + h), (x + max(w, wide), y + h), (x + max(w, wide), y)]
                            for x, w, y, h in boxes
                        ],
                        facecolor="tab:blue",
                        edgecolor="tab:blue",
                        linewidth=0.4,
                    )
                )
                size = image.lazy_pages * PAGE / MB
                needed = sum(w for _, w, _, _ in boxes)
                axis.axvline(first, color="tab:red", linewidth=0.8)
                axis.set_ylim(0, size)
                axis.set_xlim(0, total)
                axis.set_ylabel(f"process {image.pid}\nMB of {size:.0f}")
                axis.set_title(f"{needed:.0f} of {size:.0f} MB needed", loc="right", fontsize=8)
                axis.grid(alpha=0.3)
            axes[-1, 0].set_xlabel("MB needed before, over all processes (the line: first token)")
            figure.suptitle(f"{folder.name}: what is needed, in order")
            part = path.with_name(path.name + ".part")
            metadata = {"Date": None} if path.suffix == ".svg" else None
            try:
                figure.savefig(part, format=path.suffix[1:] or "svg", dpi=120, metadata=metadata)
                part.replace(path)
            except (OSError, ValueError) as error:
                with contextlib.suppress(OSError):
                    part.unlink(missing_ok=True)
                raise Failed("picture-not-written", f"{path}: {error}") from error
        finally:
            pyplot.close(figure)


def render(found: list[ProcessShare]) -> list[str]:
    """Format as lines for a terminal."""
    total = ProcessShare(
        0,
        sum(one.image for one in found),
        sum(one.eager for one in found),
        sum(one.first for one in found),
        sum(one.later for one in found),
    )
    lines = [f"{'working set, MB':<22} {'image':>10}{'by CRIU':>10}{'first':>10}{'later':>10}{'share':>9}"]
    for one in [*found, total]:
        name = f"process {one.pid}" if one.pid else "all"
        share = (one.first + one.later) / one.image if one.image else 0.0
        sizes = (one.image, one.eager, one.first, one.later)
        lines.append(f"{name:<22} {''.join(f'{size / MB:>10.1f}' for size in sizes)}{share:>9.1%}")
    lines.append(
        "by CRIU: always put in place first; first, later: needed for the first token, and by the next requests"
    )
    return lines
