"""The layout of excluded weights: the engine's storages as one stream, each part with the file that holds its bytes.

An engine records it before its dump (plugin/engine/weights.py). In a snapshot it is `weights/layout.json`, with the bytes that
are in no model file in `weights/side`; the manifest's digests cover both.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import msgspec

from checkpoint.errors import Failed
from lazyfs.content.records import ready

FOLDER = "weights"
LAYOUT, SIDE = "layout.json", "side"
OWN, ZEROS = -1, -2
"""In place of a file's number in a segment: the side file, and zeros (as in plugin/engine/weights.py)."""


class Recorded(msgspec.Struct, forbid_unknown_fields=True):
    """The engine's record, or why it made none (`declined`: `code: reason`).

    `files`: (path as the engine sees it, size). `segments`: (file, offset, bytes) in the stream's order. `own`: size of the side
    file. `total`: size of the stream. Sizes are in bytes.
    """

    files: list[tuple[str, int]] = []
    segments: list[tuple[int, int, int]] = []
    own: int = 0
    total: int = 0
    declined: str = ""


@dataclass(frozen=True)
class Layout:
    """A layout with the name that engine and ring know it by."""

    recorded: Recorded
    digest: str


def collect(answers: Path) -> dict[str, Path] | str:
    """Return the files that a snapshot keeps of what the engine's processes recorded, by their name in it; or why there are none.

    `answers` is the control folder.
    """
    notes = list(answers.glob("*.layout"))
    if len(notes) != 1:
        return f"weights-not-recorded: {len(notes) or 'no'} processes of the engine recorded their weights, not one"
    try:
        recorded = _parse(notes[0].read_bytes())
        side = notes[0].with_suffix(".side")
        if recorded.declined:
            return recorded.declined
        if recorded.own and side.stat().st_size != recorded.own:
            return "weights-not-recorded: the engine wrote only a part of its record"
    except (OSError, ValueError) as error:
        return f"weights-not-recorded: {error}"
    return {f"{FOLDER}/{LAYOUT}": notes[0]} | ({f"{FOLDER}/{SIDE}": side} if recorded.own else {})


def forget(answers: Path) -> None:
    """Remove the engine's records, which take memory."""
    for note in (*answers.glob("*.layout"), *answers.glob("*.side")):
        with contextlib.suppress(OSError):  # the sandbox may be gone
            note.unlink(missing_ok=True)


def load(folder: Path) -> Layout | None:
    """Return the layout in a snapshot's folder, None if it has none. Raises Failed (weights-layout)."""
    try:
        data = (folder / FOLDER / LAYOUT).read_bytes()
        return Layout(_parse(data), hashlib.sha256(data).hexdigest())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise Failed("weights-layout", f"the layout of the weights cannot be read: {error}") from error


def _parse(data: bytes) -> Recorded:
    """Decode and check a record. Raises ValueError."""
    recorded = msgspec.json.decode(data, type=ready(Recorded))
    sizes = {number: size for number, (_, size) in enumerate(recorded.files)} | {OWN: recorded.own}
    for file, offset, size in recorded.segments:
        if size <= 0 or offset < 0 or (file != ZEROS and offset + size > sizes.get(file, -1)):
            raise ValueError(f"a segment lies outside its file: {json.dumps([file, offset, size])}")
    if sum(size for _, _, size in recorded.segments) != recorded.total:
        raise ValueError("the segments are not as long as the stream")
    return recorded
