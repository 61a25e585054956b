"""A cache bounded by default, on a file system that four models fill in turn, and that others fill meanwhile."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from lazyfs.mount import kernel
from tests.kits.lazyfs.rig import LIMIT_S, ROOT

pytestmark = [
    pytest.mark.t1,
    pytest.mark.skipif(not kernel.may_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN"),
]
MB = 1 << 20


@pytest.mark.slow
@pytest.mark.usefixtures("home")
def test_four_models_in_turn_leave_a_quarter_of_a_small_disk_free(tmp_path):
    # The namespace, and the file system in it, end with the last process that is in it.
    words = ["unshare", "-m", "--propagation", "private", sys.executable, "-m", "tests.programs.small_disk", tmp_path]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=2 * LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["right"] == [True] * 5, "every byte, whether cached or streamed"
    assert min(found["free"]) >= 15 * MB, "16 MB, less the small files beside the chunks"
    assert found["cached"][0] < found["cached"][1] <= 48 * MB, "the first ones fit beside each other"
    free, usage, before, after = found["after"]
    assert free >= 14 * MB and usage < found["cached"][3], "what others wrote took the place of unused chunks"
    assert before == after > 15 * MB, "what a living mount uses stays"
    assert 1 <= len(found["log"]) <= 2, "one line says why it is streamed, and one why nothing is fetched ahead"
    assert "--cache-limit" in found["log"][0]
    streamed, left = found["streamed"]
    assert streamed >= 15 * MB and left >= 3 * MB
