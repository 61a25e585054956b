"""Classification of a snapshot's bytes, on images written field by field."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.criu.images import decode, messages, nested, number, text
from checkpoint.cuda.processes import AREAS_FILE
from checkpoint.errors import Integrity
from checkpoint.inspect import contents
from checkpoint.inspect.contents import inspect, render
from checkpoint.snapshot.dump import image_bytes
from tests.kits.checkpoint.criu_images import ANON_PRIVATE, FILE_PRIVATE, HEAP, PAGE, image, message, process, vma

pytestmark = pytest.mark.t0

A, B, C, D = (bytes([n]) * PAGE for n in range(1, 5))
ZERO = bytes(PAGE)


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    images.mkdir()
    image(
        images / "pstree.img",
        [message((1, 10), (2, 0), (5, 10), (5, 11)), message((1, 20), (2, 10), (5, 20)), message((1, 30), (2, 10))],
    )
    image(images / "files.img", [message((1, 1), (2, 7), (3, message((1, 7), (6, "/usr/lib/libx.so"))))])
    process(
        images,
        10,
        "server",
        [
            vma(0x10000, 4, HEAP),
            vma(0x20000, 2, FILE_PRIVATE, 7),
            vma(0x22000, 3, ANON_PRIVATE),
            vma(0x7FFF_0000_0000, 1, ANON_PRIVATE),
        ],
        # The second run crosses the boundary between the file's mapping and the anonymous one.
        [(0x10000, [A, ZERO, B]), (0x21000, [C, A, ZERO]), (0x7FFF_0000_0000, [D])],
    )
    process(
        images, 20, "worker", [vma(0x50000, 8, ANON_PRIVATE)], [(0x51000, [A, ZERO, A, os.urandom(PAGE)])], old=True
    )
    return tmp_path


def shares(share: contents.Share) -> tuple[int, int, int]:
    return share.bytes // PAGE, share.zero // PAGE, share.duplicate // PAGE


def test_bytes_are_counted_by_process_and_kind(snapshot: Path) -> None:
    found = inspect(snapshot)
    server, worker = found.processes
    assert (server.pid, server.parent, server.name, server.threads) == (10, 0, "server", 2)
    assert {kind: shares(s) for kind, s in server.kinds.items()} == {
        "heap": (3, 1, 0),
        "stack": (1, 0, 0),
        "anonymous": (2, 1, 1),
        "private file": (1, 0, 0),
    }
    assert (worker.pid, worker.parent, worker.name, shares(worker.total)) == (20, 10, "worker", (4, 1, 2))
    assert shares(found.total) == (11, 3, 3)
    assert found.between_processes == PAGE
    file = next(area for area in server.largest if area.kind == "private file")
    assert (file.file, file.start, file.mapped) == ("/usr/lib/libx.so", 0x20000, 2 * PAGE)


def test_large_areas_are_named(snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "LARGE", 4 * PAGE)
    assert list(inspect(snapshot).processes[1].kinds) == ["large"]


def test_anonymous_shared_memory_and_other_files_are_counted(snapshot: Path) -> None:
    image(snapshot / "images/pagemap-shmem-99.img", [message((1, 5)), message((1, 0), (2, 0), (4, 4), (5, 2))])
    (snapshot / "images/pages-5.img").write_bytes(A + ZERO)
    (snapshot / "shm").mkdir()
    (snapshot / "shm/psm").write_bytes(bytes(3 * PAGE))
    before = inspect(snapshot).other
    (snapshot / "tmp").mkdir()
    (snapshot / "tmp/x").write_bytes(b"12345")
    found = inspect(snapshot)
    assert {name: shares(s) for name, s in found.shared.items()} == {"shmem-99": (2, 1, 1)}
    assert list(found.shared_memory) == ["psm"]
    assert found.other - before == 5
    assert shares(found.total) == (13, 4, 4)


def test_pages_of_a_parent_snapshot_are_not_counted(snapshot: Path) -> None:
    entries = [message((1, 20)), message((1, 0x50000), (2, 1), (4, 1)), message((1, 0x51000), (2, 4), (4, 4))]
    image(snapshot / "images/pagemap-20.img", entries)
    assert shares(inspect(snapshot).processes[1].total) == (4, 1, 2)


def test_weights_are_recognised_in_any_mapping(snapshot: Path) -> None:
    server = inspect(snapshot).processes[0]
    heap = next(area for area in server.largest if area.kind == "heap")
    # It starts in the middle of the first page; only whole pages of weights count.
    found = inspect(snapshot, weights={"10": [(heap.start + PAGE // 2, 2 * PAGE)]}).processes[0]
    assert found.kinds["weights"].bytes == PAGE
    assert found.kinds["weights"].bytes + found.kinds["heap"].bytes == server.kinds["heap"].bytes
    assert shares(found.total) == shares(server.total)
    assert inspect(snapshot, weights={"20": [(heap.start, PAGE)]}).processes[0].kinds == server.kinds


def test_the_drivers_memory_is_told_from_the_engines(snapshot: Path) -> None:
    (snapshot / "images" / AREAS_FILE).write_text(f'{{"20": [[{0x51000}, {0x53000}], [{0x54000}, {0x70000}]]}}')
    server, worker = inspect(snapshot).processes
    assert {kind: shares(s) for kind, s in worker.kinds.items()} == {"GPU state": (3, 1, 1), "anonymous": (1, 0, 1)}
    assert [(area.kind, area.start) for area in worker.largest] == [
        ("GPU state", 0x51000),
        ("anonymous", 0x53000),
        ("GPU state", 0x54000),
    ]
    assert "GPU state" not in server.kinds
    (snapshot / "images" / AREAS_FILE).write_text("{")
    with pytest.raises(Integrity, match="image-garbled"):
        inspect(snapshot)


def test_pinned_memory_huge_pages_and_every_threads_heap_have_a_name(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    image(images / "pstree.img", [message((1, 10), (2, 0), (5, 10))])
    arena = 0x7F00_0000_0000
    rest = (64 << 20) // PAGE - 2
    process(
        images,
        10,
        "engine",
        [
            vma(0x10000, 2, ANON_PRIVATE, flags=0x2022),
            vma(0x20000, 3, ANON_PRIVATE, advice=1 << 14),
            vma(0x30000, 1, ANON_PRIVATE, flags=0x40022),
            vma(arena, 2, ANON_PRIVATE),
            vma(arena + 2 * PAGE, rest, ANON_PRIVATE, access=0),
            vma(arena * 2, 2, ANON_PRIVATE),
            vma(arena * 2 + 2 * PAGE, 4, ANON_PRIVATE, access=0),
        ],
        [(0x10000, [A, B]), (0x20000, [A, B, C]), (0x30000, [D]), (arena, [A, B]), (arena * 2, [C])],
    )
    (engine,) = inspect(tmp_path).processes
    assert {kind: s.bytes // PAGE for kind, s in engine.kinds.items()} == {
        "huge pages": 4,
        "pinned": 2,
        "heap": 2,
        "anonymous": 1,
    }
    assert list(engine.kinds) == ["huge pages", "pinned", "heap", "anonymous"], "the largest first"


def test_everything_adds_up_to_the_images_bytes(snapshot: Path) -> None:
    found = inspect(snapshot)
    assert found.total.bytes + found.image_files == image_bytes(snapshot / "images")
    assert found.total.bytes == sum(s.bytes for p in found.processes for s in p.kinds.values())
    lines = render(found)
    (line,) = [line for line in lines if line.startswith("the images ")]
    assert f"{image_bytes(snapshot / 'images') / 1e6:.1f}" in line


def test_the_text_names_every_process_and_adds_up(snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "_NAMED", PAGE)
    lines = render(inspect(snapshot))
    assert any("10 server" in line for line in lines)
    assert any("/usr/lib/libx.so" in line for line in lines)
    assert any(line.startswith("all memory") for line in lines)


@pytest.mark.parametrize(
    ("file", "content", "code"),
    [
        ("pages-10.img", A * 3 + b"x", "image-garbled"),
        ("pages-10.img", A * 2, "image-garbled"),
        ("pages-10.img", None, "image-unreadable"),
        ("mm-10.img", b"\0" * 40, "image-garbled"),
        ("mm-10.img", None, "image-unreadable"),
        ("pstree.img", None, "image-unreadable"),
        ("pagemap-10.img", b"abc", "image-garbled"),
    ],
)
def test_damaged_images_are_refused(snapshot: Path, file: str, content: bytes | None, code: str) -> None:
    path = snapshot / "images" / file
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(Integrity) as caught:
        inspect(snapshot)
    assert caught.value.code == code


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 500), st.integers(0, 2**64 - 1) | st.binary(max_size=300)), max_size=20))
def test_messages_are_decoded_as_written(fields: list[tuple[int, int | bytes]]) -> None:
    found = decode(message(*fields))
    expected: dict[int, list[int | bytes]] = {}
    for name, value in fields:
        expected.setdefault(name, []).append(value)
    assert found == expected


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_garbage_images_are_refused(data: bytes) -> None:
    try:
        decode(data)
    except (ValueError, IndexError):
        return


@settings(deadline=None)
@given(cut=st.integers(9, 40))
def test_a_truncated_image_is_refused(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("i") / "x.img"
    image(path, [message((1, b"0123456789" * 4))])
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(Integrity, match="image-garbled"):
        list(messages(path))


def test_fields_are_decoded_by_kind() -> None:
    found = decode(message((1, 5), (1, 6), (2, "name\0"), (3, message((1, 9)))))
    assert number(found, 1) == 6
    assert number(found, 9, 4) == 4
    assert text(found, 2) == "name"
    assert text(found, 8) == ""
    assert [number(m, 1) for m in nested(found, 3)] == [9]
    with pytest.raises(ValueError, match="not a number"):
        number(found, 2)
