"""How a launch reads an engine's options and the places of its model."""

from __future__ import annotations

from pathlib import Path

import pytest

import launchers
from launchers.errors import BadModel, Usage
from launchers.given_options import given_options, last
from launchers.model_source import can_reload, repositories, why_plain
from launchers.options.model_check import check_model

pytestmark = pytest.mark.t0


def parsed(engine: str, *words: str):
    return launchers.engine(engine).parse(words, {})


def named(engine: str, *words: str) -> list[tuple[str, str | None, str]]:
    return [(r.name, r.revision, r.part) for r in repositories(parsed(engine, *words))]


def test_an_options_file_is_read_as_the_engines_do(tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text(
        "model: acme/tiny\nhost: 0.0.0.0\nport: 8123\napi-key: [one, two]\nserved_model_name: tiny\nrevision: v2\n"
        "tensor-parallel-size: 2\ntrust-remote-code: true\nenforce-eager: false\nspeculative-config: {model: acme/draft}\n"
    )
    options = given_options(["--config", str(file), "--port=9000", "--revision", "v3"])
    assert (last(options, "port"), last(options, "revision"), last(options, "tensor-parallel-size")) == (
        "9000",
        "v3",
        "2",
    )
    assert "trust-remote-code" in options and "enforce-eager" not in options
    command = parsed("vllm", "--config", str(file))
    assert (command.model, command.host, command.port, command.api_key) == ("acme/tiny", "0.0.0.0", 8123, "one")
    assert command.arguments == ("--config", str(file))  # the rest is left to the engine
    assert parsed("vllm", "--config", str(file), "--port", "1").port == 1
    assert named("vllm", "--config", str(file)) == [("acme/tiny", "v2", "model"), ("acme/draft", None, "model")]


@pytest.mark.parametrize("text", ["", "- a list\n", "model: [unclosed\n", "\0", "5"])
def test_an_invalid_options_file_is_left_to_the_engine(tmp_path: Path, text: str) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text(text)
    assert parsed("vllm", "--model", "/m", "--config", str(file)).model == "/m"
    with pytest.raises(Usage, match="no model given"):
        parsed("vllm", "--config", str(file))
    assert parsed("sglang", "--model-path", "/m", "--config", str(tmp_path / "none.yaml")).port == 30000


def test_all_repositories_of_a_command_line_are_found() -> None:
    assert named("vllm", "acme/m", "--revision", "v1") == [("acme/m", "v1", "model")]
    assert named("vllm", "--model", "gpt2") == [("gpt2", None, "model")]
    assert named("vllm", "--model", "/m", "--tokenizer", "acme/t", "--tokenizer-revision", "v2") == [
        ("acme/t", "v2", "text")
    ]
    assert named("vllm", "--model", "acme/m", "--tokenizer", "acme/m") == [("acme/m", None, "model")]
    draft = '{"model": "acme/d", "revision": "v3", "num_speculative_tokens": 3}'
    assert named("vllm", "--model", "/m", "--speculative-config", draft) == [("acme/d", "v3", "model")]
    assert named("vllm", "--model", "/m", "--speculative-config", '{"method": "ngram", "model": "ngram"}') == []
    assert named("vllm", "--model", "/m", "--lora-modules", "a=acme/a", '{"name": "b", "path": "acme/b"}', "c=/c") == [
        ("acme/a", None, "all"),
        ("acme/b", None, "all"),
    ]
    line = ["--model-path", "/m", "--speculative-draft-model-path", "acme/d", "--speculative-draft-model-revision", "v"]
    assert named("sglang", *line, "--lora-paths", "acme/a") == [("acme/d", "v", "model"), ("acme/a", None, "all")]


@pytest.mark.parametrize("name", ["/m", "./m", "../m", "~/m", "a/b/c", "s3://a/b", "", "-x", "a b/c"])
def test_paths_and_urls_are_no_hub_names(name: str) -> None:
    assert named("vllm", f"--model={name}") == []


def test_a_trusted_local_models_code_repositories_are_found(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoModel": "acme/code--modeling.Model"}}')
    line = ["--model", str(tmp_path), "--code-revision", "v1"]
    assert named("vllm", *line) == []
    assert named("vllm", *line, "--trust-remote-code") == [("acme/code", "v1", "text")]


def test_a_local_folder_precedes_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "acme" / "m").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert named("vllm", "--model", "acme/m") == []


def test_sources_that_only_the_engine_can_read_start_plainly() -> None:
    assert why_plain(parsed("vllm", "--model", "acme/m"), {}) is None
    assert why_plain(parsed("vllm", "--model", "/m", "--load-format", "runai_streamer"), {}) is None
    assert why_plain(parsed("vllm", "--model", "acme/m"), {"VLLM_USE_MODELSCOPE": "False"}) is None
    refused = why_plain(parsed("sglang", "--model-path", "s3://key:secret@b/m"), {})
    assert refused and "secret" not in refused
    for words in (
        ["--model", "s3://b/m"],
        ["--model", "a/b:Q4_K_M"],
        ["--model", "/m", "--load-format", "modelexpress"],
    ):
        assert (why_plain(parsed("vllm", *words), {}) or "").startswith("model-elsewhere: ")


def test_can_reload_depends_on_the_weights_format() -> None:
    assert can_reload(parsed("vllm", "--model", "/m"))
    assert can_reload(parsed("vllm", "--model", "/m", "--load-format", "safetensors"))
    assert not can_reload(parsed("vllm", "--model", "/m", "--load-format", "dummy"))


def test_a_folder_without_weights_can_be_valid(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadModel, match="holds no weights"):
        check_model(tmp_path, parsed("vllm", "--model", str(tmp_path)))
    check_model(tmp_path, parsed("vllm", "--model", str(tmp_path), "--load-format", "dummy"))
    (tmp_path / "config.json").unlink()
    with pytest.raises(BadModel, match=r"no config\.json"):
        check_model(tmp_path, parsed("vllm", "--model", str(tmp_path), "--load-format", "dummy"))
    check_model(tmp_path, parsed("vllm", "--model", str(tmp_path), "--load-format", "dummy", "--hf-config-path", "/c"))
