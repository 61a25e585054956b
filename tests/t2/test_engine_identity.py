"""What a real engine reads and is given: a change of it refuses the snapshot, or is given anew."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.kits.engine_kit import NAME, REPO, inner_pid, post

pytestmark = [pytest.mark.t2, pytest.mark.timeout(1200)]


def test_an_edited_tokenizer_and_an_unknown_variable_are_refused_by_name(rig):
    template = rig.tokenizer / "chat_template.jinja"
    before = template.read_bytes() if template.exists() else None
    template.write_text("{{ messages[0]['content'] }} edited")
    try:
        port, command = rig.command("--strict", DISABLE_OPENAPI_DOC="1")
        assert command.start().wait(120) == 1
        text = command.log.read_text()
        assert "environment-differs: DISABLE_OPENAPI_DOC" in text
        assert f"arguments-differ: --{'tokenizer' if rig.engine == 'vllm' else 'tokenizer-path'}" in text
    finally:
        template.unlink() if before is None else template.write_bytes(before)
    rig.library.clear_failures(NAME)
    assert rig.watch.gone() == set()
    with rig.running("--strict", limit_s=120.0) as (_, answer, _, _):  # by content: what was put back is the same
        assert answer.text == rig.cold_text


def test_every_process_of_a_restored_engine_is_given_this_launchs_variables(rig):
    from checkpoint.sandbox.process_tree import processes
    from checkpoint.sandbox.sandbox import CONTROL_DIR

    with rig.running("--strict", limit_s=120.0, POD_IP="10.9.8.7", HF_TOKEN="hf_renewed") as (_, answer, process, _):
        assert answer.text == rig.cold_text
        inside = [pid for pid in processes(process.pid) if inner_pid(pid) == 1]
        (folder,) = {Path(f"/proc/{pid}/root{CONTROL_DIR}") for pid in inside}
        said = [note.read_text() for note in folder.glob("*.woken")]
        # SGLang: server, scheduler, detokenizer. vLLM: API server, engine core, worker.
        assert len(said) >= 2 and all(int(text.removeprefix("renewed ")) >= 2 for text in said), said
        assert (folder / "environment").stat().st_mode & 0o777 == 0o600


def test_no_variable_that_the_engine_declares_is_given_anew(rig):
    """The engine's own list, from its own interpreter, against ours: what is on neither of our lists matters."""
    from checkpoint.compatibility.engine import declared_variables, package_folders
    from checkpoint.compatibility.environment import KEPT, classify

    code = {
        "vllm": "import vllm.envs; print(*vllm.envs.environment_variables)",
        "sglang": "from sglang.srt.environ import Envs, EnvField; "
        "print(*(n for n, v in vars(Envs).items() if isinstance(v, EnvField)))",
    }[rig.engine]
    env = {**os.environ, **rig.preset.environment}
    out = subprocess.run(
        [str(rig.preset.python), "-c", code], env=env, capture_output=True, text=True, timeout=120, check=True
    )
    names = {name for name in out.stdout.splitlines()[-1].split() if name.isupper()}
    assert len(names) > 100
    folders = package_folders(rig.preset.python)
    assert declared_variables(rig.engine, folders, names) == names
    found = classify(dict.fromkeys(names, "x"), rig.engine, lambda few: declared_variables(rig.engine, folders, few))
    assert found.renewed == {}
    assert names - found.relevant.keys() <= KEPT


def test_replicas_that_sample_differ_after_a_restore(rig):
    body = {"model": str(rig.preset.model), "prompt": "Once upon a time", "max_tokens": 24, "temperature": 1.0}
    texts, idents = [], []
    for _ in range(2):
        with rig.running(limit_s=120.0) as (port, _, _, _):
            status, data = post(port, "/v1/completions", body)
            assert status == 200
            texts.append(json.loads(data)["choices"][0]["text"])
            idents.append(json.loads(data)["id"])
    assert texts[0] != texts[1]
    assert idents[0] != idents[1]


@pytest.mark.parametrize("fixed", [False, True])
def test_the_engines_own_torch_and_numpy_are_reseeded(rig, fixed):
    """What every process does when it is woken, with the libraries of this engine."""
    script = (
        "import random, sys; sys.path.insert(0, sys.argv[1]); import numpy, torch\n"
        "from plugin.engine import control\n"
        "draw = lambda: (random.random(), float(numpy.random.rand()), float(torch.rand(1)))\n"
        "seed = lambda: (random.seed(1), numpy.random.seed(1), torch.manual_seed(1))\n"
        "seed(); first = draw(); seed(); control.reseed(); second = draw()\n"
        "print([a == b for a, b in zip(first, second)])\n"
    )
    env = {**os.environ, **rig.preset.environment, "QUICKTHAW_FIXED_SEED": "1" if fixed else "0"}
    out = subprocess.run(
        [str(rig.preset.python), "-c", script, str(REPO)], env=env, capture_output=True, text=True, timeout=120
    )
    assert out.stdout.strip() == str([fixed] * 3), out.stderr[-2000:]
