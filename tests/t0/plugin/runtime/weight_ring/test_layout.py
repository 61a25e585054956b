"""A layout that an engine recorded: taken over whole, or not at all, and refused where it leads outside its files."""

import json

import pytest

from checkpoint.errors import Failed
from plugin.runtime.weight_ring import layout

pytestmark = pytest.mark.t0
GOOD = {"files": [["/m/a.safetensors", 100]], "segments": [[0, 10, 90], [-1, 0, 5], [-2, 0, 7]], "own": 5, "total": 102}


def test_a_record_with_its_own_bytes_is_collected_and_loaded(tmp_path):
    (tmp_path / "7.layout").write_text(json.dumps(GOOD))
    (tmp_path / "7.side").write_bytes(bytes(5))
    found = layout.collect(tmp_path)
    assert found == {"weights/layout.json": tmp_path / "7.layout", "weights/side": tmp_path / "7.side"}
    folder = tmp_path / "snapshot"
    (folder / "weights").mkdir(parents=True)
    assert layout.load(folder) is None
    (folder / "weights" / "layout.json").write_bytes((tmp_path / "7.layout").read_bytes())
    assert layout.load(folder).recorded.total == 102
    layout.forget(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"snapshot"}


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "no processes"),
        ({"7.layout": json.dumps(GOOD), "8.layout": json.dumps(GOOD)}, "2 processes"),
        ({"7.layout": json.dumps({"declined": "weights-not-in-files: 3 MiB"})}, "weights-not-in-files"),
        ({"7.layout": json.dumps(GOOD), "7.side": "1234"}, "only a part"),
        ({"7.layout": json.dumps(GOOD)}, "weights-not-recorded"),
        ({"7.layout": "{"}, "weights-not-recorded"),
    ],
)
def test_what_is_not_whole_is_declined_with_its_reason(tmp_path, files, reason):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert reason in layout.collect(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"segments": [[0, 11, 90]], "total": 90},
        {"segments": [[0, -1, 90]], "total": 90},
        {"segments": [[1, 0, 90]], "total": 90},
        {"segments": [[0, 0, 0]], "total": 0},
        {"segments": [[-1, 0, 6]], "total": 6},
        {"total": 103},
        {"more": 1},
    ],
)
def test_a_layout_that_leads_outside_its_files_is_refused(tmp_path, change):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "layout.json").write_text(json.dumps(GOOD | change))
    with pytest.raises(Failed, match="weights-layout|cannot be read"):
        layout.load(tmp_path)
