"""Which GPU each replica gets, and which GPUs the driver is told to exchange at a restore."""

from __future__ import annotations

import pytest

from checkpoint.compatibility.gpu import Gpu
from checkpoint.cuda.placement import all_pairs, places

pytestmark = pytest.mark.t0
GPUS = [Gpu("H100", 80 << 30, f"GPU-{letter}") for letter in "abcd"]


@pytest.mark.parametrize(
    ("pairs", "then", "now", "expected"),
    [
        ("", "ab", "ab", ""),
        ("ab", "ab", "ab", "ab ba"),
        ("ac", "abcd", "abcd", "ac bb dd ca"),
        ("ax", "ab", "xy", "ax by"),
        ("ax", "ab", "x", "ax"),
        ("ab", "a", "ab", "ab"),
        ("ab", "", "ab", "ab"),
        ("ax", "ab", "bx", "ax bb"),
    ],
)
def test_a_map_has_every_gpu_of_the_dump_once(pairs, then, now, expected):
    def split(text):
        return [(pair[0], pair[1]) for pair in text.split()]

    found = all_pairs(split(pairs), then, now)
    assert sorted(found) == sorted(split(expected))
    assert len({new for _, new in found}) == len(found)


@pytest.mark.parametrize(
    ("visible", "replicas", "expected"),
    [
        (None, 1, [None]),
        (None, 2, ["0", "1"]),
        (None, 5, ["0", "1", "2", "3", "0"]),
        ("3, 1", 2, ["3", "1"]),
        ("GPU-c,GPU-a", 3, ["GPU-c", "GPU-a", "GPU-c"]),
        ("2", 2, [None, None]),
        ("", 2, [None, None]),
        ("1,9,0", 2, [None, None]),  # CUDA takes what stands before the first invalid word
    ],
)
def test_each_replica_sees_one_gpu(visible, replicas, expected):
    assert places(GPUS, visible, replicas) == expected


def test_without_gpus_nothing_is_chosen():
    assert places([], None, 3) == [None] * 3
