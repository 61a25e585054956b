"""`quickthaw warm`: what is no snapshot ends the wait for one."""

from pathlib import Path

import pytest

from checkpoint.errors import Failed
from checkpoint.snapshot.library import Library
from checkpoint.store import archive
from plugin.warm import Warming
from tests.kits.checkpoint.small_snapshot import OLD

pytestmark = pytest.mark.t0
NAME = "vllm-llama-0123456789"


def test_a_folder_without_a_manifest_is_an_error_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pull, pulls = archive.pull, []

    def count(*arguments, **options):
        pulls.append(1)
        assert len(pulls) == 1, "it pulls again, without an end"
        return pull(*arguments, **options)

    monkeypatch.setattr(archive, "pull", count)
    library = Library(tmp_path)
    library.path(NAME).mkdir(parents=True)
    warming = Warming(tmp_path, {"rate": 0.0, "snapshot_store": str(tmp_path / "store"), "trust_key": ()})
    with pytest.raises(Failed) as refused:
        warming._pull(library, NAME, OLD, lambda *_: None)
    assert refused.value.code == "snapshot-exists"
