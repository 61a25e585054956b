"""llama-swap's configuration is read as one of ours, and what is left out is named."""

import pytest
import yaml

from plugin.proxy.endpoints import llama_swap
from plugin.proxy.endpoints.models_file import check_import, load, spec_of

pytestmark = pytest.mark.t0
FILE = """
healthCheckTimeout: 60
logLevel: debug
macros:
  server: /opt/llama-server --port ${PORT}
  big: "${server} --ctx-size 8192"
models:
  llama:
    cmd: |
      # the small one
      ${server} \\
        -m /models/llama.gguf
    aliases: [gpt-4o-mini]
    ttl: 300
    useModelName: org/llama
    env: ["CUDA_VISIBLE_DEVICES=0", "NAME=a b"]
  qwen:
    cmd: ${big} --name ${MODEL_ID}
    checkEndpoint: /ready
    concurrencyLimit: 4
  docker:
    cmd: docker run --name ${MODEL_ID} -p 9001:8000 image
    cmdStop: docker stop ${MODEL_ID}
    proxy: http://127.0.0.1:9001
    checkEndpoint: none
"""


def test_a_file_of_llama_swap_is_read_as_ours(tmp_path):
    file = tmp_path / "llama-swap.yaml"
    file.write_text(FILE)
    config = load(file)
    assert config.max_awake == 1 and config.min_awake == 0
    llama, qwen, docker = (config.models[name] for name in ("llama", "qwen", "docker"))
    command = "exec env CUDA_VISIBLE_DEVICES=0 'NAME=a b' /opt/llama-server --port ${PORT} -m /models/llama.gguf"
    assert (llama.command, llama.aliases, llama.sleep_after, llama.served_name) == (
        command,
        ("gpt-4o-mini",),
        300,
        "org/llama",
    )
    assert qwen.command == "exec /opt/llama-server --port ${PORT} --ctx-size 8192 --name qwen"
    assert (qwen.ready_path, qwen.wake_timeout) == ("/ready", 60)
    assert (docker.upstream, docker.wake) == (
        "http://127.0.0.1:9001",
        "exec docker run --name docker -p 9001:8000 image",
    )
    assert (docker.sleep, docker.ready_path) == ("docker stop docker", "/")
    wake = spec_of(llama, 0.0).wake
    assert wake is not None and "${" not in wake


def test_what_has_no_counterpart_is_named():
    said = []
    llama_swap.convert(yaml.safe_load(FILE), said.append)
    assert len(said) == 2 and "logLevel" in said[0] and "concurrencyLimit of model 'qwen'" in said[1]
    document = {"models": {"a": {"cmd": "x"}, "b": {"cmd": "y"}}}
    for group, awake, lines in (({"swap": False}, 2, 0), ({"swap": True}, 1, 1)):
        said.clear()
        groups = {"all": {**group, "members": ["a", "b"]}}
        assert llama_swap.convert(document | {"groups": groups}, said.append)["max_awake"] == awake
        assert len(said) == lines


def test_our_own_file_is_not_taken_for_one():
    assert not llama_swap.recognises({"models": {"a": {"command": "x"}}})
    assert not llama_swap.recognises({"models": None})
    with pytest.raises(ValueError, match="'b' has no cmd"):
        llama_swap.convert({"models": {"a": {"cmd": "x"}, "b": {}}}, print)


def test_only_a_file_of_llama_swap_is_imported(tmp_path):
    ours, theirs, said = tmp_path / "ours.yaml", tmp_path / "theirs.yaml", []
    ours.write_text("models: {red: {command: x}}")
    theirs.write_text(FILE)
    check_import(theirs, said.append)
    assert len(said) == 2
    with pytest.raises(ValueError, match="is no configuration of llama-swap; give it as --config"):
        check_import(ours, said.append)


@pytest.mark.parametrize(
    ("damaged", "said"),
    [
        ({"groups": ["a"]}, "groups is no mapping"),
        ({"groups": {"all": None}}, "groups is no mapping"),
        ({"models": {"a": {"cmd": "x", "env": {"A": "b"}}}}, "env of model 'a' is no list"),
    ],
)
def test_a_damaged_file_is_refused_with_its_place(damaged, said):
    with pytest.raises(ValueError, match=said):
        llama_swap.convert({"models": {"a": {"cmd": "x"}}} | damaged, print)
    assert llama_swap.convert(
        {"models": {"a": {"cmd": "x"}}, "groups": {"all": {"swap": False, "members": None}}}, list
    )
