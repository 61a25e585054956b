"""Run at the start of every Python that has this folder on its PYTHONPATH: faulty:// becomes a store of `open_store`."""

import tests.kits.lazyfs.faulty_store  # noqa: F401
