"""Chunk boundaries cover a file, keep to the size limit, and make equal stretches equal chunks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.store.chunking import CHUNK, MIN_RUN, PAGE, Found, plan
from tests.kits.checkpoint.criu_images import ANON_PRIVATE, image, message, vma

pytestmark = pytest.mark.t0

contents = st.lists(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 20)), max_size=8), min_size=1, max_size=3)
"""Files of stretches: (which stretch of a small library, 0 being zeros; how many of its pages)."""


def page(stretch: int, number: int) -> bytes:
    return bytes(PAGE) if stretch == 0 else bytes([stretch, number]) * (PAGE // 2)


def write(folder: Path, files: list[list[tuple[int, int]]]) -> list[bytes]:
    written = []
    for index, stretches in enumerate(files, 1):
        data = b"".join(page(s, n) for s, count in stretches for n in range(count))
        (folder / f"pages-{index}.img").write_bytes(data)
        written.append(data)
    return written


def chunks(data: bytes, lengths: list[int]) -> list[bytes]:
    ends = np.cumsum(lengths).tolist()
    return [data[end - length : end] for end, length in zip(ends, lengths, strict=True)]


@pytest.mark.slow
@settings(deadline=None, max_examples=80)
@given(contents)
def test_chunks_cover_every_file_and_long_copies_are_equal_chunks(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[tuple[int, int]]]
) -> None:
    folder = tmp_path_factory.mktemp("images")
    written = write(folder, files)
    found = plan(folder)
    pieces = []
    for index, data in enumerate(written, 1):
        lengths = found.lengths[f"pages-{index}.img"]
        assert sum(lengths) == len(data)
        assert all(0 < n <= CHUNK and n % PAGE == 0 for n in lengths)
        pieces += chunks(data, lengths)
    stored = sum(len(p) for p in {p for p in pieces if any(p)})
    total = sum(len(p) for p in pieces)
    zeros = sum(len(p) for p in pieces if not any(p))
    assert zeros >= found.zero
    # Every copy that was found is stored once.
    assert stored <= total - found.zero - found.copies


def test_a_long_copy_in_another_file_is_found_at_any_offset(tmp_path: Path) -> None:
    write(tmp_path, [[(1, 3), (2, 20)], [(3, 5), (2, 20), (4, 1)]])
    found = plan(tmp_path)
    assert found.copies == 20 * PAGE
    assert found.lengths == {"pages-1.img": [3 * PAGE, 20 * PAGE], "pages-2.img": [5 * PAGE, 20 * PAGE, PAGE]}


def test_a_partial_copy_splits_the_original_and_its_other_copies(tmp_path: Path) -> None:
    middle = [page(2, n) for n in range(5, 15)]
    whole = [page(2, n) for n in range(20)]
    for index, content in enumerate((whole, whole, middle), 1):
        (tmp_path / f"pages-{index}.img").write_bytes(b"".join(content))
    found = plan(tmp_path)
    assert found.lengths["pages-1.img"] == [5 * PAGE, 10 * PAGE, 5 * PAGE] == found.lengths["pages-2.img"]
    assert found.lengths["pages-3.img"] == [10 * PAGE]


def test_short_copies_get_no_chunk_of_their_own(tmp_path: Path) -> None:
    write(tmp_path, [[(1, MIN_RUN - 1), (2, 9)], [(3, 9), (1, MIN_RUN - 1)]])
    assert plan(tmp_path).copies == 0


def test_zeros_are_excluded(tmp_path: Path) -> None:
    write(tmp_path, [[(1, 4), (0, 30), (2, 4), (0, 2)]])
    assert plan(tmp_path) == Found({"pages-1.img": [4 * PAGE, 30 * PAGE, 6 * PAGE]}, 30 * PAGE, 0)


def test_long_stretches_are_split_at_the_limit(tmp_path: Path) -> None:
    (tmp_path / "pages-1.img").write_bytes(np.random.default_rng(1).bytes(2 * CHUNK + PAGE))
    assert plan(tmp_path).lengths["pages-1.img"] == [CHUNK, CHUNK, PAGE]


def test_a_large_mapping_begins_a_chunk(tmp_path: Path) -> None:
    count = 5 << 8  # 5 MiB of pages
    (tmp_path / "pages-3.img").write_bytes(np.random.default_rng(2).bytes((count + 9) * PAGE))
    image(
        tmp_path / "mm-8.img", [message((1, 1), vma(0x10000, 9, ANON_PRIVATE), vma(0x900000, count + 50, ANON_PRIVATE))]
    )
    runs = [message((1, 0x10000), (2, 0), (4, 4), (5, 9)), message((1, 0x901000), (2, 0), (4, 4), (5, count))]
    image(tmp_path / "pagemap-8.img", [message((1, 3)), *runs])
    assert plan(tmp_path).lengths["pages-3.img"] == [9 * PAGE, count * PAGE]


def test_a_last_partial_page_and_empty_files_are_covered(tmp_path: Path) -> None:
    assert plan(tmp_path) == Found({}, 0, 0)
    (tmp_path / "pages-1.img").write_bytes(b"x" * (PAGE + 5))
    (tmp_path / "pages-2.img").write_bytes(b"")
    assert plan(tmp_path).lengths == {"pages-1.img": [PAGE, 5], "pages-2.img": []}
