"""However a model's folder is changed, a launch sees it: the digest of its manifest is another one (a stat cache answers when nothing
changed)."""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from plugin.runtime.model_mount import Weights

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
    "what a link leads to": lambda path: overwrite(path.parent.parent / "blob"),
    "where a link leads": lambda path: (
        path.with_name("linked.safetensors").unlink(),
        path.with_name("linked.safetensors").symlink_to(path.parent.parent / "blob2"),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_has_another_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("QUICKTHAW_HOME", str(home))
    folder = tmp_path / "model"
    folder.mkdir()
    for number, name in enumerate(("first.safetensors", "second.safetensors")):
        (folder / name).write_bytes(bytes((i * 31 + number) % 251 for i in range(4096)) * 16)
    for number, name in enumerate(("blob", "blob2")):
        (tmp_path / name).write_bytes(bytes([number + 1]) * 5000)
    (folder / "linked.safetensors").symlink_to(tmp_path / "blob")
    (folder / "config.json").write_text('{"a": 1, "architectures": []}')

    def digest() -> str:
        return Weights(str(folder), home, None, True).digest

    before = digest()
    assert digest() == before
    CHANGES[change](folder / "first.safetensors")
    after = digest()
    assert after != before
    assert digest() == after
