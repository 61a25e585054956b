"""A compile cache downloaded from a store, used by the real ninja: nothing of it is built again."""

import shutil
import subprocess

import pytest

from checkpoint.store.archive import open_chunks
from checkpoint.store.cache_archive import pull_cache, push_cache

pytestmark = [
    pytest.mark.t1,
    pytest.mark.skipif(
        shutil.which("ninja") is None, reason="there is no ninja on this host (apt install ninja-build)"
    ),
]
# Like the build files of PyTorch's extensions and FlashInfer; `cp` is used as the compiler.
BUILD = """\
ninja_required_version = 1.3
rule compile
  command = cp $in $out && printf '$out: source.cpp header.h\\n' > $out.d
  deps = gcc
  depfile = $out.d
rule link
  command = cp $in $out
build op.o: compile source.cpp
build op.so: link op.o
"""


def ninja(folder, *options):
    done = subprocess.run(["ninja", *options, "-C", folder], capture_output=True, text=True, timeout=30, check=True)
    return done.stdout


def test_nothing_is_built_again(tmp_path):
    folder = tmp_path / "compile" / "flashinfer" / "op"
    folder.mkdir(parents=True)
    for name, content in (("source.cpp", "code"), ("header.h", "more"), ("build.ninja", BUILD)):
        (folder / name).write_text(content)
    assert "[2/2]" in ninja(folder)
    chunks = open_chunks(f"file://{tmp_path}/store")
    push_cache(tmp_path / "compile", chunks, "compile-x")
    pull_cache("compile-x", chunks, tmp_path / "another home")
    fetched = tmp_path / "another home" / "flashinfer" / "op"
    assert "no work to do" in ninja(fetched, "-n")
    (fetched / "header.h").write_text("changed")
    assert "[1/2]" in ninja(fetched, "-n")
