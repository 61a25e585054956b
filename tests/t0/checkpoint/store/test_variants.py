"""Of one launch a store keeps a snapshot for each kind of host, and a host takes the one that fits."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from checkpoint.compatibility import gpu
from checkpoint.compatibility.gpu import Gpu
from checkpoint.compatibility.host import HostFacts, host_facts
from checkpoint.compatibility.host_class import accepts, class_of, host_class
from checkpoint.errors import Incompatible
from checkpoint.snapshot import manifest
from checkpoint.snapshot.library import Library
from checkpoint.store import archive, variants
from checkpoint.store.archive import open_chunks
from checkpoint.store.remote_restore import RemoteSnapshot
from lazyfs.admin.listing import listing, remove
from lazyfs.content.chunk_store import ChunkStore
from lazyfs.content.manifest import Manifest
from lazyfs.errors import LazyfsError, NotFound, Permanent
from plugin.rehearsal.push import has
from plugin.rehearsal.push import push as push_once
from tests.kits.checkpoint.small_snapshot import NEW, OLD, identity, write

pytestmark = pytest.mark.t0
NAME = "vllm-llama-0123456789"


@pytest.fixture
def chunks(tmp_path: Path) -> ChunkStore:
    return open_chunks(str(tmp_path / "store"))


def push(tmp_path: Path, chunks: ChunkStore, host: HostFacts | None, where: str, name: str = NAME) -> str:
    """Push a snapshot that was taken on `host`; return the archive's digest."""
    return archive.push(write(Library(tmp_path / where), name, host), chunks).digest


def opened(chunks: ChunkStore, host: HostFacts) -> str:
    """Return the digest of the archive that a host opens."""
    return variants.open_fitting(NAME, chunks, host_class(host), accepts(host, NAME)).digest


def names(chunks: ChunkStore) -> list[str]:
    return sorted(chunks.ref_names("snapshots"))


def test_each_kind_of_host_finds_its_own_whichever_was_pushed_last(tmp_path: Path, chunks: ChunkStore) -> None:
    by_host = {}
    for number, host in enumerate((OLD, NEW)):
        by_host[host] = push(tmp_path, chunks, host, str(number))
    for _ in range(2):
        assert {host: opened(chunks, host) for host in by_host} == by_host
        by_host[OLD] = push(tmp_path, chunks, OLD, "again")  # and is the one pushed last
    assert names(chunks) == sorted([NAME, *(f"{NAME}:{host_class(host)}" for host in by_host)])


def test_a_host_of_a_third_kind_takes_the_one_that_fits_it_wherever_it_is(tmp_path: Path, chunks: ChunkStore) -> None:
    fits = push(tmp_path, chunks, OLD, "old")
    push(tmp_path, chunks, NEW, "new")
    third = msgspec.structs.replace(OLD, kernel="6.1.0", cpu_flags=("avx2", "avx512f", "sse2"))
    assert host_class(third) not in (host_class(OLD), host_class(NEW))
    assert opened(chunks, third) == fits


def test_none_that_fits_is_refused_with_the_reasons_of_the_one_pushed_last(tmp_path: Path, chunks: ChunkStore) -> None:
    push(tmp_path, chunks, OLD, "old")
    push(tmp_path, chunks, NEW, "new")
    with pytest.raises(Incompatible) as refused:
        opened(chunks, msgspec.structs.replace(OLD, kernel="4.19.0"))
    assert refused.value.code == "kernel-older" and "7.2.0 in the snapshot" in str(refused.value)


def test_none_at_all_is_not_found_and_the_store_is_not_listed(
    chunks: ChunkStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(chunks.store), "list", None)
    with pytest.raises(NotFound, match=NAME):
        opened(chunks, OLD)


def test_what_an_older_quickthaw_pushed_is_found_and_it_finds_ours(tmp_path: Path, chunks: ChunkStore) -> None:
    before = push(tmp_path, chunks, None, "before")
    assert names(chunks) == [NAME] and opened(chunks, NEW) == before
    ours = push(tmp_path, chunks, OLD, "old")
    assert archive.OpenedArchive.of(NAME, chunks).digest == ours


def test_a_store_that_cannot_be_listed_still_gives_its_own_and_the_last(
    tmp_path: Path, chunks: ChunkStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise Permanent("cannot be listed")

    found = {host: push(tmp_path, chunks, host, host.cpu_model) for host in (OLD, NEW)}
    monkeypatch.setattr(type(chunks.store), "list", refuse)
    assert {host: opened(chunks, host) for host in found} == found
    with pytest.raises(Incompatible):
        opened(chunks, msgspec.structs.replace(OLD, kernel="6.1.0", machine="arm64"))


def test_a_push_of_one_kind_does_not_count_for_another(tmp_path: Path, chunks: ChunkStore) -> None:
    ours, theirs = Library(tmp_path / "ours"), Library(tmp_path / "theirs")
    folders = [write(ours, NAME, OLD, b"a" * 4096), write(theirs, NAME, NEW, b"a" * 4096)]
    for folder in folders:
        (folder / "rehearsed").write_text("{}")
    assert push_once(ours, NAME, str(tmp_path / "store")) > 0
    assert [has(folder, chunks) for folder in folders] == [True, False]
    push_once(theirs, NAME, str(tmp_path / "store"))
    assert [has(folder, chunks) for folder in folders] == [True, True]


def test_a_download_opens_the_one_of_this_kind(tmp_path: Path, chunks: ChunkStore) -> None:
    here = host_facts()
    other = msgspec.structs.replace(here, page_size=here.page_size * 2)
    mine = push(tmp_path, chunks, here, "here")
    push(tmp_path, chunks, other, "other")
    found = RemoteSnapshot.open(Library(tmp_path / "home"), str(tmp_path / "store"), NAME, host=host_class(here))
    found.close()
    assert found.opened.digest == mine


def test_removing_a_snapshot_from_a_store_removes_it_of_every_kind(tmp_path: Path, chunks: ChunkStore) -> None:
    push(tmp_path, chunks, OLD, "old")
    push(tmp_path, chunks, NEW, "new")
    push(tmp_path, chunks, NEW, "other", "vllm-llama-01234567890")  # its name begins with the other one's
    removed = remove(chunks, NAME)
    assert len([one for one in removed if one.startswith("snapshot ")]) == 3 and len(removed) == 5
    assert {name for entry in listing(chunks) for name in entry.names} == {
        "vllm-llama-01234567890",
        f"vllm-llama-01234567890:{host_class(NEW)}",
    }


def test_removing_a_tag_leaves_the_snapshots_of_that_name(tmp_path: Path, chunks: ChunkStore) -> None:
    digest = push(tmp_path, chunks, OLD, "old")
    chunks.set_ref("tags", f"{NAME}:latest", chunks.put_manifest(Manifest(1, "weights", (), (), ())))
    assert [one.split()[0] for one in remove(chunks, NAME)] == ["tag", "manifest"]
    assert chunks.get_ref("snapshots", NAME) == digest == opened(chunks, OLD)


def test_a_snapshot_whose_name_was_damaged_is_removed_by_it_once_more(tmp_path: Path, chunks: ChunkStore) -> None:
    push(tmp_path, chunks, OLD, "old")
    chunks.store.put(chunks.ref_key("snapshots", NAME), b"damaged")
    assert remove(chunks, NAME) == [f"snapshot {NAME}"]
    assert remove(chunks, NAME)[0] == f"snapshot {NAME}:{host_class(OLD)}"
    assert not list(listing(chunks))


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"kernel": "5.15.99-cloud"}, True),
        ({"kernel": "5.16.0"}, False),
        ({"kernel": "strange"}, False),
        ({"machine": "aarch64"}, False),
        ({"cpu_flags": ("avx2", "sse2", "smep")}, True),  # no program can depend on it
        ({"cpu_flags": ("sse2",)}, False),
        ({"cpu_model": "other", "cpus": 96, "criu": "4.2.1"}, True),
        ({"driver": "580.1"}, False),
        ({"gpus": (Gpu("NVIDIA H100", 80 << 30, "GPU-a"),)}, False),
    ],
)
def test_the_class_is_of_what_a_restore_compares(change: dict[str, object], same: bool) -> None:
    other = msgspec.structs.replace(OLD, **change)
    assert (host_class(other) == host_class(OLD)) is same
    assert class_of(identity(other).encode()) == host_class(other)
    ChunkStore._check_ref("snapshots", variants.reference(NAME, host_class(other)))  # raises for what is no name


def test_gpus_of_one_kind_are_one_class() -> None:
    gpus = [msgspec.structs.replace(OLD, gpus=(Gpu("NVIDIA H100", 80 << 30, uuid),)) for uuid in ("GPU-a", "GPU-b")]
    assert len({host_class(host) for host in gpus}) == 1


@pytest.mark.parametrize(
    ("then", "here", "code"),
    [
        (["H100"], ["H100", "H100"], ""),  # a launch makes one of them visible
        (["H100"], ["A100", "H100"], ""),
        (["H100"], ["A100", "A100"], "gpu-count-differs"),
        (["H100"], ["A100"], "gpu-model-differs"),
        (["H100", "H100"], ["H100"], "gpu-count-differs"),
        ([], ["H100"], "gpu-count-differs"),
    ],
)
def test_of_more_gpus_those_that_fit_are_compared(tmp_path: Path, then: list[str], here: list[str], code: str) -> None:
    taken, host = (
        msgspec.structs.replace(
            OLD, driver="580.1", gpus=tuple(Gpu(name, 80 << 30, f"GPU-{at}") for at, name in enumerate(names))
        )
        for names in (then, here)
    )
    document = (write(Library(tmp_path), NAME, taken) / manifest.FILE_NAME).read_bytes()
    if not code:
        accepts(host, NAME)(document, None)
        return
    with pytest.raises(Incompatible) as refused:
        accepts(host, NAME)(document, None)
    assert refused.value.code == code


def test_a_manifest_that_does_not_say_its_host_has_no_class() -> None:
    assert class_of({}) == class_of({"host": 1}) == ""
    assert (
        variants.reference("a", "") == "a" and variants.split("a:b") == ("a", "b") and variants.split("a") == ("a", "")
    )


def test_errors_of_the_store_are_not_swallowed(chunks: ChunkStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise Permanent("no", code="permission-denied")

    monkeypatch.setattr(chunks.store, "get", fail)
    with pytest.raises(LazyfsError, match="no"):
        opened(chunks, OLD)


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (u@h)  Tue", "580.95.05"),
        ("something else", ""),
    ],
)
def test_a_container_without_a_gpu_compares_the_kernels_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, version: str
) -> None:
    monkeypatch.setattr(gpu, "_KERNEL_DRIVER", tmp_path / "version")
    (tmp_path / "version").write_text(f"{line}\nGCC version:  gcc version 12.3.0 (Ubuntu)\n")
    assert gpu.kernel_driver() == version
    for driver, fits in (("580.95.05", version in ("580.95.05", "")), ("1.2", not version)):
        taken = msgspec.structs.replace(OLD, gpus=(Gpu("NVIDIA H100", 80 << 30, "GPU-a"),), driver=driver)
        document = (write(Library(tmp_path / driver), NAME, taken) / manifest.FILE_NAME).read_bytes()
        if fits:
            accepts(OLD, NAME)(document, None)
            continue
        with pytest.raises(Incompatible, match="driver-"):
            accepts(OLD, NAME)(document, None)
    monkeypatch.setattr(gpu, "_KERNEL_DRIVER", tmp_path / "nothing")
    assert gpu.kernel_driver() == ""
