"""Real engines that do not generate: an embedding, cold and restored, and the canary of that kind."""

import json
import time

import pytest

from checkpoint.snapshot.manifest import distance
from plugin.bench import client as measure
from tests.kits.dropin_rows import EMBEDDING
from tests.kits.engine_kit import NAME, Rig, phases, post, share_state

pytestmark = [pytest.mark.t2, pytest.mark.timeout(1200)]
PROMPTS = ("The quick brown fox", "jumps over the lazy dog, and again")


@pytest.mark.parametrize("engine", EMBEDDING)
def test_an_embedding_engine_is_snapshotted_restored_and_answers_the_same(engine, tmp_path):
    share_state(tmp_path)
    rig = Rig(engine, tmp_path)
    model = str(rig.preset.model)

    def embeddings(port, *texts):
        answers = [post(port, "/v1/embeddings", {"model": model, "input": text}, 900.0) for text in texts]
        assert {status for status, _ in answers} == {200}, answers
        return [json.loads(data)["data"][0]["embedding"] for _, data in answers]

    found = []
    for expected in (["mounting", "starting"], ["mounting", "restoring"]):
        port, command = rig.command(arguments=(*rig.preset.arguments, *EMBEDDING[engine]))
        process = command.start()
        try:
            limit = time.monotonic() + 900
            while True:
                try:
                    held = embeddings(port, "Held while the engine starts")
                    break
                except ConnectionRefusedError:
                    assert process.poll() is None and time.monotonic() < limit
                    time.sleep(0.05)
            while measure.status(port)["pools"][0]["replicas"][0]["phase"] != "serving":
                assert time.monotonic() < limit
                time.sleep(0.2)
            # Alone: beside the canary, bfloat16 rounds to another 3 % on some processors.
            found.append((held, embeddings(port, *PROMPTS)))
            assert phases(port)[0][:2] == expected and "failed" not in phases(port)[0]
        finally:
            command.stop()
            text = command.log.read_text(errors="replace")
        assert "off:" not in "\n".join(line for line in text.splitlines() if line.startswith("quickthaw:"))
        assert rig.watch.gone() == set()
    (cold_held, cold), (restored_held, restored) = found
    canary = rig.library.load(NAME).canary
    print(engine, canary.tolerance, distance(restored, cold), distance(restored_held, cold_held))
    assert distance(restored, cold) < 0.01 and distance(restored_held, cold_held) < canary.tolerance
    assert distance(cold[:1], cold[1:]) > 0.3
    assert canary.kind == "embed" and canary.tolerance < 0.2
