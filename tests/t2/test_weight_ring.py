"""The ring's weights in torch's own tensors, by the code that copies to a device. Whole engines: test_engine_images.py, `thin`."""

import json
import subprocess

import pytest

from plugin.bench.presets import preset
from plugin.runtime.config import state_home
from tests.kits.engine_kit import REPO

pytestmark = [pytest.mark.t2]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_torchs_tensors_are_filled_byte_by_byte(engine, tmp_path):
    """Fused, padded, tied, transposed (as cutlass takes 8-bit weights), and one that is in no file."""
    program = REPO / "tests" / "programs" / "torch_weights.py"
    python = preset(engine, state_home()).python
    done = subprocess.run([python, program, tmp_path / "work"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["filled"] and not found["answer"]["failed"], found
    assert set(found["same"]) >= {"qkv", "down", "embed", "transposed", "computed"} and all(found["same"].values()), (
        found
    )
    assert found["own"] == 77 * 4, "only what was computed is in the snapshot"
