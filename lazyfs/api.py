"""What programs use: `import_directory`, `mount`, `find_mount`. Cheap to import: everything heavy comes when it is
needed.
"""

from __future__ import annotations

from lazyfs.content.stat_index import import_directory, read_through
from lazyfs.mount.client import MountHandle, find_mount, mount, unmount

__all__ = ["MountHandle", "find_mount", "import_directory", "mount", "read_through", "unmount"]
