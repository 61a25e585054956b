"""Weights that a device has lost, from the ring by the real driver: slots pinned, copied on a stream of their own, unpinned.

QUICKTHAW_GPU_PYTHON: an interpreter with torch for CUDA, safetensors and msgspec, as those of both engines.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kits.checkpoint.gpu import GPU_PYTHON, check_torch_weights, skip_reason

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(180),
    pytest.mark.skipif(bool(skip_reason()), reason=skip_reason() or "a GPU is here"),
]


def test_torchs_tensors_on_a_gpu_are_filled_byte_by_byte(tmp_path: Path) -> None:
    check_torch_weights(GPU_PYTHON, tmp_path / "work", "cuda")
