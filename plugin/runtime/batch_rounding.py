"""Decide whether a request may share an engine step with the canary of a restore.

The request then runs in a batch of two, and an engine may round a batch of two differently than a batch of one. On
processors without bfloat16 arithmetic, SGLang does: a restored engine gave another greedy text than the same engine alone
(Intel Ice Lake, 2026-11-29). There, the request waits for the canary instead.
"""

from __future__ import annotations

import os
from pathlib import Path

from checkpoint.compatibility.host import cpu_flags

BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}
"""Flags in /proc/cpuinfo: x86-64 (AVX-512, AMX) and Arm."""


def may_share_a_step() -> bool:
    """Return True if this host has a GPU driver, or a processor with bfloat16 arithmetic.

    QUICKTHAW_SHARED_STEP=1 or 0 decides otherwise.
    """
    if (chosen := os.environ.get("QUICKTHAW_SHARED_STEP")) in ("0", "1"):
        return chosen == "1"
    return Path("/dev/nvidiactl").exists() or not BFLOAT16.isdisjoint(cpu_flags())
