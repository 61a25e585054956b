"""A launch's compile cache and its store."""

import logging

import pytest

from plugin.runtime.steps.compile_cache import CompileCache

pytestmark = pytest.mark.t0


@pytest.mark.parametrize(
    ("store", "said"),
    [("https://127.0.0.1:1/store", ""), ("store", "kept in"), ("file/store", "compile cache not pushed")],
)
def test_a_store_that_is_only_read_gets_nothing_and_is_not_complained_of(tmp_path, caplog, store, said):
    (tmp_path / "file").touch()
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "kernel.so").write_bytes(b"x")
    with caplog.at_level(logging.INFO, "quickthaw"):
        url = store if "://" in store else str(tmp_path / store)
        CompileCache(folder, url, f"compile-vllm-{'a' * 16}").push_later().join(20)
    assert said in caplog.text and bool(caplog.text) is bool(said)
