"""A store that an attacker can write: its archives cannot plant, replace or read anything on a host."""

from __future__ import annotations

import marshal
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from checkpoint.cli import snapshot as cli
from checkpoint.criu.pagemap import LAZY, PRESENT, BadImage, read_process
from checkpoint.errors import Integrity
from checkpoint.lazy_pages import cache as page_cache
from checkpoint.lazy_pages.copier import Planner
from checkpoint.lazy_pages.read_order import FILE_NAME as READING
from checkpoint.lazy_pages.read_order import ColdReads
from checkpoint.lazy_pages.working_set import BadWorkingSet, WorkingSet
from checkpoint.snapshot import digests, signatures
from checkpoint.store.archive import open_chunks, pull, push
from checkpoint.store.cache_archive import pull_cache, push_cache
from lazyfs.content.chunk_store import ChunkStore
from lazyfs.content.manifest import Chunk, Directory, File, Manifest, Symlink
from tests.kits.checkpoint.criu_images import ANON_PRIVATE, PAGE, image, message, process, vma

pytestmark = pytest.mark.t0
REPO = Path(__file__).parents[4]
HEAP = 0x10000
Forge = Callable[[Manifest, Chunk], Manifest]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "RACY_NS", 0)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def snapshot(home: Path) -> Path:
    folder = home / "snapshots" / "snap"
    for name in ("images", "shm", "tmp", "cache", "weights"):
        (folder / name).mkdir(parents=True)
    process(folder / "images", 7, "p", [vma(HEAP, 8, ANON_PRIVATE)], [(HEAP, [b"a" * PAGE] * 3)], flags=LAZY | PRESENT)
    (folder / "shm/sem").write_bytes(b"s" * 32)
    (folder / "shm/link_remap.1").hardlink_to(folder / "shm/sem")
    (folder / "tmp/link").symlink_to("nowhere")
    (folder / "cache/code.so").write_bytes(b"\x7fELF")
    (folder / "cache/table").write_bytes(b"t" * 32)
    (folder / "weights/layout.json").write_bytes(b"{}")
    seal(folder)
    return folder


def seal(folder: Path) -> None:
    files = {name: msgspec.to_builtins(f) for name, f in digests.digest_folder(folder).items()}
    (folder / "manifest.json").write_bytes(msgspec.json.encode({"format": 1, "name": "snap", "files": files}))


@pytest.fixture
def chunks(tmp_path: Path) -> ChunkStore:
    return open_chunks(f"file://{tmp_path}/store")


def with_file(path: str) -> Forge:
    return lambda m, chunk: msgspec.structs.replace(m, files=(*m.files, File(path, 0o600, chunk.length, (chunk,))))


def with_links(*groups: list[str]) -> Forge:
    return lambda m, _: msgspec.structs.replace(m, meta=m.meta | {"hard-links": msgspec.json.encode(groups).decode()})


def with_symlinks(*links: tuple[str, str]) -> Forge:
    return lambda m, _: msgspec.structs.replace(m, symlinks=tuple(Symlink(*link) for link in links))


def in_folder(folder: str, path: str) -> Forge:
    def forge(m: Manifest, chunk: Chunk) -> Manifest:
        return with_file(path)(
            msgspec.structs.replace(m, directories=(*m.directories, Directory(folder, 0o700))), chunk
        )

    return forge


def swapped(path: str) -> Forge:
    """Return a change that replaces the content of one file by another of the same length."""

    def forge(m: Manifest, chunk: Chunk) -> Manifest:
        files = [
            msgspec.structs.replace(f, chunks=(chunk,), size=chunk.length) if f.path == path else f for f in m.files
        ]
        return msgspec.structs.replace(m, files=tuple(files))

    return forge


FORGED: dict[str, Forge] = {
    "this host's page maps": with_file(".verified-pages"),
    "this host's ledger": with_file(".verified"),
    "this host's view of the images": in_folder(".mapped", ".mapped/facts.json"),
    "a folder of its own": in_folder("more", "more/x"),
    "a file of its own": with_file("while-frozen.sh"),
    "a residency bitmap": with_file(".arriving"),
    "a hard link for the manifest": with_links(["shm/sem", "shm/link_remap.1", "manifest.json"]),
    "a hard link for its signature": with_links(["shm/sem", "shm/link_remap.1", "manifest.sig"]),
    "a hard link for the working set": with_links(["shm/sem", "shm/link_remap.1", "working-set"]),
    "a hard link to the manifest": with_links(["manifest.json", "shm/link_remap.1"]),
    "a hard link in place of other content": with_links(["shm/sem", "shm/link_remap.1", "cache/code.so"]),
    "a hard link to a hard link": with_links(["shm/sem", "shm/link_remap.1"], ["shm/link_remap.1", "shm/sem"]),
    "a hard link in place of as much other content": with_links(["shm/sem", "shm/link_remap.1", "cache/table"]),
    "another target": with_symlinks(("tmp/link", "elsewhere")),
    "another target of the same length": with_symlinks(("tmp/link", "nowhery")),
    "an image that no manifest names": with_file("images/extra.img"),
    "a link out of the compiled code": with_symlinks(("tmp/link", "nowhere"), ("cache/x.so", "/etc/shadow")),
    "a link in the root": with_symlinks(("tmp/link", "nowhere"), ("working-set", "/etc/shadow")),
    "no link": with_symlinks(),
    "a file fewer": lambda m, _: msgspec.structs.replace(
        m, files=tuple(f for f in m.files if f.path != "cache/code.so")
    ),
    "a file of another size": swapped("cache/code.so"),
}
# The code by which each is refused; the others as entries that are no part of a snapshot. All before anything is written.
CODES = {
    "a hard link in place of other content": "file-size-differs",
    "a hard link in place of as much other content": "file-digest-differs",
    "another target": "file-size-differs",
    "another target of the same length": "file-digest-differs",
    "an image that no manifest names": "file-unexpected",
    "no link": "file-missing",
    "a file fewer": "file-missing",
    "a file of another size": "file-size-differs",
}


def forge(chunks: ChunkStore, change: Forge) -> None:
    """Change the archive in the store as an attacker with write access can."""
    chunk = chunks.put_chunk(b"evil").chunk
    manifest = chunks.get_manifest(chunks.get_ref("snapshots", "snap"))
    chunks.set_ref("snapshots", "snap", chunks.put_manifest(change(manifest, chunk)))


@pytest.mark.parametrize("what", FORGED)
def test_only_files_named_by_the_manifest_are_pulled(
    snapshot: Path, chunks: ChunkStore, tmp_path: Path, what: str
) -> None:
    push(snapshot, chunks)
    if what == "a file of another size":
        chunk = chunks.put_chunk(b"longer than it was").chunk
        forge(chunks, lambda m, _: FORGED[what](m, chunk))
    else:
        forge(chunks, FORGED[what])
    with pytest.raises(Integrity) as caught:
        pull("snap", chunks, tmp_path / "other/snap")
    assert caught.value.code == CODES.get(what, "archive-entry-refused")
    assert "the archive" in str(caught.value), "refused by its stated content, before anything is written"
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "other").iterdir()) == []


def test_host_specific_files_are_not_pushed(snapshot: Path, chunks: ChunkStore, tmp_path: Path) -> None:
    for name in (".verified-pages", "working-set.12.tmp", "while-frozen.sh"):
        (snapshot / name).write_bytes(b"x")
    push(snapshot, chunks)
    pull("snap", chunks, tmp_path / "other/snap")
    known = {"images", "shm", "tmp", "cache", "weights", "manifest.json", ".verified"}
    assert {path.name for path in (tmp_path / "other/snap").iterdir()} == known


# Signatures


def run(home: Path, *words: object) -> str:
    result = CliRunner().invoke(cli, [str(w) for w in words], env={"QUICKTHAW_HOME": str(home)}, standalone_mode=False)
    return str(result.exception or "")


@pytest.fixture
def signed(snapshot: Path, tmp_path: Path) -> Path:
    """Sign the snapshot; return the public key."""
    signatures.keygen(tmp_path / "key")
    (snapshot / "manifest.sig").write_bytes(
        signatures.signer(tmp_path / "key")((snapshot / "manifest.json").read_bytes())
    )
    WorkingSet([(7, HEAP, HEAP + PAGE)], 1).save(str(snapshot / "working-set"))
    return tmp_path / "key.pub"


def test_a_signed_manifest_cannot_be_replaced_after_its_check(
    snapshot: Path, signed: Path, chunks: ChunkStore, tmp_path: Path
) -> None:
    push(snapshot, chunks)
    document = (snapshot / "manifest.json").read_bytes().replace(b'"format":1', b'"format":2')
    chunk = chunks.put_chunk(document).chunk

    def evil(m: Manifest, _: Chunk) -> Manifest:
        # The checked manifest does not name it; its replacement does.
        return with_links(["shm/sem", "shm/link_remap.1"], ["tmp/m", "manifest.json"])(
            with_file("tmp/m")(m, chunk), chunk
        )

    forge(chunks, evil)
    error = run(tmp_path / "other", "pull", "snap", chunks.store.url, "--trust-key", signed)
    assert "archive-entry-refused" in error
    assert list((tmp_path / "other/snapshots").iterdir()) == []


@pytest.mark.parametrize("whole", [True, False])
def test_a_working_set_is_accepted_from_signed_archives_only(
    snapshot: Path, signed: Path, chunks: ChunkStore, tmp_path: Path, whole: bool
) -> None:
    words = ["--sign-key", tmp_path / "key"] if whole else []
    assert run(snapshot.parents[1], "push", "snap", chunks.store.url, *words) == ""
    assert run(tmp_path / "other", "pull", "snap", chunks.store.url, "--trust-key", signed) == ""
    pulled = tmp_path / "other/snapshots/snap"
    assert (pulled / "working-set").exists() == whole
    assert (pulled / "manifest.json").read_bytes() == (snapshot / "manifest.json").read_bytes()
    assert run(tmp_path / "third", "pull", "snap", chunks.store.url) == ""
    assert (tmp_path / "third/snapshots/snap/working-set").exists()


def test_a_forged_working_set_of_a_signed_archive_is_refused(
    snapshot: Path, signed: Path, chunks: ChunkStore, tmp_path: Path
) -> None:
    assert run(snapshot.parents[1], "push", "snap", chunks.store.url, "--sign-key", tmp_path / "key") == ""
    WorkingSet([(7, HEAP, HEAP + 2 * PAGE)], 1).save(str(snapshot / "working-set"))
    assert run(snapshot.parents[1], "push", "snap", chunks.store.url) == ""
    assert run(tmp_path / "other", "pull", "snap", chunks.store.url, "--trust-key", signed) == ""
    assert not (tmp_path / "other/snapshots/snap/working-set").exists()


# Caches beside a snapshot


def test_cache_files_are_never_unmarshalled() -> None:
    modules = [path for folder in ("checkpoint", "lazyfs", "plugin") for path in (REPO / folder).rglob("*.py")]
    bad = [path for path in modules if {"import marshal", "import pickle"} & set(path.read_text().splitlines())]
    assert bad == []


def plant(images: str, name: str, body: bytes) -> None:
    """Write a cache of any content with the right digest."""
    Path(page_cache.path(images, name)).write_bytes(page_cache.blake2b(body).digest() + body)


def test_cached_page_maps_of_another_format_are_ignored(snapshot: Path) -> None:
    images = str(snapshot / "images")
    stamps = page_cache.fingerprints(images)
    found, _ = page_cache.read_page_maps(images, stamps)
    plant(images, page_cache.PAGE_MAPS, marshal.dumps((3, "x", stamps, [])))
    again, kept = page_cache.read_page_maps(images, stamps)
    assert not kept and set(again) == set(found)


def test_no_path_is_read_from_a_cached_list(snapshot: Path, tmp_path: Path) -> None:
    working_set = WorkingSet([(7, HEAP, HEAP + PAGE)], 1)
    working_set.digest = b"digest"
    images = str(snapshot / "images")
    ColdReads(images).write(working_set, {7: read_process(images, 7)}, {}, False)
    assert ColdReads(images).working_set == b"digest"
    data = Path(page_cache.path(images, READING)).read_bytes()[64:]
    for name in (b"../../x.im", b"/etc/shado"):
        assert b"pages-7.img" in data
        plant(images, READING, data.replace(b"pages-7.img", name + b"g", 1))
        assert ColdReads(images).working_set == b""


# Validation of images and working sets


def page_map(folder: Path, *entries: tuple[int, int]) -> str:
    image(
        folder / "pagemap-7.img",
        [message((1, 1)), *[message((1, at), (2, n), (4, LAZY | PRESENT)) for at, n in entries]],
    )
    return str(folder)


def test_a_page_map_larger_than_its_file_is_refused(snapshot: Path) -> None:
    images = snapshot / "images"
    number = next(images.glob("pages-*.img")).stem.partition("-")[2]
    image(images / "pagemap-7.img", [message((1, int(number))), message((1, HEAP), (2, 4), (4, LAZY | PRESENT))])
    with pytest.raises(BadImage, match="more pages"):
        Planner(str(images), None)


@pytest.mark.parametrize(
    "entries", [((HEAP, 2), (HEAP + PAGE, 1)), ((HEAP + 1, 1),), ((1 << 60, 1),), ((HEAP, 1 << 60),)]
)
def test_a_page_map_with_overlapping_or_unmapped_pages_is_refused(
    snapshot: Path, entries: tuple[tuple[int, int], ...]
) -> None:
    with pytest.raises(BadImage):
        read_process(page_map(snapshot / "images", *entries), 7)


def test_a_working_set_of_terabytes_is_refused(snapshot: Path) -> None:
    planner = Planner(str(snapshot / "images"), None)
    path = str(snapshot / "working-set")
    WorkingSet([(7, HEAP, HEAP + 8 * PAGE)], 1).save(path)
    assert planner.working_set(path).first == 1
    for ranges in ([(7, HEAP, HEAP + (1 << 40))], [(7, HEAP, HEAP + (1 << 29))] * 3, [(8, 0, 2 << 30)]):
        WorkingSet(ranges, 1).save(path)
        with pytest.raises(BadWorkingSet, match="more than its image"):
            planner.working_set(path)


# Compiled code


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    (folder / "flashinfer/op").mkdir(parents=True)
    for at, name in enumerate(("build.ninja", "op.o", "op.so", ".ninja_log")):
        (folder / "flashinfer/op" / name).write_bytes(name.encode())
        os.utime(folder / "flashinfer/op" / name, ns=(5, 1_700_000_000_123_456_789 + at))
    return folder


def test_pulled_files_keep_their_mtimes_for_ninja(cache: Path, chunks: ChunkStore, tmp_path: Path) -> None:
    push_cache(cache, chunks, "compile-x")
    pull_cache("compile-x", chunks, tmp_path / "other")
    for path in (path for path in cache.rglob("*") if path.is_file()):
        assert (tmp_path / "other" / path.relative_to(cache)).stat().st_mtime_ns == path.stat().st_mtime_ns


def test_a_ninja_build_folder_is_pulled_completely_or_not_at_all(
    cache: Path, chunks: ChunkStore, tmp_path: Path
) -> None:
    (cache / "other.so").write_bytes(b"so")
    push_cache(cache, chunks, "compile-x")
    half = tmp_path / "other/flashinfer/op/op.o"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"of a build that was killed")
    assert pull_cache("compile-x", chunks, tmp_path / "other") == 1
    assert [path.name for path in half.parent.iterdir()] == ["op.o"]


def test_compiled_code_of_another_host_is_not_pulled(cache: Path, chunks: ChunkStore, tmp_path: Path) -> None:
    push_cache(cache, chunks, "compile-x")
    chunks.set_ref("snapshots", "compile-y", chunks.get_ref("snapshots", "compile-x"))
    with pytest.raises(Integrity, match="compile-cache-misplaced"):
        pull_cache("compile-y", chunks, tmp_path / "other")


@pytest.mark.parametrize("target", ["/etc", "../../etc", "flashinfer/../../x"])
def test_compiled_code_with_links_to_the_outside_is_refused(
    cache: Path, chunks: ChunkStore, tmp_path: Path, target: str
) -> None:
    (cache / "link").symlink_to(target)
    push_cache(cache, chunks, "compile-x")
    with pytest.raises(Integrity, match="archive-entry-refused"):
        pull_cache("compile-x", chunks, tmp_path / "other")
    assert not os.path.lexists(tmp_path / "other/link")


def test_compiled_code_needs_a_signature_with_trust_keys(cache: Path, chunks: ChunkStore, tmp_path: Path) -> None:
    signatures.keygen(tmp_path / "key")
    keys = [tmp_path / "key.pub"]
    push_cache(cache, chunks, "compile-x")
    with pytest.raises(Integrity, match="compile-cache-unsigned"):
        pull_cache("compile-x", chunks, tmp_path / "other", keys)
    push_cache(cache, chunks, "compile-x", signatures.signer(tmp_path / "key"))
    assert pull_cache("compile-x", chunks, tmp_path / "other", keys) == 4
