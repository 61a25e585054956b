"""Reading manifests."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from checkpoint.snapshot import manifest
from tests.kits.checkpoint.snapshots import draft

pytestmark = pytest.mark.t0


@pytest.mark.parametrize(("former", "today"), [("full", "included"), ("thin", "excluded")])
def test_former_words_for_the_weights_are_read_as_todays(former: str, today: str) -> None:
    written = msgspec.structs.replace(draft("s", 7), weights=former, identity={"weights": former, "model": "m"})
    read = manifest.parse(manifest.dump(written), Path("s"), "s")
    assert read.weights == today and read.identity == {"weights": today, "model": "m"}
