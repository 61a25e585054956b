"""`quickthaw snapshot gc` on this host."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from checkpoint.gc import gc

pytestmark = pytest.mark.t0


def test_this_hosts_leftovers_are_counted_in_text_and_in_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICKTHAW_HOME", str(tmp_path))
    said = []
    for words in ([], ["--json"]):
        (tmp_path / "snapshots" / ".pull-vllm-llama-0123456789").mkdir(parents=True, mode=0o700)
        done = CliRunner().invoke(gc, words)
        assert done.exit_code == 0, done.output
        said.append(done.output)
    assert said[0] == "removed 1 unfinished snapshots\n"
    assert json.loads(said[1]) == {"unfinished": 1}
