"""Every way to change a model's folder changes the digest of its files, which an index of stat fields answers if nothing changed. What
is not content does not change it.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoint.compatibility import model_files
from checkpoint.compatibility.model_files import ModelFiles
from checkpoint.errors import Incompatible
from plugin.runtime.steps.model_mount import Weights, local_model

pytestmark = pytest.mark.t0


def keep_times(path: Path, before: os.stat_result) -> None:
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def overwrite(path: Path, data: bytes = b"#", at: int = 100) -> None:
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)
    keep_times(path, before)


def through_a_mapping(path: Path) -> None:
    before = path.stat()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[200] ^= 255
        memory.flush()
    keep_times(path, before)


def through_another_name(path: Path) -> None:
    other = path.parent.parent / "other"
    os.link(path, other)
    overwrite(other)
    other.unlink()


def replaced_by_a_copy(path: Path) -> None:
    new = path.with_name("new")
    shutil.copy2(path, new)
    data = bytearray(new.read_bytes())
    data[5] ^= 255
    before = path.stat()
    new.write_bytes(data)
    keep_times(new, before)
    new.replace(path)


def swapped(path: Path) -> None:
    other, aside = path.with_name("second.safetensors"), path.with_name("aside")
    path.rename(aside)
    other.rename(path)
    aside.rename(other)


def folder_exchanged(path: Path) -> None:
    folder = path.parent
    other = folder.parent / "copy"
    shutil.copytree(folder, other, copy_function=shutil.copy2)
    overwrite(other / path.name)
    folder.rename(folder.parent / "old")
    other.rename(folder)


def punched(path: Path) -> None:
    before = path.stat()
    with path.open("r+b") as file:
        file.truncate(1000)
        file.truncate(before.st_size)
    keep_times(path, before)


CHANGES: dict[str, Callable[[Path], object]] = {
    "a byte in place": overwrite,
    "a byte at the end in place": lambda path: overwrite(path, at=path.stat().st_size - 1),
    "through a mapping": through_a_mapping,
    "through another name": through_another_name,
    "a copy with the same times": replaced_by_a_copy,
    "two files swapped": swapped,
    "the folder exchanged": folder_exchanged,
    "zeros instead of data": punched,
    "a file more": lambda path: (path.parent / "chat_template.jinja").write_text("x"),
    "a file less": lambda path: (path.parent / "second.safetensors").unlink(),
    "a file renamed": lambda path: path.rename(path.with_name("renamed.safetensors")),
    "a byte appended": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "the configuration": lambda path: overwrite(path.with_name("config.json"), b"7", 5),
    "the target of a link": lambda path: overwrite(path.parent.parent / "blob"),
    "where a link leads": lambda path: (
        path.with_name("linked.safetensors").unlink(),
        path.with_name("linked.safetensors").symlink_to(path.parent.parent / "blob2"),
    ),
}


UNCHANGED: dict[str, Callable[[Path], object]] = {
    "its mode": lambda path: path.chmod(0o600),
    "its times": lambda path: os.utime(path, (1, 1)),
    "a copy of the same content": lambda path: (
        shutil.copy(path, path.with_name("n")),
        path.with_name("n").replace(path),
    ),
    "the hub's notes on a download": lambda path: (
        (path.parent / ".cache").mkdir(),
        (path.parent / ".cache" / "model.metadata").write_text("x"),
    ),
    "the folder's name": lambda path: (
        path.parent.rename(path.parent.with_name("other")),
        path.parent.symlink_to(path.parent.with_name("other")),
    ),
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for number, name in enumerate(("first.safetensors", "second.safetensors")):
        (folder / name).write_bytes(bytes((i * 31 + number) % 251 for i in range(4096)) * 16)
    for number, name in enumerate(("blob", "blob2")):
        (tmp_path / name).write_bytes(bytes([number + 1]) * 5000)
    (folder / "linked.safetensors").symlink_to(tmp_path / "blob")
    (folder / "config.json").write_text('{"a": 1, "architectures": []}')
    return folder


def weights(model: Path) -> Weights:
    return Weights(str(model), model.parent / "home", None, True)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_has_another_digest(model: Path, change: str) -> None:
    before = weights(model).digest
    assert weights(model).digest == before
    CHANGES[change](model / "first.safetensors")
    after = weights(model).digest
    assert after != before
    assert weights(model).digest == after


@pytest.mark.parametrize("change", UNCHANGED)
def test_metadata_does_not_change_the_digest(model: Path, change: str) -> None:
    before = weights(model)
    sketch, digest = before.sketch, before.digest
    UNCHANGED[change](model / "first.safetensors")
    after = weights(model)
    assert (after.sketch, after.digest) == (sketch, digest)


def test_a_known_digest_reads_no_file(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = weights(model)
    sketch, digest = first.sketch, first.digest
    monkeypatch.setattr(model_files, "_read", None)
    monkeypatch.setattr(model_files.ModelFiles, "_sample", None)
    again = weights(model)
    assert again.content and again.content.files.known_digest() == digest
    assert again.content.verified_digest(0.0) == digest
    monkeypatch.undo()
    assert again.sketch == sketch


def test_a_model_that_changes_during_a_start_is_refused_by_name(model: Path) -> None:
    started = weights(model)
    assert started.content and started.sketch
    started.content.begin()
    overwrite(model / "first.safetensors")
    with pytest.raises(Incompatible, match="was changed while the engine started") as caught:
        started.content.verified_digest(10.0)
    assert caught.value.code == "inputs-changed"


def test_a_snapshot_does_not_wait_for_a_slow_digest(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    read = model_files._read
    monkeypatch.setattr(model_files, "_read", lambda *arguments: go.wait(30) and read(*arguments))
    started = weights(model)
    assert started.content
    started.content.begin()
    with pytest.raises(Incompatible) as caught:
        started.content.verified_digest(0.05)
    assert caught.value.code == "model-unread"
    go.set()
    digest = started.content.verified_digest(10.0)
    assert weights(model).content.files.known_digest() == digest  # type: ignore[union-attr]


def test_a_failed_digest_is_computed_again_by_the_next_cold_start(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> str:
        raise OSError(errno.EIO, "Input/output error")

    started = weights(model)
    assert started.content
    with monkeypatch.context() as broken:
        broken.setattr(model_files, "_read", failing)
        started.content.begin()
        with pytest.raises(Incompatible) as caught:
            started.content.verified_digest(10.0)
    assert caught.value.code == "model-unread"
    started.content.begin()
    assert len(started.content.verified_digest(10.0)) == 64


def test_models_with_equal_headers_have_different_sketches(tmp_path: Path) -> None:
    """Fine-tunes of one model: the same names, sizes and headers, but other values."""
    found = set()
    for seed in (1, 2):
        folder = tmp_path / str(seed)
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(bytes(1 << 17) + bytes([seed]) * (1 << 20))
        found.add(weights(folder).sketch)
    assert len(found) == 2


def test_a_single_file_model_includes_its_shards_and_tokenizer(tmp_path: Path) -> None:
    model = tmp_path / "m-00001-of-00002.gguf"
    for name in (model.name, "m-00002-of-00002.gguf", "tokenizer.json", "other.gguf", "notes.md"):
        (tmp_path / name).write_text(name)
    assert set(ModelFiles(model, tmp_path / "home").files) == {model.name, "m-00002-of-00002.gguf", "tokenizer.json"}


def test_a_hub_models_revision_is_read_from_an_options_file(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--acme--tiny"
    for revision in ("main", "v2"):
        (repository / "snapshots" / f"c-{revision}").mkdir(parents=True)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(f"c-{revision}")
    file = tmp_path / "engine.yaml"
    file.write_text("{model: acme/tiny, revision: v2}")
    found = local_model("acme/tiny", ["--config", str(file)], {"HF_HUB_CACHE": str(tmp_path / "hub")})
    assert found == repository / "snapshots" / "c-v2"
