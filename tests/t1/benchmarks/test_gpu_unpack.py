"""What is prepared for a machine without network unpacks beside that machine's own packages; half of it is never used."""

import lzma
import subprocess
import tarfile

import pytest
from click.testing import CliRunner

from benchmarks import gpu_prepare
from benchmarks.gpu_prepare import Engine, add_text, prepare
from benchmarks.gpu_unpack import unpack

pytestmark = [pytest.mark.t1, pytest.mark.slow]


def archive(file, **texts):
    with tarfile.open(file, "w:xz") as found:
        for name, text in texts.items():
            add_text(found, name.replace("__", "/"), text)


@pytest.fixture
def carried(tmp_path):
    folder = tmp_path / "carried"
    folder.mkdir()
    archive(
        folder / "site.tar.xz",
        carried__init="",
        **{"carried.py": "WORD = 'carried'", "click.py": "WORD = 'ours first'"},
    )
    archive(folder / "criu.tar.xz", criu__criu="#!/bin/sh\n")
    archive(folder / "tokenizer.tar.xz", **{"tokenizer.json": "{}"})
    return folder


def test_carried_packages_come_before_the_machines_own(carried, tmp_path):
    python = unpack(carried, tmp_path / "gpu")
    code = "import carried, click, msgspec; print(carried.WORD, click.WORD, msgspec.__file__.count('gpu/venv'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split("\n")[0] == "carried ours first 0"
    assert (tmp_path / "gpu/home/criu/criu").exists() and (tmp_path / "gpu/tokenizer/tokenizer.json").exists()
    before = python.lstat().st_mtime_ns
    assert unpack(carried, tmp_path / "gpu") == python and python.lstat().st_mtime_ns == before


def test_a_damaged_archive_is_not_taken_for_an_environment(carried, tmp_path):
    whole = (carried / "tokenizer.tar.xz").read_bytes()
    (carried / "tokenizer.tar.xz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises((tarfile.TarError, lzma.LZMAError, EOFError)):
        unpack(carried, tmp_path / "gpu")
    (carried / "tokenizer.tar.xz").write_bytes(whole)
    python = unpack(carried, tmp_path / "gpu")
    assert subprocess.run([python, "-c", "import carried"], check=False, timeout=60).returncode == 0


def test_a_download_that_fails_leaves_nothing_that_would_travel(monkeypatch, tmp_path):
    def download(wheels, folder):
        (folder / "half.whl").write_bytes(b"half")
        raise subprocess.CalledProcessError(1, ["pip", "download"])

    monkeypatch.setattr(gpu_prepare, "download", download)
    monkeypatch.setitem(gpu_prepare.ENGINES, "vllm", Engine(("one==1.0",), "^$"))
    done = CliRunner().invoke(prepare, ["--engine", "vllm", "--to", str(tmp_path / "gpu")])
    assert done.exit_code == 1 and "nothing was prepared" in done.output
    assert [*(tmp_path / "gpu").iterdir()] == []
