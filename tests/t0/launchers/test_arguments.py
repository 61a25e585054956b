"""What a launcher adds to an engine's own arguments, and where it leaves them alone."""

import pytest

import launchers
from checkpoint.compatibility.launch_options import normalised_arguments

pytestmark = pytest.mark.t0
MODEL = ("--model-path", "/m")


def arguments(*more: str, spin: bool = False) -> tuple[str, ...]:
    return launchers.engine("sglang").parse([*MODEL, *more], {}, spin).arguments


def test_an_idle_sglang_is_told_to_sleep():
    assert arguments() == (*MODEL, "--sleep-on-idle")
    assert arguments("--port", "1") == (*MODEL, "--sleep-on-idle")


@pytest.mark.parametrize("given", ["--sleep-on-idle", "--sleep_on_idle"])
def test_who_said_so_himself_has_the_same_identity(given):
    assert arguments(given) == (*MODEL, given)
    assert normalised_arguments("sglang", arguments(given)) == normalised_arguments("sglang", arguments())


def test_who_wants_it_to_spin_gets_that_and_another_snapshot():
    assert arguments(spin=True) == MODEL
    assert normalised_arguments("sglang", arguments(spin=True)) != normalised_arguments("sglang", arguments())


@pytest.mark.parametrize(
    "more",
    [
        ("--enable-dp-attention",),
        ("--enable_dp_attention",),
        ("--pp-size=2",),
        ("--pipeline-parallel-size", "2"),
        ("--disaggregation-mode", "decode"),
        ("--enable-hierarchical-cache",),
        ("--config", "/c.yaml"),
    ],
)
def test_schedulers_that_work_for_others_while_idle_are_left_alone(more):
    assert arguments(*more) == (*MODEL, *more)


def test_vllm_gets_nothing():
    assert launchers.engine("vllm").parse(["--model", "/m"], {}).arguments == ("--model", "/m")


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_keys_prefix_and_seed_of_a_configuration_file_are_known(name, tmp_path):
    engine = launchers.engine(name)
    file = tmp_path / "engine.yaml"
    seed, root = engine.seed_flags[0][2:], engine.root_path_flags[0][2:]
    file.write_text(f"api-key: 'k'\nadmin_api_key: a\n{root}: /api\n{seed}: 7\nport: 1\n")
    command = engine.parse([engine.model_flags[0], "m", "--config", str(file)], {})
    assert (command.api_key, command.admin_key, command.root_path, command.fixed_seed) == ("k", "a", "/api", True)
    assert command.port == 1
    command = engine.parse([engine.model_flags[0], "m", f"--config={file}", "--api-key", "line"], {})
    assert command.api_key == "line"
    command = engine.parse([engine.model_flags[0], "m", "--config", "/nowhere"], {})
    assert (command.api_key, command.admin_key, command.root_path, command.fixed_seed) == (None, None, "", False)
