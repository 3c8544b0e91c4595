"""New memory of the logits' size on a CPU, asked for in large pages.

Most allocators map a block of that size anew in every call and unmap it afterwards, so that it costs a page fault for
each 4 KiB: more time than the loss itself. Linux has 2 MiB for whoever asks; NumPy asks for its arrays as well.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable

from torch import Tensor

LEAST = 4 << 20  # bytes of a tensor, below which faults are few
ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux alone


def in_large_pages(new: Tensor) -> Tensor:
    """The same tensor, whose memory nobody has touched yet. Where the system has no large pages, nothing happens."""
    if ADVICE is None or type(new) is not Tensor or new.device.type != "cpu" or new.nbytes < LEAST:
        return new  # a subclass may be one that is traced, and has no memory
    start = -(-new.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    _madvise()(start, new.data_ptr() + new.nbytes - start, ADVICE)
    return new


@functools.lru_cache(maxsize=1)
def _madvise() -> Callable:
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise
