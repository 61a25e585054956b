"""The ring's weights in torch's own tensors, by the code that copies to a device. Whole engines: test_engine_images.py, `thin`."""

import pytest

from plugin.bench.presets import preset
from plugin.runtime.config import state_home
from tests.kits.checkpoint.gpu import check_torch_weights

pytestmark = [pytest.mark.t2]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_torchs_tensors_are_filled_byte_by_byte(engine, tmp_path):
    check_torch_weights(preset(engine, state_home()).python, tmp_path / "work", "cpu")
