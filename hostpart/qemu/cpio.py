"""Archives that the kernel unpacks as its first root file system: cpio's form "newc".

The same entries give the same bytes: all belong to root and have the same age.

Source: Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import stat

__all__ = ["TRAILER", "device", "file", "folder", "link"]


def file(name: str, data: bytes, *, executable: bool = False) -> bytes:
    """Return an entry for a file of root's.

    :param name: its path below the root, without a leading slash; the folder it is in comes before it in the archive
    """
    return _entry(name, stat.S_IFREG | (0o755 if executable else 0o644), data)


def folder(name: str, *, mode: int = 0o755) -> bytes:
    """Return an entry for a folder."""
    return _entry(name, stat.S_IFDIR | mode)


def link(name: str, to: str) -> bytes:
    """Return an entry for a symbolic link to the path *to*."""
    return _entry(name, stat.S_IFLNK | 0o777, to.encode())


def device(name: str, major: int, minor: int) -> bytes:
    """Return an entry for a character device."""
    return _entry(name, stat.S_IFCHR | 0o600, major=major, minor=minor)


def _entry(name: str, mode: int, data: bytes = b"", major: int = 0, minor: int = 0) -> bytes:
    raw = name.encode() + b"\0"
    # inode, mode, uid, gid, links, mtime, size, device, device's own numbers, length of the name, checksum. An inode
    # counts only where there is more than one link to it.
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, major, minor, len(raw), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields) + raw
    return b"".join((header, bytes(-len(header) % 4), data, bytes(-len(data) % 4)))


TRAILER = _entry("TRAILER!!!", 0)
