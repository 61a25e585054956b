"""The proxy behind its own port, and as an ASGI application: common behaviour is tested on both."""

import pytest

from tests.kits.proxy.rig import FACES


@pytest.fixture(params=FACES)
def proxy(request):
    """Start a proxy of either kind, as `tests.kits.proxy.rig.proxy` does."""
    return FACES[request.param]
