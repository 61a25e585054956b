"""Tasks beside an owner: one that fails is logged and forgotten, the others end with it."""

import asyncio
import logging

import pytest

from plugin.proxy.kubernetes.background import Background

pytestmark = pytest.mark.t0


def test_a_task_that_fails_is_logged_and_the_others_end_with_their_owner(caplog):
    async def fail():
        raise OSError("broken")

    async def test():
        background = Background("pods are not followed", "unfollowed", pool="llama")
        endless = background.run(asyncio.Event().wait())
        await asyncio.wait([background.run(fail())])
        assert not endless.done()
        await background.close()
        return endless

    with caplog.at_level(logging.ERROR):
        endless = asyncio.run(test())
    assert endless.cancelled()
    (record,) = caplog.records
    assert (record.getMessage(), record.event) == ("pods are not followed", "unfollowed")
    assert record.fields == {"pool": "llama", "reason": "OSError('broken')"} and record.exc_info
