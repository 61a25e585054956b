"""What follows from the settings of a launch."""

from pathlib import Path

import pytest

import launchers
from plugin.runtime.config import LaunchSettings

pytestmark = pytest.mark.t0
KEY = Path("/key")


@pytest.mark.parametrize(
    ("given", "pushed_to"),
    [
        ({}, "s3://a"),
        ({"push": False}, ""),
        ({"snapshot_store": None}, ""),
        ({"snapshot_store": "https://cdn.example/a"}, ""),  # is only read
        ({"snapshot_store": "/mnt/store"}, "/mnt/store"),
        ({"trust_keys": (KEY,)}, ""),  # the launch itself would refuse what it pushed
        ({"trust_keys": (KEY,), "sign_key": KEY}, "s3://a"),
    ],
)
def test_a_snapshot_is_pushed_where_a_launch_like_this_one_may_use_it(given, pushed_to):
    command = launchers.engine("vllm").parse(["m"], {})
    settings = LaunchSettings("vllm", command, "/python", Path("/home"), **{"snapshot_store": "s3://a"} | given)
    assert settings.push_to == pushed_to
