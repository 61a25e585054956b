"""Small model directories for lazyfs's tests, with hand-written safetensors, so that sizes and offsets are known."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path


def write_safetensors(path: Path, tensors: dict[str, bytes]) -> None:
    """Write a valid safetensors file with these tensors, as bytes, in this order."""
    header, at = {}, 0
    for name, data in tensors.items():
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [at, at + len(data)]}
        at += len(data)
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(raw)) + raw)
        for data in tensors.values():
            f.write(data)


def make_model(folder: Path, *, megabytes: int = 20, seed: int = 1) -> Path:
    """Make a model-like directory: one safetensors file, small JSON files, a subfolder, an empty file, links."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    sizes, left = [], megabytes << 20
    while left > 0:
        size = min(left, rng.choice([1000, 70_001, 1 << 20, 3_000_000, 9_000_000]))
        sizes.append(size)
        left -= size
    write_safetensors(folder / "model.safetensors", {f"t{i}": rng.randbytes(n) for i, n in enumerate(sizes)})
    (folder / "config.json").write_text('{"model_type": "toy"}')
    (folder / "empty.txt").touch()
    (folder / "sub").mkdir()
    (folder / "sub" / "tokenizer.json").write_text("x" * 70_000)
    (folder / "link.json").symlink_to("config.json")
    (folder / "sub" / "up").symlink_to("../config.json")
    return folder
