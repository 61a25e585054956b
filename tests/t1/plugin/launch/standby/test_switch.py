"""Two snapshot models of which one may be awake: each request is answered by its model, whatever it takes to make room."""

import pytest

from tests.kits.launch_rig import PROMPT, call
from tests.kits.switch_rig import NAMES, switching, take_both

pytestmark = [pytest.mark.t1, pytest.mark.xdist_group("launch"), pytest.mark.slow]


def test_an_engine_that_its_snapshot_restores_is_not_asked_to_shut_down(rig_of):
    """An engine that ignores SIGTERM would hold up the switch for the whole grace period."""
    rig = rig_of("sglang")
    answers = take_both(rig, ENGINE_DOUBLE_STUBBORN="1")
    with switching(rig) as started:
        for name in (*NAMES, *NAMES):
            assert started.ask_of(name) == answers[name]
        pools = started.pools()
        assert (pools["red"]["sleeps"], pools["blue"]["sleeps"]) == (2, 1)
        assert "SIGTERM" not in started.text()
        assert all(rig.library.working_set(name).exists() for name in NAMES), "what the first restores recorded is kept"


def test_models_are_moved_by_hand_with_the_token_only(rig_of):
    rig = rig_of("vllm")
    answers = take_both(rig)
    with switching(rig, QUICKTHAW_ADMIN_TOKEN="secret") as started:
        token = {"Authorization": "Bearer secret"}
        assert started.act("red", "wake")[0] == 401
        assert call(started.port, "POST", "/-/models/red/wake", **token) == (200, {"name": "red", "phase": "serving"})
        assert started.ask_of("red") == answers["red"]
        for _ in range(2):  # the second has nothing to do
            slept = call(started.port, "POST", "/-/models/red/sleep", **token)
            assert slept == (200, {"name": "red", "phase": "asleep"})
        for path, code in (("pink/sleep", "model-not-found"), ("red/fly", "not-found")):
            status, body = call(started.port, "POST", f"/-/models/{path}", **token)
            assert (status, body["error"]["code"]) == (404, code)
        foreign = token | {"Origin": "http://elsewhere.example"}
        status, body = call(started.port, "POST", "/-/models/red/wake", **foreign)
        assert (status, body["error"]["code"]) == (403, "admin-foreign-page")
        asked = {"model": "red", "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
        assert call(started.port, "POST", "/v1/completions", asked)[1]["choices"][0]["token_ids"] == answers["red"]
