"""Memory of a size measured in caches, all of it there, and the C library's loops over parts of it.

Reading is memchr(3) for a byte that is not there, writing memset(3), copying memcpy(3): each goes through memory as
fast as the pCPU can, so the interpreter around them costs nothing that shows.
"""

from __future__ import annotations

import ctypes
import mmap

from . import seat
from .refusal import Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["CHUNK", "UNKNOWN_LLC", "Buffer", "llc_bytes"]

CHUNK = 1 << 20  # bytes of one call: some hundred microseconds, of which the way to the library is a small part
UNKNOWN_LLC = 32 << 20  # where the kernel describes no caches

_FILL, _ABSENT = 1, 2


def llc_bytes() -> int | None:
    """Return the size of the last-level cache of the pCPU this runs on, None where the kernel does not say."""
    return seat.caches(seat.current_cpu())["llc"]


class Buffer:
    """Memory of this process alone.

    :param size: in bytes; rounded up to whole chunks
    :ivar memory: itself
    :ivar address: of its first byte, which begins a page
    :raises Refused: where there is not that much memory to be had
    """

    def __init__(self, size: int) -> None:
        self.size = -(-size // CHUNK) * CHUNK
        # Large pages, where the kernel gives them, keep the cost of address translation out.
        try:
            self.memory = mmap.mmap(-1, self.size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self.memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError as error:
            if not hasattr(self, "memory"):
                raise Refused(
                    f"there are no {self.size >> 20} MiB of memory to be had: {error.strerror}",
                    "a smaller --buffer-mib",
                ) from None
        # Its address; from_buffer holds on to the memory as long as this object lives.
        self._view = (ctypes.c_char * self.size).from_buffer(self.memory)
        self.address = ctypes.addressof(self._view)
        libc = ctypes.CDLL(None)
        self._memchr, self._memset, self._memcpy = libc.memchr, libc.memset, libc.memcpy
        word: Any = ctypes.c_size_t
        self._memchr.argtypes, self._memchr.restype = (word, ctypes.c_int, word), word
        self._memset.argtypes, self._memset.restype = (word, ctypes.c_int, word), word
        self._memcpy.argtypes, self._memcpy.restype = (word, word, word), word
        self._memset(self.address, _FILL, self.size)

    def read(self, offset: int, size: int) -> None:
        """Read *size* bytes from *offset* on."""
        self._memchr(self.address + offset, _ABSENT, size)

    def write(self, offset: int, size: int) -> None:
        """Write *size* bytes from *offset* on."""
        self._memset(self.address + offset, _FILL, size)

    def copy(self, offset: int, size: int) -> None:
        """Copy *size* bytes from *offset* on to as far behind the buffer's middle; they must lie before it."""
        self._memcpy(self.address + self.size // 2 + offset, self.address + offset, size)
