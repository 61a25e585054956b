"""Whether the first request may share a step with the canary."""

import pytest

from plugin.runtime import batch_rounding

pytestmark = pytest.mark.t0


@pytest.mark.parametrize(
    ("flags", "chosen", "shares"),
    [
        (("avx512f", "avx512_bf16"), None, True),
        (("avx512f", "amx_bf16"), None, True),
        (("avx512f", "avx512_vnni"), None, False),  # Ice Lake: SGLang's text differed in a batch of two
        (("avx512f",), "1", True),
        (("avx512f", "avx512_bf16"), "0", False),
    ],
)
def test_steps_are_shared_only_if_a_batch_of_two_rounds_like_a_single_request(flags, chosen, shares, monkeypatch):
    if batch_rounding.Path("/dev/nvidiactl").exists() and chosen is None:
        pytest.skip("a GPU decides otherwise")
    monkeypatch.delenv("QUICKTHAW_SHARED_STEP", raising=False)
    if chosen:
        monkeypatch.setenv("QUICKTHAW_SHARED_STEP", chosen)
    monkeypatch.setattr(batch_rounding, "cpu_flags", lambda: flags)
    assert batch_rounding.may_share_a_step() is shares
