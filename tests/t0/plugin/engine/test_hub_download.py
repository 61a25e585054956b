"""Which files of a hub repository are downloaded: those that the engine would download. The hub is a list of names here;
tests/t1/plugin/launch uses a server.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from plugin.engine.hub_download import INDEX, Download, Refused, complete

pytestmark = pytest.mark.t0
TEXT = ["README.md", "config.json", "tokenizer.json", "modeling.py", "chat_template.jinja"]


class Listed:
    """huggingface_hub for a repository with these names."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder, self.names, self.asked = folder, names, []  # type: ignore[var-annotated]

    def HfApi(self) -> Any:
        siblings = [SimpleNamespace(rfilename=name) for name in self.names]
        return SimpleNamespace(model_info=lambda name, revision, timeout: SimpleNamespace(siblings=siblings))

    def hf_hub_download(self, name: str, file: str, **_: object) -> str:
        return str(self.folder / file)

    def snapshot_download(self, name: str, *, allow_patterns: list[str], **_: object) -> str:
        self.asked.append((name, sorted(allow_patterns)))
        return str(self.folder)


def fetched(folder: Path, names: list[str], part: str = "model", **more: object) -> list[str]:
    """Return the files of a repository that are downloaded."""
    hub = Listed(folder, names)
    request = {"cache": None, "engine": "vllm", "load_format": "auto", "remote_code": False, "code_revision": None}
    Download(hub, request | more).repository("acme/m", None, part)
    return hub.asked[0][1]


SAFE = ["model-1.safetensors", "model-2.safetensors"]


@pytest.mark.parametrize(
    ("names", "more", "expected"),
    [
        (
            [*SAFE, "pytorch_model.bin", "tf_model.h5", "model.onnx", "original/x.safetensors", "original/params.json"],
            {},
            SAFE,
        ),
        (["pytorch_model.bin", "training.pt", "flax_model.msgpack"], {}, ["pytorch_model.bin"]),
        ([*SAFE, "consolidated.safetensors"], {}, ["consolidated.safetensors"]),
        ([*SAFE, "consolidated.safetensors"], {"engine": "sglang"}, [*SAFE, "consolidated.safetensors"]),
        ([*SAFE, "consolidated.safetensors"], {"load_format": "hf"}, [*SAFE, "consolidated.safetensors"]),
        ([*SAFE, "pytorch_model.bin"], {"load_format": "npcache"}, ["pytorch_model.bin"]),
        ([*SAFE, "m.gguf"], {}, SAFE),
        (SAFE, {"load_format": "dummy"}, []),
        (["with[brackets].safetensors"], {}, ["with[[]brackets].safetensors"]),
        (["vae/model.safetensors"], {}, ["vae/model.safetensors"]),
    ],
    ids=lambda value: None if isinstance(value, dict) else " ".join(value),
)
def test_one_weights_format_and_all_other_files_are_downloaded(
    tmp_path: Path, names: list[str], more: dict[str, object], expected: list[str]
) -> None:
    assert fetched(tmp_path, [*names, *TEXT], **more) == sorted([*expected, *TEXT])


def test_vllm_downloads_the_files_of_the_index(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": SAFE[0], "b": SAFE[1]}}))
    names = [*SAFE, "extra.safetensors", INDEX]
    assert fetched(tmp_path, names) == sorted([*SAFE, INDEX])
    assert fetched(tmp_path, names, engine="sglang") == sorted(names)


def test_parts_of_a_repository_are_downloaded_with_or_without_weights(tmp_path: Path) -> None:
    assert fetched(tmp_path, [*SAFE, *TEXT], "text") == sorted(TEXT)
    assert fetched(tmp_path, [*SAFE, "model.onnx", *TEXT], "all") == sorted([*SAFE, "model.onnx", *TEXT])


def test_gguf_and_speculators_repositories_are_left_to_the_engine(tmp_path: Path) -> None:
    with pytest.raises(Refused) as caught:
        fetched(tmp_path, ["m-Q4.gguf", "m-Q8.gguf"])
    assert caught.value.code == "hub-gguf"
    (tmp_path / "config.json").write_text('{"speculators_config": {"verifier": {"name_or_path": "acme/large"}}}')
    with pytest.raises(Refused) as caught:
        fetched(tmp_path, SAFE)
    assert caught.value.code == "hub-speculators"


def test_a_trusted_models_code_is_downloaded_at_its_revision(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoModel": "acme/code--modeling.Model"}}')
    hub = Listed(tmp_path, [*SAFE, "modeling.py"])
    request = {"cache": None, "engine": "vllm", "load_format": "auto", "remote_code": True, "code_revision": "v1"}
    Download(hub, request).repository("acme/m", None, "model")
    assert hub.asked[1:] == [("acme/m", ["modeling.py"]), ("acme/code", ["modeling.py"])]


def test_complete_recognises_a_complete_cache(tmp_path: Path) -> None:
    assert not complete(tmp_path, "model")
    (tmp_path / "config.json").write_text("{}")
    assert complete(tmp_path, "text") and not complete(tmp_path, "model")
    (tmp_path / SAFE[0]).write_text("x")
    assert complete(tmp_path, "model")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": SAFE[0], "b": SAFE[1]}}))
    assert not complete(tmp_path, "model")


class Timeout(OSError):
    """The timeout of requests, which older versions of huggingface_hub use."""


@pytest.mark.parametrize("error", [ConnectionError("refused"), Timeout("read timed out")])
def test_without_the_hub_a_damaged_index_means_an_incomplete_model(tmp_path: Path, error: OSError) -> None:
    (tmp_path / INDEX).write_text('{"weight_map": {"a"')
    (tmp_path / "config.json").write_text("{}")

    class Unreachable(Listed):
        def HfApi(self) -> Any:
            raise error

        def snapshot_download(self, name: str, **_: object) -> str:  # type: ignore[override]
            return str(self.folder)

    request = {"cache": None, "engine": "vllm", "load_format": "auto", "remote_code": False, "code_revision": None}
    with pytest.raises(Refused) as caught:
        Download(Unreachable(tmp_path, []), request).repository("acme/m", None, "model")
    assert caught.value.code == "hub-unreachable"
