"""The manifest as inodes, for lookup, getattr, readdir and readlink.

Immutable, so answers may be cached forever.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass, field

from lazyfs.content.manifest import File, Manifest

ROOT = 1


@dataclass
class Node:
    """One inode. `index` is the file's index in the manifest, -1 for directories and links."""

    ino: int
    name: bytes
    mode: int
    size: int
    parent: int
    nlink: int = 1
    index: int = -1
    file: File | None = None
    target: bytes = b""
    children: dict[bytes, Node] = field(default_factory=dict)

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)


class Tree:
    """The inode tree of a manifest.

    Inode numbers follow the order in the manifest, so they are equal in every mount of it; snapshots may rely on that.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.nodes: list[Node] = [Node(0, b"", 0, 0, 0), Node(ROOT, b"", stat.S_IFDIR | 0o755, 0, ROOT, nlink=2)]
        self._by_path: dict[str, Node] = {"": self.nodes[ROOT]}
        for directory in manifest.directories:
            node = self._add(directory.path, stat.S_IFDIR | (directory.mode & 0o777), 0)
            node.nlink = 2
            self.nodes[node.parent].nlink += 1
        for index, file in enumerate(manifest.files):
            node = self._add(file.path, stat.S_IFREG | (file.mode & 0o777), file.size)
            node.index, node.file = index, file
        for link in manifest.symlinks:
            target = link.target.encode()
            self._add(link.path, stat.S_IFLNK | 0o777, len(target)).target = target
        self.size = manifest.size
        self.files = [n for n in self.nodes if n.file is not None]

    def _add(self, path: str, mode: int, size: int) -> Node:
        folder, _, name = path.rpartition("/")
        parent = self._by_path[folder]
        node = Node(len(self.nodes), name.encode(), mode, size, parent.ino)
        parent.children[node.name] = node
        self.nodes.append(node)
        self._by_path[path] = node
        return node

    def get(self, ino: int) -> Node | None:
        """Return the node of an inode number, or None."""
        return self.nodes[ino] if 0 < ino < len(self.nodes) else None

    def at(self, path: str) -> Node | None:
        """Return the node of a path relative to the root, or None."""
        return self._by_path.get(path)

    def listing(self, node: Node) -> list[tuple[bytes, Node]]:
        """Return the entries of readdir, `.` and `..` first."""
        return [(b".", node), (b"..", self.nodes[node.parent]), *node.children.items()]
