"""Public API for programs: `import_directory`, `read_through`, `mount`, `unmount`, `find_mount`.

Cheap to import: heavy modules are imported on first use.
"""

from __future__ import annotations

from lazyfs.content.stat_index import import_directory, read_through
from lazyfs.mount.client import MountHandle, find_mount, mount, unmount

__all__ = ["MountHandle", "find_mount", "import_directory", "mount", "read_through", "unmount"]
