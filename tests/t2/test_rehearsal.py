"""A rehearsed snapshot of a real engine: the first restore that somebody waits for is one of the later ones."""

import json
import os
import subprocess
import sys

import pytest

from checkpoint.snapshot import rehearsal
from tests.kits.engine_kit import NAME, REPO, phases

pytestmark = [pytest.mark.t2, pytest.mark.timeout(1200)]


def test_the_first_restore_after_a_rehearsal_records_nothing_and_answers_the_same(rig):
    folder = rig.library.path(NAME)
    made = (rehearsal.FILE_NAME, "working-set", ".verified-*", ".mapped/.verified-*")
    for file in [file for pattern in made for file in folder.glob(pattern)]:
        file.unlink()  # what restores of other tests have left
    env = os.environ | rig.preset.environment | rig.watch.environment | {"QUICKTHAW_HOME": str(rig.home)}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    argv = [sys.executable, "-m", "plugin", "snapshot", "rehearse", "--json", NAME]
    done = subprocess.run(argv, env=env, cwd=REPO, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    asked = json.loads(done.stdout)["requests"]
    assert asked == ["short", "streamed", "long", "batch of 64"]
    assert rehearsal.read(folder, rig.library.load(NAME)).requests == asked
    assert rehearsal.prepared_here(folder, rig.library.load(NAME))
    assert rig.watch.gone() == set()
    with rig.running() as (port, answer, _, command):
        assert answer.text == rig.cold_text
        assert phases(port)[0][-3:] == ["restoring", "waking", "verifying"]
        assert "this first restore records" not in command.log.read_text()
