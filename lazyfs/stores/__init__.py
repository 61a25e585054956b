"""Stores: where chunks and manifests live. `open_store(url)` picks the implementation by the URL's scheme.

An implementation is imported on first use of its scheme: obstore alone costs 50 ms.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import cast

from lazyfs.stores.base import ObjectInfo, Store
from lazyfs.stores.urls import SCHEMES, normal_url

__all__ = ["ObjectInfo", "Store", "open_store", "opened"]


def open_store(url: str) -> Store:
    """Return the store at `url`. Raises Usage for an unknown scheme."""
    url = normal_url(url)
    module, _, function = SCHEMES[url.partition("://")[0]].partition(":")
    return cast(Store, getattr(importlib.import_module(module), function)(url))


@contextlib.contextmanager
def opened(url: str) -> Iterator[Store]:
    """Yield the store at `url` and close its connections, if it keeps any. Raises Usage for an unknown scheme."""
    store = open_store(url)
    try:
        yield store
    finally:
        close = getattr(store, "close", None)
        if close is not None:
            close()
