"""What programs use: `import_directory`, `mount`, `find_mount`. Cheap to import: everything heavy comes when it is
needed.
"""

from __future__ import annotations

from lazyfs.directory import import_directory
from lazyfs.mounting import MountHandle, find_mount, mount

__all__ = ["MountHandle", "find_mount", "import_directory", "mount"]
