"""Chunk boundaries: lengths add up, follow tensors, and survive edits that do not change a tensor."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.content.chunking import MAX_CHUNK, MIN_CHUNK, chunk_lengths
from tests.kits.lazyfs.models import write_safetensors

pytestmark = pytest.mark.t0


def lengths_of(path):
    data = path.read_bytes()
    return chunk_lengths(path.name, len(data), lambda at, n: data[at : at + n]), data


@given(st.integers(0, 100 << 20))
def test_plain_files_are_split_evenly(size):
    lengths = chunk_lengths("x.bin", size, lambda at, n: pytest.fail("a plain file needs no look inside"))
    assert sum(lengths) == size
    assert all(n == MAX_CHUNK for n in lengths[:-1]) and all(0 < n <= MAX_CHUNK for n in lengths)


def test_a_large_tensor_begins_its_own_chunk(tmp_path):
    sizes = {"a": 100, "big": MIN_CHUNK + 5, "b": 200, "huge": 2 * MAX_CHUNK + 9, "c": 300}
    write_safetensors(tmp_path / "m.safetensors", {k: bytes(n) for k, n in sizes.items()})
    lengths, data = lengths_of(tmp_path / "m.safetensors")
    header = len(data) - sum(sizes.values())
    assert lengths[:4] == [header, 100, MIN_CHUNK + 5, 200]
    assert sum(lengths[4:-1]) == sizes["huge"] and lengths[-1] == 300
    assert max(lengths) <= MAX_CHUNK


def test_small_tensors_share_a_chunk(tmp_path):
    write_safetensors(tmp_path / "m.safetensors", {f"t{i}": bytes(1 << 20) for i in range(20)})
    lengths, _ = lengths_of(tmp_path / "m.safetensors")
    assert lengths[1:] == [4 << 20] * 5


def test_two_changed_tensors_share_all_other_chunks(tmp_path):
    rng = random.Random(7)
    base = {f"t{i}": rng.randbytes(4 << 20) for i in range(5)}
    variant = {**base, "t1": rng.randbytes(4 << 20), "t4": rng.randbytes(4 << 20)}
    cuts = []
    for name, tensors in (("a", base), ("b", variant)):
        write_safetensors(tmp_path / f"{name}.safetensors", tensors)
        lengths, data = lengths_of(tmp_path / f"{name}.safetensors")
        at, pieces = 0, set()
        for n in lengths:
            pieces.add(data[at : at + n])
            at += n
        cuts.append(pieces)
    assert len(cuts[0] & cuts[1]) == len(cuts[0]) - 2


def test_an_inserted_tensor_keeps_chunks_after_the_next_large_tensor(tmp_path):
    rng = random.Random(8)
    tail = {f"t{i}": rng.randbytes(n) for i, n in enumerate([5 << 20, 10, 6 << 20, 20])}
    pieces = []
    for name, head in (("a", {}), ("b", {"new": rng.randbytes(12345)})):
        write_safetensors(tmp_path / f"{name}.safetensors", {**head, **tail})
        lengths, data = lengths_of(tmp_path / f"{name}.safetensors")
        cuts, at = [], 0
        for n in lengths:
            cuts.append(data[at : at + n])
            at += n
        pieces.append(cuts)
    assert set(pieces[0][1:]) <= set(pieces[1])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"short",
        b"\xff" * 64,
        (2).to_bytes(8, "little") + b"{}" + b"x" * 100,
        (30).to_bytes(8, "little") + b'{"a":{"data_offsets":[0,9999]}}',
        (5).to_bytes(8, "little") + b"[1,2]" + bytes(50),
    ],
)
def test_a_malformed_safetensors_is_split_like_any_file(body):
    lengths = chunk_lengths("m.safetensors", len(body), lambda at, n: body[at : at + n])
    assert sum(lengths) == len(body) and all(n > 0 for n in lengths)


@given(st.lists(st.integers(0, 12 << 20), max_size=8), st.binary(max_size=200))
def test_any_header_gives_lengths_that_add_up(sizes, junk):
    import json
    import struct

    header, at = {}, 0
    for i, n in enumerate(sizes):
        header[f"t{i}"] = {"dtype": "U8", "shape": [n], "data_offsets": [at, at + n]}
        at += n
    raw = json.dumps(header).encode()
    size = 8 + len(raw) + at + len(junk)
    prefix = struct.pack("<Q", len(raw)) + raw
    lengths = chunk_lengths("m.safetensors", size, lambda o, n: prefix[o : o + n])
    assert sum(lengths) == size
    assert all(0 < n <= MAX_CHUNK for n in lengths)
