"""The manifest of a snapshot: one JSON document beside its images.

It is written last, so a folder without one is not a snapshot. The document contains its own digest, so flipped bits are
detected as they are in images. The digest does not protect against a forged document; signatures do
(checkpoint.snapshot.signatures).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, cast

import blake3
import msgspec

from checkpoint.cuda.checkpoint import Needs
from checkpoint.errors import Incompatible, Integrity
from lazyfs.content.records import ready

FORMAT = 2
"""Incremented whenever an older quickthaw could not restore what a newer one wrote."""
FILE_NAME = "manifest.json"


class Phase(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One phase of the start that produced the snapshot; `took_s` in seconds."""

    phase: str
    took_s: float


Prompt = str | list[int]
"""Text, or token ids for an engine without a tokenizer."""
Answer = list[int] | list[list[float]]
"""Token ids, or the numbers for each prompt."""
GENERATE = "generate"


class Canary(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the engine answered before the dump. A replica that answers differently is not served.

    `kind` `generate`: the greedy answer to a prompt. `token_ids` holds the choices after each token of the prompt but the
    last, then the `generated` tokens. `generated` is 0 in older snapshots: there, all token ids are generated.
    Other kinds (launchers/canary.py): the numbers that the engine computes of each of `prompts`, in `values`, which a
    replica repeats within `tolerance` (see `distance`).
    `prompts`: what is asked where it is not `prompt`.
    """

    prompt: str
    token_ids: list[int]
    generated: int = 0
    kind: str = GENERATE
    prompts: list[str | list[int]] = []
    values: list[list[float]] = []
    tolerance: float = 0.0

    @property
    def asked(self) -> list[Prompt]:
        """Return what is asked, one request each."""
        return self.prompts or [self.prompt]

    def difference(self, answer: Answer) -> str:
        """Return in words how an answer differs from the recorded one, or "" if it does not."""
        if self.kind == GENERATE:
            return "" if answer == self.token_ids else f"generates {answer} where {self.token_ids} was recorded"
        apart = distance(cast("list[list[float]]", answer), self.values)
        if apart <= self.tolerance:
            return ""
        return f"answers to {self.kind} {apart:.3g} away from what was recorded, where {self.tolerance:.3g} is noise"

    def __str__(self) -> str:
        """Return the prompts and the answer, for people."""
        prompts = ", ".join(map(repr, self.asked))
        if self.kind == GENERATE:
            return f"{prompts} → {self.token_ids}"
        counts = " and ".join(str(len(numbers)) for numbers in self.values)
        return f"{self.kind} {prompts} → {counts} numbers, within {self.tolerance:.3g}"


def distance(found: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> float:
    """Return the Euclidean distance of all numbers, relative to the longer of both vectors; infinite if they have other lengths.

    Not a number if one of the numbers is none: no comparison with it is true.
    """
    if [len(numbers) for numbers in found] != [len(numbers) for numbers in expected]:
        return math.inf
    one, other = list(chain.from_iterable(found)), list(chain.from_iterable(expected))
    length = max(math.hypot(*one), math.hypot(*other))
    return math.dist(one, other) / length if length else 0.0


class SnapshotFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Size in bytes and BLAKE3 digest (hexadecimal) of one file."""

    size: int
    blake3: str


class Snapshot(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A snapshot's manifest. Sizes are in bytes.

    `digest`: BLAKE3 of the document with zeros in the digest's place; "" if it has none.
    `pipes`: the engine's output pipes, by the names that the images use (`pipe:[123]`).
    `monotonic_ns`: the sandbox's monotonic clock at the dump.
    `top_pid`: the highest process or thread number in use.
    `gpu`: what a resume of the CUDA processes needs.
    `asleep`: the engine had offloaded its GPU memory and must be woken after a restore.
    `model`: the model as given on the command line; `model_path`: the folder that the engine reads.
    `cwd`: the engine's working directory.
    `weights`: `included` in the images, or `excluded`: a restore reads them again.
    `weight_areas`: by process number, (address, bytes) of the weights in its memory.
    `cold_s`: duration of the cold start that a restore replaces.
    `start_ticks`: by process number, its start time at the dump in clock ticks.
    `stopped`: processes that were stopped (SIGSTOP) at the dump.
    """

    digest: str = ""

    format: int
    name: str
    created: str
    engine: str
    model: str
    model_digest: str
    weights: str
    identity: dict[str, Any]
    root_pid: int
    top_pid: int
    port: int
    pipes: dict[str, str]
    monotonic_ns: int
    canary: Canary
    image_bytes: int
    kv_cache_bytes: int
    cold_s: float
    timeline: list[Phase]
    files: dict[str, SnapshotFile]
    gpu: Needs = Needs()
    asleep: bool = False
    model_path: str = ""
    cwd: str = ""
    weight_areas: dict[str, list[tuple[int, int]]] = {}
    start_ticks: dict[str, int] = {}
    stopped: list[int] = []


def load(folder: Path) -> Snapshot:
    """Read the manifest of a snapshot folder.

    Raises Integrity if it is missing or garbled, Incompatible (format-newer) if a newer quickthaw wrote it.
    """
    file = folder / FILE_NAME
    try:
        data = file.read_bytes()
    except OSError as error:
        raise Integrity(
            "manifest-unreadable", f"{file}: {error.strerror}; remove the snapshot: quickthaw snapshot rm {folder.name}"
        ) from error
    return parse(data, folder, folder.name)


def parse(data: bytes, folder: Path, name: str) -> Snapshot:
    """Parse the manifest of snapshot `name`; error messages name `folder`.

    Raises the same errors as `load`.
    """
    file = folder / FILE_NAME
    try:
        found = msgspec.json.decode(data, type=dict[str, msgspec.Raw]).get("format")
        version = msgspec.json.decode(found, type=int) if found is not None else None
    except msgspec.MsgspecError as error:
        raise Integrity(
            "manifest-garbled", f"{file} is damaged ({error}); remove it: quickthaw snapshot rm {name}"
        ) from error
    if version is None or version > FORMAT:
        raise Incompatible(
            "format-newer",
            f"{name} has format {version} and this quickthaw reads up to {FORMAT}; upgrade, or take a new snapshot",
        )
    try:
        snapshot = msgspec.json.decode(data, type=ready(Snapshot))
    except msgspec.MsgspecError as error:
        raise Integrity(
            "manifest-garbled", f"{file} is damaged ({error}); remove it: quickthaw snapshot rm {name}"
        ) from error
    if snapshot.digest and snapshot.digest != _digest(data):
        raise Integrity(
            "manifest-garbled",
            f"{file} is damaged (wrong digest); remove it: quickthaw snapshot rm {name}",
        )
    if snapshot.name != name:
        raise Integrity(
            "manifest-misplaced", f"{file} belongs to {snapshot.name}; remove it: quickthaw snapshot rm {name}"
        )
    if weights := _FORMER_WEIGHTS.get(snapshot.weights):
        identity = snapshot.identity | {"weights": weights}
        snapshot = msgspec.structs.replace(snapshot, weights=weights, identity=identity)
    return snapshot


_FORMER_WEIGHTS = {"full": "included", "thin": "excluded"}
"""By a former version's value of `weights`, today's."""


def dump(snapshot: Snapshot) -> bytes:
    """Encode a manifest deterministically, as signatures need, and fill in its digest."""
    blank = msgspec.structs.replace(snapshot, digest=_BLANK)
    data = msgspec.json.format(msgspec.json.encode(blank, order="deterministic"), indent=1) + b"\n"
    return data.replace(_BLANK.encode(), _digest(data).encode(), 1)


_BLANK = "0" * 64


def _digest(data: bytes) -> str:
    """Compute the BLAKE3 of a document with zeros in place of its first digest, which is its own."""
    return blake3.blake3(re.sub(rb'("digest": ?")[0-9a-f]{64}', rb"\g<1>" + _BLANK.encode(), data, count=1)).hexdigest()
